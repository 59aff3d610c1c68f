"""The policy of a run, as its collector calls it: one compiled function of (networks, observation, index, noise).

At batch 1 the network is a small part of what an actor costs: its Python, its distribution and its dozens of small operations
are the rest, and with an update between two frames none of them is in a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, exploration_type

from omnet_torchrl.dropout import SeededDropout
from omnet_torchrl.modules import SubnetActor
from omnet_torchrl.training.compiled import CompiledStep, Inputs, preserved
from omnet_torchrl.training.update import SACUpdate


class CompiledPolicy(TensorDictModuleBase):
    """The actor of an update, with its current parameters; once prepared, its random actions are compiled.

    The actor itself answers whatever else it is asked: other exploration types, other batch sizes, before :meth:`prepare`, or
    where ``update`` is not compiled or the actor has dropout.

    Args:
        actor (SubnetActor): the one that ``update``'s loss was made of.
        update (SACUpdate): whose tensors it reads.

    Keys:
        Read: the actor's ``in_keys``. Written: the action; by the actor itself, its other outputs too.

    .. note:: The noise is drawn from torch's global generator as the actor draws it: the same seed gives the same actions, to
        rounding. An index out of range is not seen; :class:`~omnet_torchrl.SubnetPrimer` draws none.
    """

    def __init__(self, actor: SubnetActor, update: SACUpdate):
        super().__init__()
        self.actor, self.update = actor, update
        self.in_keys, self.out_keys = list(actor.in_keys), [actor.action_key]
        self._step: CompiledStep | None = None

    def prepare(self, tensordict: TensorDictBase) -> None:
        """Compile for inputs like those of ``tensordict``, whose values don't matter; nothing else is changed."""
        dropout = any(isinstance(module, SeededDropout) and module.p for module in self.actor.modules())
        if not self.update.compiled or dropout:
            return
        device = self.update.device
        example = tensordict.select(*self.in_keys).to(device).apply(torch.zeros_like)
        with preserved([], device):
            action = self.actor(example.copy()).get(self.actor.action_key)
            self._inputs = Inputs(example, TensorDict({"noise": action.detach()}))
            self._step = CompiledStep(self._act, self.update.actor_params, self._inputs)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write an action of the subnetwork that the index names."""
        inputs = [tensordict.get(key, None) for key in self.in_keys]
        if self._step is None or exploration_type() not in (None, ExplorationType.RANDOM) or not self._fits(inputs):
            return self.actor(tensordict)
        like = self._inputs.examples[-1]
        noise = torch.randn(like.shape, dtype=like.dtype, device=like.device)
        return tensordict.set(self.actor.action_key, self._step([*(value.contiguous() for value in inputs), noise])["action"])

    def _fits(self, inputs: list[Tensor | None]) -> bool:
        examples = self._inputs.examples[:-1]
        return all(
            value is not None and value.shape == like.shape and value.dtype == like.dtype and value.device == like.device
            for value, like in zip(inputs, examples, strict=True)
        )

    def _act(self, params: Any, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        loss = self.update.loss
        action, _ = loss._act(TensorDict(params), batch, batch.get(loss.tensor_keys.subnet), draws.get("noise"))
        return {"action": action}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The actor's."""
        return self.actor.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The actor's."""
        return self.actor.load_state_dict(*args, **kwargs)
