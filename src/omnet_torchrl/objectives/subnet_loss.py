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
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives.common import LossModule

from omnet_torchrl.layers.dropout import SEED, with_seed
from omnet_torchrl.objectives.draws import PASSES, draw_indices
from omnet_torchrl.objectives.networks import called_with, count_subnets, keep_freed_memory

MAX_LISTED = 2**20  # above this number of subnetworks, a loss may not ask for all of them, nor draw several different ones
Objective = Callable[[TensorDictBase, TensorDictBase, TensorDictBase], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class LossStep:
    """One optimiser step of an update, as a loss states it in :meth:`SubnetLoss.steps`.

    Args:
        name (str): of the step, e.g. ``"critic"``.
        trains (tuple of str): the parameter groups that it trains, named as the attributes of the loss: networks
            (``"qvalue_network_params"``) or single parameters (``"log_alpha"``). What requires no gradient is left alone.
        objective (callable): maps (batch, draws, params) to the loss, a scalar, and to a dictionary of what else it computed,
            detached: scalars to be logged, or a value for each transition. ``params`` are named like ``trains``.
        targets (tuple of str): the groups whose target networks move towards them after the step.
        delayed (bool): the step is made in every ``policy_update_delay``-th update only. Defaults to ``False``.
        after (callable or None): gets the params after the step, may change them in place (keep them within bounds), and
            returns a dictionary of scalars to be logged.
    """

    name: str
    trains: tuple[str, ...]
    objective: Objective
    targets: tuple[str, ...] = ()
    delayed: bool = False
    after: Callable[[TensorDictBase], dict[str, Tensor]] | None = None


class SubnetLoss(LossModule):
    """Base of the losses over subnetworks: which subnetworks are asked, and how.

    A subclass calls :meth:`_init_subnets` at the end of its constructor, has the attributes ``qvalue_network`` and
    ``actor_network``, and accepts the key ``subnet``.

    Attributes:
        num_subnets, num_actor_subnets (int): N of the critic and of the actor.
        num_trained_subnets, num_target_subnets, num_value_subnets (int): K, M and V.
    """

    num_subnets: int
    num_actor_subnets: int
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

    def _init_subnets(self, replacement: bool, **counts: int | str | None) -> None:
        """Read the numbers of subnetworks from the modules, and check the counts ``trained``, ``target`` and ``value``."""
        self.num_subnets = count_subnets(self.qvalue_network, self.tensor_keys.subnet, "qvalue_network")
        self.num_actor_subnets = count_subnets(self.actor_network, self.tensor_keys.subnet, "actor_network")
        self.replacement = replacement
        self._all = {name for name, count in counts.items() if count is None}
        for name, count in counts.items():
            number = min(2, self.num_subnets) if count == "auto" else count
            setattr(self, f"num_{name}_subnets", self._checked_count(f"num_{name}_subnets", number))
        keep_freed_memory()
        networks = (self.actor_network_params, self.qvalue_network_params)
        self._seeded = any(key[-1] == SEED for params in networks for key in params.keys(True, True))
        # What of a network is no number of its own: masks and units. A target network has those of the online one.
        self._shared_keys = {
            name: [key for key, value in getattr(self, name).items(True, True) if not value.is_floating_point()]
            for name in ("actor_network_params", "qvalue_network_params")
        }
        # The value estimator is made now rather than at first use, so that nothing is registered while tracing, and nothing
        # is missing from a state dict.
        self.make_value_estimator()

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
        keys, subnet = self.tensor_keys, self.tensor_keys.subnet
        actor_keys = [k for k in self.actor_network.in_keys if k != subnet]
        qvalue_keys = [k for k in self.qvalue_network.in_keys if k != subnet]
        states = dict.fromkeys([*actor_keys, *(k for k in qvalue_keys if k != keys.action)])
        ends = [keys.reward, keys.done, keys.terminated]
        following = [unravel_key(("next", key)) for key in [*ends, *states]]
        self._in_keys = list(dict.fromkeys([keys.action, *following, *states]))

    @property
    def optional_in_keys(self) -> list[NestedKey]:
        """What changes the losses where a batch has it: steps to the next observation (n-step returns), priority weights."""
        weight = [] if self.use_prioritized_weights is False else [self.tensor_keys.priority_weight]
        return [self.value_estimator.tensor_keys.steps_to_next_obs, *weight]

    def set_keys(self, **kwargs: Any) -> None:
        """As :meth:`~torchrl.objectives.LossModule.set_keys`, and ``subnet``, the key of the index."""
        super().set_keys(**kwargs)
        for name in ("qvalue_network", "actor_network"):
            count_subnets(getattr(self, name), self.tensor_keys.subnet, name)

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
        no random number.

        Args:
            tensordict (TensorDictBase): a batch; only the shape of its action is read.
            generator (torch.Generator or None): on the device of the parameters. ``None``: torch's global generator.

        Keyword Args:
            num_updates (int or None): the draws of this many updates, along a leading dimension: ``unbind(0)`` gives those of
                each, for a fraction of the time. ``None`` (default): of one, without that dimension.
            delayed (sequence of bool or None): ``num_updates`` of them, whether the delayed steps (the actor's) belong to each:
                ``noise`` of those without them is not drawn, and 0. ``None`` (default): to all.

        Returns:
            TensorDict: on the device of the parameters, without (further) batch size: the int64 indices ``critic (K,)``,
            ``target (M,)``, ``value (V,)``, ``next_actor ()``, ``actor ()``; and the standard-normal ``next_noise``, ``noise``
            of the next and the current action, of the action's shape (left out where the action is no tensor); where a network
            has dropout, ``dropout (5,)``, int64 seeds of its noise in the passes ``critic, target, value, next_actor, actor``
            (:class:`~omnet_torchrl.SeededDropout`). Replace any of them before you pass it on: indices of shape ``batch`` for
            the actors or ``(K, *batch)`` for the critics choose per element.

        """
        if delayed is not None and len(delayed) != num_updates:
            raise ValueError(f"delayed must have num_updates={num_updates} elements, got {len(delayed)}.")
        parameter = next(leaf for leaf in self.qvalue_network_params.values(True, True) if leaf.is_floating_point())
        device, lead = parameter.device, () if num_updates is None else (num_updates,)
        source = {"generator": generator, "device": device}
        draws = {}
        for name, count in (("critic", "trained"), ("target", "target"), ("value", "value")):
            options = {"lead": lead, "replacement": self.replacement and count not in self._all, **source}
            draws[name] = draw_indices(self.num_subnets, getattr(self, f"num_{count}_subnets"), **options)
        for name in self._actor_draws:
            draws[name] = draw_indices(self.num_actor_subnets, 1, lead=lead, **source).squeeze(-1)
        if self._seeded:
            draws["dropout"] = torch.randint(2**32, (*lead, len(PASSES)), **source)
        action = tensordict.get(self.tensor_keys.action)
        if isinstance(action, Tensor):
            draws |= self._draw_noise((*lead, *action.shape), parameter.dtype, delayed, source)
        return TensorDict(draws, batch_size=lead, device=device)

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

    def value(
        self,
        tensordict: TensorDictBase,
        action: Any,
        subnet: Tensor,
        *,
        params: TensorDictBase | None = None,
        seed: Tensor | None = None,
        detach: bool = False,
    ) -> Tensor:
        """Values of an action by several critic subnetworks.

        Args:
            tensordict (TensorDictBase): of batch size ``batch``, with the critic's inputs but the action. It is not written to.
            action (Tensor or TensorDictBase): ``(*batch, action_dim)``.
            subnet (Tensor): int64, ``(K,)``; or ``(K, *batch)``, which chooses for each element.

        Keyword Args:
            params (TensorDictBase or None): of the critic. ``None``: the loss's own, ``qvalue_network_params``.
            seed (Tensor or None): of the noise of dropout, if the critic has it. ``None``: the seed that is set.
            detach (bool): the gradient reaches the action only, and not the critic's parameters. Defaults to ``False``.

        Returns:
            Tensor: ``(K, *batch)``.
        """
        batch = tensordict.batch_size
        params = with_seed(self.qvalue_network_params if params is None else params, seed)
        if subnet.ndim <= 1:
            subnet = subnet.reshape(-1, *(1 for _ in batch))
        inputs = self._inputs(self.qvalue_network, tensordict, subnet).set(self.tensor_keys.action, action)
        with called_with(self.qvalue_network, params, detach):
            value = self.qvalue_network(inputs).get(self.tensor_keys.state_action_value, None)
        if value is None:
            raise KeyError(
                f"the critic writes {self.qvalue_network.out_keys} and no {self.tensor_keys.state_action_value!r}: say which "
                "key is its value with loss.set_keys(state_action_value=...)."
            )
        value = value.squeeze(-1)
        # A critic that ignores the index answers without its dimension.
        return value.expand(subnet.shape[0], *batch)

    def deterministic_action(
        self, tensordict: TensorDictBase, subnet: Tensor, *, params: TensorDictBase | None = None
    ) -> Tensor:
        """The action of actor subnetworks without noise, of the broadcast batch's shape.

        Args:
            tensordict (TensorDictBase): of batch size ``batch``, with the actor's inputs. It is not written to.
            subnet (Tensor): int64, an index that broadcasts against ``batch``.

        Keyword Args:
            params (TensorDictBase or None): of the actor. ``None``: the loss's own, ``actor_network_params``.
        """
        inputs, params = self._inputs(self.actor_network, tensordict, subnet), self._params("actor_network_params", params)
        with set_exploration_type(ExplorationType.DETERMINISTIC), called_with(self.actor_network, params):
            return self.actor_network(inputs).get(self.tensor_keys.action)

    def _inputs(self, network: TensorDictModule, tensordict: TensorDictBase, subnet: Tensor) -> TensorDictBase:
        """The network's inputs and its index, in a TensorDict of its own; the index fits no batch size."""
        if self.tensor_keys.subnet not in network.in_keys:
            if (self.num_subnets if network is self.qvalue_network else self.num_actor_subnets) > 1:
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
        for key in dict.fromkeys([*self.actor_network.in_keys, *self.qvalue_network.in_keys]):
            value = following.get(key, None)
            if isinstance(value, Tensor) and key != self.tensor_keys.subnet and value.is_floating_point():
                following.set(key, value.masked_fill(expand_as_right(terminated.squeeze(-1), value), 0.0))
        return following

    def _params(self, name: str, params: TensorDictBase | None) -> Any:
        given = None if params is None else params.get(name, None)
        return getattr(self, name) if given is None else given

    def _target_params(self, name: str, params: TensorDictBase | None, delayed: bool) -> TensorDictBase:
        """The target network's parameters, under the masks that the online network has now."""
        online = self._params(name, params)
        if not delayed:
            return online.detach()
        target = self._params(f"target_{name}", params)
        # Plain tensors: what is marked as a buffer can't be put back by a network that calls another one functionally.
        target = (target._param_td if isinstance(target, TensorDictParams) else target).copy()
        for key in self._shared_keys[name]:
            target.set(key, online.get(key))
        return target

    def _reduced(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        return self._reduce_loss(loss, tensordict=tensordict, weights=self._maybe_get_priority_weight(tensordict))
