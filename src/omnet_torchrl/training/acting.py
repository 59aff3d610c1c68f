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

Question = tuple[bool, tuple[tuple[torch.Size, torch.dtype, torch.device], ...]]


class CompiledPolicy(TensorDictModuleBase):
    """The actor of an update, with its current parameters; its actions are compiled for what it was prepared for.

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
        self._steps: dict[Question, CompiledStep] = {}
        self._noise: dict[Question, Tensor] = {}  # like what a random action needs

    def prepare(self, tensordict: TensorDictBase) -> None:
        """Compile actions of the current exploration type, for inputs like those of ``tensordict``, whose values don't matter.

        Nothing else is changed. What it is prepared for already is left as it is.
        """
        dropout = any(isinstance(module, SeededDropout) and module.p for module in self.actor.modules())
        if not self.update.compiled or dropout:
            return
        device = self.update.device
        example = tensordict.select(*self.in_keys).to(device).apply(torch.zeros_like)
        question = _question([example.get(key) for key in self.in_keys])
        if question is None or question in self._steps:
            return
        draws = TensorDict()
        with preserved([], device):
            if not question[0]:
                draws["noise"] = self._noise[question] = self.actor(example.copy()).get(self.actor.action_key).detach()
            self._steps[question] = CompiledStep(self._act, self.update.actor_params, Inputs(example, draws))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write an action of the subnetwork that the index names."""
        inputs = [tensordict.get(key, None) for key in self.in_keys]
        question = _question(inputs)
        if question not in self._steps:
            return self.actor(tensordict)
        leaves = [value.contiguous() for value in inputs]
        if question in self._noise:
            leaves.append(torch.randn_like(self._noise[question]))
        with torch.no_grad():
            return tensordict.set(self.actor.action_key, self._steps[question](leaves)["action"])

    def _act(self, params: Any, batch: TensorDictBase, draws: TensorDictBase) -> dict[str, Tensor]:
        loss, params = self.update.loss, TensorDict(params)
        if "noise" in draws.keys():
            return {"action": loss._act(params, batch, batch.get(loss.tensor_keys.subnet), draws.get("noise"))[0]}
        with params.to_module(loss.actor_network, preserve_module_state=False):
            return {"action": loss.actor_network(batch.copy()).get(loss.tensor_keys.action)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The actor's."""
        return self.actor.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The actor's."""
        return self.actor.load_state_dict(*args, **kwargs)


def _question(inputs: list[Tensor | None]) -> Question | None:
    """Whether the action is to be deterministic, and shape, dtype and device of each input; ``None`` where it is not ours."""
    kind = exploration_type()
    if kind not in (None, ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        return None
    kinds = tuple((value.shape, value.dtype, value.device) for value in inputs if value is not None)
    return (kind == ExplorationType.DETERMINISTIC, kinds) if len(kinds) == len(inputs) else None
