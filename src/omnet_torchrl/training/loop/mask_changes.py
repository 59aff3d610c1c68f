"""When a run changes its masks, on which transitions they are scored, and what a checkpoint keeps of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer

from omnet_torchrl.envs import task_names
from omnet_torchrl.training.loop.stopping import DivergenceError
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.updates import MaskSchedule

RULES = {"freeze_overlap": "masks/overlap", "freeze_return": "eval/return"}  # and the metric that each is met by


class MaskChanges:
    """A schedule of masks within a run; without one, nothing happens.

    Args:
        schedule (MaskSchedule or None): see :func:`~omnet_torchrl.training.build.make_topology`.
        buffer (ReplayBuffer): of the transitions that masks are scored on.
        config (TrainConfig): the run's options.
    """

    def __init__(self, schedule: MaskSchedule | None, buffer: ReplayBuffer, config: TrainConfig):
        if (schedule is None) != (config.topology.method is None):
            got = f"topology.method={config.topology.method} and {'none' if schedule is None else 'one'}"
            raise ValueError(f"the trainer must be given a schedule of masks where topology.method names one, got {got}.")
        self.schedule, self.buffer, self.config = schedule, buffer, config

    def step(self, frames: int, evaluation: float | None) -> dict[str, float]:
        """Change the masks, before the updates of a frame, where that is due; what there is to log.

        Which frames are due, and on which transitions masks are scored, depends on the frame's number alone.

        Raises:
            DivergenceError: a score is not finite.
        """
        if self.schedule is None or frames <= self.config.init_random_frames:
            return {}
        try:
            return self.schedule.step(lambda: self._recent(frames), frames, evaluation=evaluation)
        except ValueError as error:
            raise DivergenceError(f"at frame {frames}, {error}") from error

    def _recent(self, frames: int) -> TensorDictBase:
        """A batch of the newest transitions; ``(T, B)``, where an element is one of all tasks."""
        stored, storage = len(self.buffer), self.buffer.storage
        tasks = len(task_names(self.config.env))
        newest = min(-(-(self.config.topology.recent_frames or stored * tasks) // tasks), stored)
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, "topology", frames))
        back = torch.randint(newest, (self.config.optim.batch_size,), generator=generator)
        cursor = self.buffer.writer.state_dict()["_cursor"]  # where the next one will be
        batch = storage.get(((cursor - 1 - back) % storage.max_size).to(storage.device))
        return batch if tasks == 1 else batch.transpose(0, 1)

    def say_if_never_frozen(self, last: Mapping[str, float], say: Callable[[str], object]) -> None:
        """At the end of a run, say of a freeze rule that it was never met."""
        rules = {name: value for name in RULES if (value := getattr(self.config.topology, name)) is not None}
        if self.schedule is not None and rules and self.schedule.frozen_at is None:
            newest = "; ".join(
                f"{name}={value:g}, newest {last.get(RULES[name], math.nan):.3g}" for name, value in rules.items()
            )
            advice = "lower it" if self.config.topology.end is not None else "lower it, or give topology.end"
            say(f"warning: the masks were never frozen (topology.{newest}): {advice}.")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing without a schedule."""
        return {} if self.schedule is None else {"topology": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        if self.schedule is not None:
            self.schedule.load_state_dict(state["topology"])
