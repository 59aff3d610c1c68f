"""A compiled update as the optimisation stepper of TorchRL's Trainer."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.trainers import OptimizationStepper, Trainer

from omnet_torchrl.updates.update import Update


class UpdateStepper(OptimizationStepper):
    """Makes an :class:`~omnet_torchrl.Update` in each optimisation step of a :class:`torchrl.trainers.Trainer`.

    The update has the optimisers and moves the targets: leave ``optimizer`` and ``target_net_updater`` of the trainer out.
    Priorities of the trainer's replay buffer are written here. The trainer's checkpoints hold the state of the update.

    Args:
        update (Update): of the trainer's loss module.

    Keyword Args:
        num_updates (int): so many updates of each sampled batch, which they share out: a trainer that samples 20 * 256
            transitions makes 20 updates of 256 in one call with ``num_updates=20``. Defaults to 1.

    Raises:
        ValueError: a batch that can't be shared out, or a trainer of another loss or with a target updater of its own.
    """

    updates_replay_priority = True

    def __init__(self, update: Update, *, num_updates: int = 1):
        self.update, self.num_updates = update, num_updates

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Update, and return the losses."""
        if trainer.loss_module is not self.update.loss:
            raise ValueError("the trainer's loss_module must be the loss of the update, got another one.")
        if len(sub_batch) % self.num_updates:
            raise ValueError(f"the batch size must be a multiple of num_updates={self.num_updates}, got {len(sub_batch)}.")
        batch = sub_batch if self.num_updates == 1 else sub_batch.reshape(self.num_updates, -1)
        metrics = self.update(batch)
        buffer = getattr(trainer, "replay_buffer", None)
        if buffer is not None and hasattr(buffer, "update_tensordict_priority"):
            buffer.update_tensordict_priority(batch.reshape(-1))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The update's."""
        return self.update.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The update's."""
        self.update.load_state_dict(state_dict)
