"""The part that SAC, TD3 and DQN over subnetworks have in common: critics that are trained on a bootstrapped target.

Equation 4 of https://arxiv.org/abs/2310.14009: K critics are trained on one batch, and the target takes the value of the next
state from M of the target network. A subclass says what the value of the next state is.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives.utils import distance_loss

from omnet_torchrl.layers.dropout import with_seed
from omnet_torchrl.objectives.draws import dropout_seed
from omnet_torchrl.objectives.networks import called_with, check_shape
from omnet_torchrl.objectives.subnet_loss import LossStep, SubnetLoss

# How the values of several critics, ``(V, *batch)``, become one.
REDUCTIONS = {"mean": lambda q: q.mean(0), "min": lambda q: q.amin(0), "first": lambda q: q[0]}


def check_reduction(value_reduction: str) -> None:
    """Raise unless ``value_reduction`` names one of the ways to make one value of the actor's critics."""
    if value_reduction not in REDUCTIONS:
        names = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"value_reduction must be one of {names}, got {value_reduction!r}.")


def of_tasks(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """What there is for each task."""
    return {name: value for name, value in data.items() if name.endswith("_task")}


class TDLoss(SubnetLoss):
    """Base of the losses over subnetworks whose critics are trained on a bootstrapped target."""

    loss_function: str
    value_reduction: str
    skip_done_states: bool = False
    _loss_key: str = "loss_qvalue"  # of the critic's loss, among the outputs
    _value_key: str = "state_action_value"  # what the critic writes, a name of ``tensor_keys``
    _error = staticmethod(torch.abs)  # the priority as a function of the temporal-difference error

    def critic_step(self) -> LossStep:
        """The step of the critic, whose target network follows it."""
        targets = (self._critic,) if self._is_delayed(self._networks[0]) else ()
        return LossStep("critic", (self._critic,), self._critic_objective, targets)

    def qvalue_loss(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Critic loss, the sum over the trained subnetworks (equation 4). Costs nothing of the actor's loss.

        Args:
            tensordict (TensorDictBase): a batch; it is not written to.

        Keyword Args:
            draws (TensorDictBase or None): see :meth:`draw`. ``None``: drawn here.
            params (TensorDictBase or None): parameters to use instead of the loss's own: any of :meth:`parameter_groups`, named
                as the attributes they stand for. Bounds of SAC's temperature are applied to a given ``log_alpha``'s value;
                keeping it within is the caller's.

        Returns:
            tuple: the loss, reduced, and ``{"td_error": (*batch,), "target_value": (*batch,), "pred_value": (K, *batch),
            "next_state_value": (*batch,)}``, detached. A DQN with a target for each trained subnetwork has a leading dimension
            in the second and the last. Of several tasks, also the mean of each: ``td_error_task (T,)``, ``qvalue_task``,
            ``loss_qvalue_task``.
        """
        draws = self.drawn(tensordict, draws)
        target, next_value = self._target(tensordict, draws, params)
        pred = self._prediction(tensordict, draws, self._params(self._critic, params))
        loss = distance_loss(pred, target.expand_as(pred), loss_function=self.loss_function)
        loss = self._of_each(loss, tensordict, draws.get("critic")).sum(0)
        pred = pred.detach()
        data = {"td_error": self._error(pred - target).amax(0), "target_value": target, "pred_value": pred}
        tasks = self._logged(tensordict, td_error=data["td_error"], qvalue=pred, **{self._loss_key: loss})
        return self._reduced(loss, tensordict), {**data, "next_state_value": next_value, **tasks}

    def compute_target(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> Tensor:
        """Regression target of the critics, ``(*batch,)``: the value estimator's, of the value of the next state.

        Arguments as in :meth:`qvalue_loss`.
        """
        return self._target(tensordict, self.drawn(tensordict, draws), params)[0]

    @torch.no_grad()
    def _target(
        self, tensordict: TensorDictBase, draws: TensorDictBase, params: TensorDictBase | None
    ) -> tuple[Tensor, Tensor]:
        """The target and the value of the next state, ``(*batch,)`` or, for each of several, ``(K, *batch)``."""
        tensordict = tensordict.copy()
        following = tensordict.get("next").copy()
        for key in (self.tensor_keys.reward, self.tensor_keys.done, self.tensor_keys.terminated):
            if (value := following.get(key, None)) is not None:
                check_shape(unravel_key(("next", key)), value, (*tensordict.batch_size, 1))
        if self.skip_done_states:
            following = self._without_terminal(following)
        value = self._next_value(following, draws, params)
        tensordict.set("next", following)
        if value.ndim > tensordict.ndim:
            tensordict = tensordict.expand(value.shape)
        return self.value_estimator.value_estimate(tensordict, next_value=value.unsqueeze(-1)).squeeze(-1), value

    def _next_value(self, following: TensorDictBase, draws: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """The value of the next state."""
        raise NotImplementedError

    def _prediction(self, tensordict: TensorDictBase, draws: TensorDictBase, params: Any) -> Tensor:
        """The trained critics' values of the batch's actions, ``(K, *batch)``."""
        action = tensordict.get(self.tensor_keys.action)
        return self.value(tensordict, action, draws.get("critic"), params=params, seed=dropout_seed(draws, "critic"))

    def _of_each(self, loss: Tensor, tensordict: TensorDictBase, subnet: Tensor) -> Tensor:
        """What counts of the losses ``(K, *batch)``: all of them, unless a subclass knows better."""
        return loss

    def _value_of_policy(
        self, tensordict: TensorDictBase, action: Any, draws: TensorDictBase, params: TensorDictBase | None
    ) -> Tensor:
        """What the critics that the actor is trained against say of its actions, ``(V, *batch)``; they are not trained."""
        critic = {"params": self._params(self._critic, params), "seed": dropout_seed(draws, "value")}
        return self.value(tensordict, action, draws.get("value"), detach=True, **critic)

    def _critic_objective(
        self, batch: TensorDictBase, draws: TensorDictBase, params: TensorDictBase
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, data = self.qvalue_loss(batch, draws=draws, params=params)
        logged = {self._loss_key: loss.detach(), "qvalue": data["pred_value"].mean(), "td_error": data["td_error"]}
        return loss, logged | of_tasks(data)

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
        """Values of an action by several critic subnetworks; where the critic reads no action, of each action there is.

        Args:
            tensordict (TensorDictBase): of batch size ``batch``, with the critic's inputs but the action. It is not written to.
            action (Tensor, TensorDictBase or None): ``(*batch, action_dim)``; ``None`` for all discrete actions.
            subnet (Tensor): int64, ``(K,)``; or ``(K, *batch)``, which chooses for each element.

        Keyword Args:
            params (TensorDictBase or None): of the critic. ``None``: the loss's own.
            seed (Tensor or None): of the noise of dropout, if the critic has it. ``None``: the seed that is set.
            detach (bool): the gradient reaches the action only, and not the critic's parameters. Defaults to ``False``.

        Returns:
            Tensor: ``(K, *batch)``; for all discrete actions ``(K, *batch, num_actions)``.
        """
        batch, network = tensordict.batch_size, getattr(self, self._networks[0])
        params = with_seed(self._params(self._critic) if params is None else params, seed)
        if subnet.ndim <= 1:
            subnet = subnet.reshape(-1, *(1 for _ in batch))
        inputs = self._inputs(network, tensordict, subnet)
        if action is not None:
            inputs.set(self.tensor_keys.action, action)
        key = getattr(self.tensor_keys, self._value_key)
        with called_with(network, params, detach, inputs):
            value = network(inputs).get(key, None)
        if value is None:
            raise KeyError(
                f"the critic writes {network.out_keys} and no {key!r}: say which key is its value with "
                f"loss.set_keys({self._value_key}=...)."
            )
        # A critic that ignores the index answers without its dimension.
        if action is None:
            return value.expand(subnet.shape[0], *batch, value.shape[-1])
        return value.squeeze(-1).expand(subnet.shape[0], *batch)

    def deterministic_action(
        self,
        tensordict: TensorDictBase,
        subnet: Tensor,
        *,
        params: TensorDictBase | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """The action of actor subnetworks without noise, of the broadcast batch's shape.

        Args:
            tensordict (TensorDictBase): of batch size ``batch``, with the actor's inputs. It is not written to.
            subnet (Tensor): int64, an index that broadcasts against ``batch``.

        Keyword Args:
            params (TensorDictBase or None): of the actor. ``None``: the loss's own, ``actor_network_params``.
            seed (Tensor or None): of the noise of dropout, if the actor has it. ``None``: the seed that is set.
        """
        inputs = self._inputs(self.actor_network, tensordict, subnet)
        params = with_seed(self.actor_network_params if params is None else params, seed)
        with set_exploration_type(ExplorationType.DETERMINISTIC), called_with(self.actor_network, params, inputs=inputs):
            return self.actor_network(inputs).get(self.tensor_keys.action)
