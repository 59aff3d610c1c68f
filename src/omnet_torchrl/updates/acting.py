"""A compiled policy: one function of (networks, observation, index, noise).

At batch 1, most of what an actor costs is its Python, its distribution and its dozens of small operations.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type

from omnet_torchrl.modules import SubnetActor, SubnetPolicy
from omnet_torchrl.objectives.draws import rsample_with_noise
from omnet_torchrl.updates.compiled import CompiledFunction, as_bytes, preserved
from omnet_torchrl.updates.kernels import PRECISIONS, LowPrecision

Question = tuple[bool, tuple[tuple[torch.Size, torch.dtype, torch.device], ...]]


class CompiledPolicy(TensorDictModuleBase):
    """An actor with its current parameters and masks; its actions are compiled for what it was prepared for.

    The actor itself answers whatever else it is asked: other exploration types, other batch sizes, before :meth:`prepare`, or
    where it has dropout.

    Args:
        actor (SubnetPolicy): the one that a loss was made of, or any other; of a :class:`~omnet_torchrl.SubnetActor`, random
            and deterministic actions are compiled, of others the only ones there are.

    Keyword Args:
        precision (str): of the inputs of matrix products, see :class:`~omnet_torchrl.Update`. Defaults to ``"float32"``.
        compile (bool): ``False``: the actor answers everything. Defaults to ``True``.

    Keys:
        Read: the actor's ``in_keys``. Written: the action; by the actor itself, its other outputs too.

    .. note:: The noise is drawn from torch's global generator as the actor draws it: the same seed gives the same actions, to
        rounding. An index out of range is not seen; :class:`~omnet_torchrl.SubnetPrimer` draws none. A copy is not prepared,
        nor is a policy that another process receives.
    """

    def __init__(self, actor: SubnetPolicy, *, precision: str = "float32", compile: bool = True):
        super().__init__()
        self._random = isinstance(actor, SubnetActor)
        self.actor = policy = cast(Any, actor)
        self.compiled, self._dtype = compile, PRECISIONS[precision]
        self.in_keys, self.out_keys = list(policy.in_keys), [policy.action_key]
        self._code: dict[Question, CompiledFunction] = {}
        self._noise: dict[Question, Tensor] = {}  # like what a random action needs
        self._state: list[Tensor] = []
        self._places: list[tuple[dict[str, Any], str]] = []  # of these, in the actor
        self.register_load_state_dict_pre_hook(_under_its_name)

    def prepare(self, tensordict: TensorDictBase) -> None:
        """Compile actions of the current exploration type, for inputs like those of ``tensordict``, whose values don't matter.

        Nothing else is changed. What it is prepared for already is left as it is.
        """
        dropout = any(isinstance(module, nn.Dropout) and module.p for module in self.actor.modules())
        if not self.compiled or dropout:
            return
        params = TensorDict.from_module(self.actor)
        device = next(self.actor.parameters()).device
        example = tensordict.select(*self.in_keys).to(device).apply(torch.zeros_like)
        leaves = [example.get(key) for key in self.in_keys]
        question = self._question(leaves)
        if question is None or question in self._code:
            return
        keys = list(params.keys(True, True))
        state = [params.get(key).detach() for key in keys]
        self._state, self._places = as_bytes(state), [_place(self.actor, key) for key in keys]
        with preserved([], device), torch.no_grad():
            if not question[0]:
                self._noise[question] = self.actor(example.copy()).get(self.actor.action_key).detach()
                leaves.append(self._noise[question])

            def act(state: list[Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
                batch = TensorDict(dict(zip(self.in_keys, inputs, strict=False)), batch_size=example.batch_size)
                noise = None if question[0] else inputs[-1]
                return {"action": self._act(TensorDict(dict(zip(keys, state, strict=True))), batch, noise)}

            self._code[question] = CompiledFunction(act, state, leaves)

    def _act(self, params: TensorDict, batch: TensorDict, noise: Tensor | None) -> Tensor:
        low = contextlib.nullcontext() if self._dtype is None else LowPrecision(self._dtype)
        with low, params.to_module(self.actor, preserve_module_state=False):
            if noise is None:
                return self.actor(batch).get(self.actor.action_key)
            return rsample_with_noise(self.actor.get_dist(batch), noise)[0]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write an action of the subnetwork that the index names."""
        inputs = [tensordict.get(key, None) for key in self.in_keys]
        question = self._question(inputs)
        if question not in self._code or not self._follow():
            return self.actor(tensordict)
        leaves = [value.contiguous() for value in inputs]
        if question in self._noise:
            leaves.append(torch.randn_like(self._noise[question]))
        with torch.no_grad():
            return tensordict.set(self.actor.action_key, self._code[question](self._state, leaves)["action"])

    def _follow(self) -> bool:
        """Take over the actor's tensors where they were replaced; return whether they have the old ones' layout in memory."""
        now = [place[name] for place, name in self._places]
        if all(tensor.data_ptr() == known.data_ptr() for tensor, known in zip(now, self._state, strict=True)):
            return True
        state = as_bytes([tensor.detach() for tensor in now])
        new, old = ([(t.shape, t.stride(), t.dtype, t.device) for t in tensors] for tensors in (state, self._state))
        if new == old:
            self._state = state
        return new == old

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_code": {}, "_noise": {}, "_state": [], "_places": []}

    def _question(self, inputs: list[Tensor | None]) -> Question | None:
        """Whether the action is deterministic, and shape, dtype and device of each input; ``None`` where it is not ours."""
        kind = exploration_type()
        if self._random and kind not in (None, ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
            return None
        kinds = tuple((value.shape, value.dtype, value.device) for value in inputs if value is not None)
        return (not self._random or kind == ExplorationType.DETERMINISTIC, kinds) if len(kinds) == len(inputs) else None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The actor's."""
        return self.actor.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The actor's."""
        return self.actor.load_state_dict(*args, **kwargs)


def _place(module: nn.Module, key: Any) -> tuple[dict[str, Any], str]:
    """Where a module holds the tensor of a TensorDict of its parameters and buffers."""
    *path, name = (key,) if isinstance(key, str) else key
    owner = module.get_submodule(".".join(path))
    return owner._parameters if name in owner._parameters else owner._buffers, name


def _under_its_name(_: Any, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """The actor's state, as a module that holds a :class:`CompiledPolicy` has stored it, as the part by which it is loaded."""
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}actor.")]:
        state[f"{prefix}actor.{name.removeprefix(prefix)}"] = state.pop(name)
