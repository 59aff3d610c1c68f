"""What any loss over subnetworks needs, whatever its equations.

A loss over subnetworks chooses indices, writes them under ``"subnet"`` in a TensorDict of its own, and calls the modules. The
choice is data (:meth:`SubnetLoss.draw`), so that an update is a function of (parameters, batch, draws). A loss of
:mod:`~omnet_torchrl.objectives` inherits from :class:`SubnetLoss` and from TorchRL's loss of the same name, adds its equations,
and states in :meth:`SubnetLoss.steps` what an update of it does; :class:`~omnet_torchrl.updates.Update` knows no more than
that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from tensordict.utils import expand_as_right, unravel_key
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from omnet_torchrl.layers.dropout import SEED
from omnet_torchrl.objectives.draws import PASSES, draw_indices
from omnet_torchrl.objectives.networks import count_subnets, keep_freed_memory

MAX_LISTED = 2**20  # above this number of subnetworks, a loss may not ask for all of them, nor draw several different ones
Objective = Callable[[TensorDictBase, TensorDictBase, TensorDictBase], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class LossStep:
    """One optimiser step of an update, as a loss states it in :meth:`SubnetLoss.steps`.

    Args:
        name (str): of the step, e.g. ``"critic"``.
        trains (tuple of str): the parameter groups that it trains, named as the attributes of the loss: networks
            (``"qvalue_network_params"``) or single parameters (``"log_alpha"``). What requires no gradient is left alone.
        objective (callable or None): maps (batch, draws, params) to the loss, a scalar, and to a dictionary of what else it
            computed, detached: scalars to be logged, or a value for each transition. ``params`` are named like ``trains``.
            ``None``: nothing is trained, ``targets`` move.
        targets (tuple of str): the groups whose target networks move towards them after the step.
        delayed (bool): the step is made in every ``policy_update_delay``-th update only. Defaults to ``False``.
        after (callable or None): gets the params after the step, may change them in place (keep them within bounds), and
            returns a dictionary of scalars to be logged.
    """

    name: str
    trains: tuple[str, ...]
    objective: Objective | None
    targets: tuple[str, ...] = ()
    delayed: bool = False
    after: Callable[[TensorDictBase], dict[str, Tensor]] | None = None


class SubnetLoss(LossModule):
    """Base of the losses over subnetworks: which subnetworks are asked, and how.

    A subclass calls :meth:`_init_subnets` at the end of its constructor, says in ``_networks`` which of its attributes are the
    critic and the actor, and accepts the key ``subnet``.

    Attributes:
        num_subnets, num_actor_subnets (int): N of the critic and of the actor.
        num_trained_subnets, num_target_subnets, num_value_subnets (int): K, M and V.
    """

    num_subnets: int
    num_actor_subnets: int
    choose: str = "uniform"  # which subnetworks an update asks: those that are drawn, or "batch", those of the batch's tasks
    _networks: tuple[str, ...] = ("qvalue_network", "actor_network")  # the critic, and the actor where there is one
    _unread_settings: tuple[str, ...] = ("training",)  # attributes that no step reads: an update is not compiled anew for them
    # The draws that choose one actor subnetwork, and those that are noise of an action: always, or of delayed steps only.
    _actor_draws: tuple[str, ...] = ("next_actor", "actor")
    _noise_draws: tuple[str, ...] = ("next_noise",)
    _delayed_noise_draws: tuple[str, ...] = ("noise",)

    def steps(self) -> tuple[LossStep, ...]:
        """The optimiser steps of one update, in their order."""
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, TensorDictParams | Tensor]:
        """Everything that a step reads or changes of the loss, by the names of its attributes."""
        return {name: child for name, child in self.named_children() if isinstance(child, TensorDictParams)}

    def _init_subnets(self, replacement: bool, choose: str = "uniform", **counts: int | str | None) -> None:
        """Read the numbers of subnetworks from the modules, and check the counts ``trained``, ``target`` and ``value``."""
        self.num_subnets, *actor = self._count_subnets()
        self.num_actor_subnets = actor[0] if actor else 0
        self.replacement, self.choose = replacement, choose
        self._counts = counts = counts if choose == "uniform" else self._counts_of_tasks(counts)
        for name, count in counts.items():
            number = min(2, self.num_subnets) if count == "auto" else count
            setattr(self, f"num_{name}_subnets", self._checked_count(f"num_{name}_subnets", number))
        keep_freed_memory()
        params = {name: getattr(self, name) for name in (f"{network}_params" for network in self._networks)}
        self._seeded = any(key[-1] == SEED for each in params.values() for key in each.keys(True, True))
        # What of a network is not trained: masks, units, running statistics. A target network has those of the online one.
        self._shared_keys = {
            name: [key for key, value in each.items(True, True) if not isinstance(value, nn.Parameter)]
            for name, each in params.items()
        }
        # The value estimator is made now rather than at first use, so that nothing is registered while tracing, and nothing
        # is missing from a state dict.
        self.make_value_estimator()
        self._set_in_keys()

    def _counts_of_tasks(self, counts: dict[str, int | str | None]) -> dict[str, int | str | None]:
        """Every subnetwork of the actor is a task's, and has as many of the critic's: all of them are asked."""
        if self.choose != "batch":
            raise ValueError(f"choose must be 'uniform' or 'batch', got {self.choose!r}.")
        if counts != {"trained": 1, "target": "auto", "value": None}:
            raise ValueError("num_trained_subnets, num_target_subnets, num_value_subnets must be left out with choose='batch'.")
        each, rest = divmod(self.num_subnets, max(1, self.num_actor_subnets))
        if rest or not each or self.replacement:
            raise ValueError(
                "with choose='batch', the critic must have a multiple of the actor's subnetworks (2t and 2t + 1 are those of "
                f"task t), drawn without replacement; got {self.num_subnets} of the critic, {self.num_actor_subnets} of the "
                f"actor, replacement={self.replacement}."
            )
        return dict.fromkeys(counts, each)

    @property
    def batch_dims(self) -> int:
        """Dimensions of the batch of an update: ``(B,)``, or ``(T, B)`` with a task in each row."""
        return 1 if self.choose == "uniform" else 2

    def _count_subnets(self) -> list[int]:
        return [count_subnets(getattr(self, name), self.tensor_keys.subnet, name) for name in self._networks]

    def _checked_count(self, name: str, count: Any) -> int:
        if self.num_subnets > MAX_LISTED and (count is None or (count != 1 and not self.replacement)):
            advice = "give a number, and replacement=True"
            raise ValueError(f"{name} must not be {count or 'all'} of {self.num_subnets} different subnetworks: {advice}.")
        if count is None:
            return self.num_subnets
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an int or None, got {count!r}.")
        if not 1 <= count <= self.num_subnets:
            raise ValueError(f"{name} must be in [1, num_subnets={self.num_subnets}], got {count}.")
        return count

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        states = [key for key in self._input_keys() if key not in (keys.subnet, keys.action)]
        ends = [keys.reward, keys.done, keys.terminated]
        following = [unravel_key(("next", key)) for key in [*ends, *states]]
        task = [] if self.choose == "uniform" else [keys.subnet]
        self._in_keys = list(dict.fromkeys([keys.action, *following, *states, *task]))

    def _input_keys(self) -> list[NestedKey]:
        """What the networks read, the actor's first."""
        return list(dict.fromkeys(key for name in reversed(self._networks) for key in getattr(self, name).in_keys))

    @property
    def optional_in_keys(self) -> list[NestedKey]:
        """What changes the losses where a batch has it: steps to the next observation (n-step returns), priority weights."""
        weight = [] if self.use_prioritized_weights is False else [self.tensor_keys.priority_weight]
        return [self.value_estimator.tensor_keys.steps_to_next_obs, *weight]

    def set_keys(self, **kwargs: Any) -> None:
        """As :meth:`~torchrl.objectives.LossModule.set_keys`, and ``subnet``, the key of the index."""
        super().set_keys(**kwargs)
        self._count_subnets()

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> SubnetLoss:
        """As :meth:`~torchrl.objectives.LossModule.make_value_estimator`, on the device of the networks; returns the loss."""
        super().make_value_estimator(value_type, **{"device": self._default_device, **hyperparams})
        return self

    def reset_parameters_recursive(self) -> None:
        """Draw the networks anew; targets start as the online networks again. Masks stay."""
        super().reset_parameters_recursive()
        for step in self.steps():
            for name in step.targets:
                getattr(self, f"target_{name}").data.update_(getattr(self, name).data)

    def reset(self) -> None:
        """Forget all that was learned: networks are drawn anew, targets and single parameters start again. Masks stay."""
        self.reset_parameters_recursive()

    # Draws ------------------------------------------------------------------------------------------------------------------

    def draw(
        self,
        tensordict: TensorDictBase,
        generator: torch.Generator | None = None,
        *,
        num_updates: int | None = None,
        delayed: Sequence[bool] | None = None,
    ) -> TensorDict:
        """Draw everything random of one update, or of several at once.

        Indices are uniform, and without replacement within ``critic``, ``target`` and ``value``; with ``replacement=True`` they
        are independent, but for counts of ``None``, which are all of them. One subnetwork to choose from, or all of them, draws
        no random number. With ``choose="batch"`` no index is drawn: the batch has them.

        Args:
            tensordict (TensorDictBase): a batch; only the shape of its action is read.
            generator (torch.Generator or None): on the device of the parameters. ``None``: torch's global generator.

        Keyword Args:
            num_updates (int or None): the draws of this many updates, along a leading dimension: ``unbind(0)`` gives those of
                each, for a fraction of the time. ``None`` (default): of one, without that dimension.
            delayed (sequence of bool or None): ``num_updates`` of them, whether the delayed steps (the actor's) belong to each:
                ``noise`` of those without them is not drawn, and 0. ``None`` (default): to all.

        Returns:
            TensorDict: on the device of the parameters, without (further) batch size, what the loss needs of: the int64 indices
            ``critic (K,)``, ``target (M,)``, ``value (V,)``, ``next_actor ()``, ``actor ()``; the standard-normal
            ``next_noise``, ``noise`` of the next and the current action, of the action's shape (left out where the action is no
            tensor); where a network has dropout, ``dropout (5,)``, int64 seeds of its noise in the passes ``critic, target,
            value, next_actor, actor`` (:class:`~omnet_torchrl.SeededDropout`). Replace any of them before you pass it on:
            indices of shape ``batch`` for the actors or ``(K, *batch)`` for the critics choose per element.
        """
        if delayed is not None and len(delayed) != num_updates:
            raise ValueError(f"delayed must have num_updates={num_updates} elements, got {len(delayed)}.")
        parameter = next(self._params(self._critic).parameters())
        device, lead = parameter.device, () if num_updates is None else (num_updates,)
        source = {"generator": generator, "device": device}
        draws = {}
        for name, count in self._counts.items() if self.choose == "uniform" else ():
            options = {"lead": lead, "replacement": self.replacement and count is not None, **source}
            number = getattr(self, f"num_{name}_subnets")
            draws["critic" if name == "trained" else name] = draw_indices(self.num_subnets, number, **options)
        for name in self._actor_draws if self.choose == "uniform" else ():
            draws[name] = draw_indices(self.num_actor_subnets, 1, lead=lead, **source).squeeze(-1)
        if self._seeded:
            draws["dropout"] = torch.randint(2**32, (*lead, len(PASSES)), **source)
        action = tensordict.get(self.tensor_keys.action)
        if isinstance(action, Tensor):
            draws |= self._draw_noise((*lead, *action.shape), parameter.dtype, delayed, source)
        return TensorDict(draws, batch_size=lead, device=device)

    def drawn(self, tensordict: TensorDictBase, draws: TensorDictBase | None) -> TensorDictBase:
        """The draws that an update of a batch is made with: ``draws`` of :meth:`draw`, or made here where they are ``None``.

        With ``choose="batch"``, the indices of the batch's tasks are among them.
        """
        draws = self.draw(tensordict) if draws is None else draws
        if self.choose == "uniform":
            return draws
        task = tensordict.get(self.tensor_keys.subnet, None)
        if task is None:
            raise KeyError(f"the batch has no {self.tensor_keys.subnet!r}, which says the task of each transition.")
        task = task[..., :1] if tensordict.ndim > 1 else task  # a row is of one task
        each = torch.arange(self.num_trained_subnets, device=task.device).view(-1, *(1 for _ in task.shape))
        critic = task * self.num_trained_subnets + each
        chosen = {"critic": critic, "target": critic, "value": critic, **dict.fromkeys(self._actor_draws, task)}
        return TensorDict({**chosen, **dict(draws.items())})

    def _draw_noise(
        self, shape: tuple[int, ...], dtype: torch.dtype, delayed: Sequence[bool] | None, source: dict[str, Any]
    ) -> dict[str, Tensor]:
        noise = {name: torch.randn(shape, **source, dtype=dtype) for name in self._noise_draws}
        for name in self._delayed_noise_draws:
            if delayed is None:
                noise[name] = torch.randn(shape, **source, dtype=dtype)
                continue
            noise[name] = torch.zeros(shape, device=source["device"], dtype=dtype)
            for i in (i for i, follows in enumerate(delayed) if follows):
                noise[name][i].normal_(generator=source["generator"])
        return noise

    # Asking networks --------------------------------------------------------------------------------------------------------

    def _inputs(self, network: TensorDictModule, tensordict: TensorDictBase, subnet: Tensor) -> TensorDictBase:
        """The network's inputs and its index, in a TensorDict of its own; the index fits no batch size."""
        if self.tensor_keys.subnet not in network.in_keys:
            critic = network is getattr(self, self._networks[0])
            if (self.num_subnets if critic else self.num_actor_subnets) > 1:
                raise ValueError(
                    f"a network of several subnetworks reads {network.in_keys} and no {self.tensor_keys.subnet!r}: say which "
                    "key is its index with loss.set_keys(subnet=...)."
                )
            return tensordict.select(*network.in_keys, strict=False)
        inputs = TensorDict()
        for key in network.in_keys:
            value = subnet if key == self.tensor_keys.subnet else tensordict.get(key, None)
            if value is not None:
                inputs.set(key, value)
        return inputs

    def _without_terminal(self, following: TensorDictBase) -> TensorDictBase:
        """The next states, zeros where they are terminal."""
        terminated = following.get(self.tensor_keys.terminated)
        for key in self._input_keys():
            value = following.get(key, None)
            if isinstance(value, Tensor) and key != self.tensor_keys.subnet and value.is_floating_point():
                following.set(key, value.masked_fill(expand_as_right(terminated.squeeze(-1), value), 0.0))
        return following

    @property
    def _critic(self) -> str:
        """Name of the critic's parameters."""
        return f"{self._networks[0]}_params"

    def _params(self, name: str, params: TensorDictBase | None = None) -> Any:
        given = None if params is None else params.get(name, None)
        return getattr(self, name) if given is None else given

    def _is_delayed(self, network: str) -> bool:
        return getattr(self, f"delay_{network.removesuffix('_network')}")

    def _target_params(self, network: str, params: TensorDictBase | None) -> TensorDictBase:
        """The target network's parameters, under the masks that the online network has now; without one, the online ones."""
        name = f"{network}_params"
        online = self._params(name, params)
        if not self._is_delayed(network):
            return online.detach()
        target = self._params(f"target_{name}", params)
        # Plain tensors: what is marked as a buffer can't be put back by a network that calls another one functionally.
        target = (target._param_td if isinstance(target, TensorDictParams) else target).copy()
        for key in self._shared_keys[name]:
            target.set(key, online.get(key))
        return target

    def _reduced(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        """The loss of a batch; of several tasks the sum of their losses, so that none is less for the others beside it."""
        if self.choose == "batch" and tensordict.ndim > 1 and self.reduction != "none":
            return self._of_tasks(loss, tensordict).sum()
        return self._reduce_loss(loss, tensordict=tensordict, weights=self._maybe_get_priority_weight(tensordict))

    def _of_tasks(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        """The loss of each row, reduced: ``(T,)``."""
        weights = self._maybe_get_priority_weight(tensordict)
        rows = zip(loss, tensordict.unbind(0), [None] * len(loss) if weights is None else weights, strict=True)
        return torch.stack([self._reduce_loss(row, tensordict=each, weights=weight) for row, each, weight in rows])

    def _logged(self, tensordict: TensorDictBase, **values: Tensor) -> dict[str, Tensor]:
        """Means of ``(*, T, B)`` for each task, to be logged under names that end in ``_task``; nothing without tasks."""
        if self.choose == "uniform" or tensordict.ndim < 2:
            return {}
        count = len(tensordict)
        return {f"{name}_task": value.detach().mean(-1).reshape(-1, count).mean(0) for name, value in values.items()}
