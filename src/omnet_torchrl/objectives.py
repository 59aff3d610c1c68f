r"""The SAC loss over subnetworks.

Equations 4 and 5 of "One is More: Diverse Perspectives within a Single Network for Efficient DRL" (2023,
https://arxiv.org/abs/2310.14009), with SAC's entropy terms, which its equation 3 leaves out for SAC too. One update draws
indices :math:`i` (trained), :math:`j_1, j_2` (target), :math:`i', i''` (actor) once for the whole batch:

.. math::
    L_Q &= \big(r + \gamma\,[\min_{j \in \{j_1, j_2\}} Q_{\bar\theta_j}(s', a') - \alpha \log \pi_{\phi_{i''}}(a' \mid s')]
    - Q_{\theta_i}(s, a)\big)^2, & a' &\sim \pi_{\phi_{i''}}(\cdot \mid s') \\
    L_\pi &= \alpha \log \pi_{\phi_{i'}}(a \mid s) - \tfrac1N \textstyle\sum_k Q_{\theta_k}(s, a),
    & a &\sim \pi_{\phi_{i'}}(\cdot \mid s)

The loss knows nothing of masks. It chooses indices, writes them under ``"subnet"`` in a TensorDict of its own, and calls the
modules; how many subnetworks are trained (K), minimised over (M) and averaged (V) makes the SAC family out of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import expand_as_right, unravel_key
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SACLoss
from torchrl.objectives.utils import distance_loss

from omnet_torchrl.draws import PASSES, draw_indices, dropout_seed, rsample_with_noise
from omnet_torchrl.dropout import SEED, seed_dropout, with_seed

MANY = 2**20  # subnetworks of which no update asks all, or orders all


class OMNetSACLoss(SACLoss):
    r"""SAC loss of OMNet; SAC, DroQ, REDQ and single-critic rows are configurations of it.

    =====================  =================================  ============  ==========  ===========
    row                    critic                             trained (K)   target (M)  value (V)
    =====================  =================================  ============  ==========  ===========
    OMNet (default)        one masked network, N 5            1             2           all
    SAC, DroQ              2 separate networks                all           2           all
    REDQ                   10 separate networks               all           2           all
    single critic          1 network                          1             1           all
    =====================  =================================  ============  ==========  ===========

    Args:
        actor_network (ProbabilisticTensorDictSequential): stochastic actor, e.g. :class:`~omnet_torchrl.SubnetActor`. An actor
            that reads no index is one subnetwork.
        qvalue_network (TensorDictModule): critic, e.g. :class:`~omnet_torchrl.SubnetQValueOperator`. Whatever reads an index
            and has an attribute ``num_subnets`` will do; a critic that reads none is one subnetwork.

    Keyword Args:
        num_trained_subnets (int or None): K, critics trained in one update, drawn without replacement; their losses are summed.
            ``None``: all. Defaults to 1.
        num_target_subnets (int or None): M, target critics the minimum is taken over, drawn without replacement. ``None``: all.
            Defaults to 2.
        num_value_subnets (int or None): V, critics the actor is trained against. Defaults to ``None``, all.
        replacement (bool): draw the K, M and V indices independently, so that some may be equal; all (``None``) are all of
            them. A :class:`~omnet_torchrl.RedrawnMLP` needs it. Defaults to ``False``.
        value_reduction (str): the actor ascends the ``"mean"`` (default, equation 5) or, as TorchRL's SAC, the ``"min"`` over
            V.
        loss_function (str): of the critic. Defaults to ``"l2"``, the squared error of equation 4.
        target_entropy (float or str): of the policy, in nats. ``"auto"`` (default): minus the number of action dimensions, as
            in SACLoss, which is meant for actions in [-1, 1]; for others give ``log_prob_offset`` too.
        log_prob_offset (float): added to the log-probability of every action, in the targets, the actor's and the
            temperature's loss. 0 (default): of the action as the environment takes it, as in SACLoss.
            ``((space.high - space.low) / 2).log().sum()`` of the action's spec: of the action rescaled to [-1, 1], as REDQ and
            DroQ score it, and the training job. Where actions are in [-0.2, 0.2], SACLoss's soft value of a step is lower by
            1.6 times the temperature for each dimension, which a task whose episodes end feels as a price of living on.
        alpha_init, min_alpha, max_alpha, action_spec, fixed_alpha, delay_qvalue, separate_losses, reduction,
            use_prioritized_weights, scalar_output_mode: as in :class:`~torchrl.objectives.SACLoss`.
        skip_done_states (bool): feed zeros instead of the next observation where the next state is terminal, so that whatever
            stands there (NaN) has no effect. Defaults to ``False``.
        deactivate_vmap (bool): of the value estimator; the loss itself uses no vmap. Defaults to ``False``.

    Keys:
        Reads those of :class:`~torchrl.objectives.SACLoss`; writes ``td_error``, :math:`\max_K |Q - y|`. ``subnet`` is an
        accepted key (``set_keys(subnet=...)``) but no input: the index of the behaviour policy in a batch is ignored and left
        as it is.

    Returns:
        TensorDict: ``loss_qvalue``, ``loss_actor``, ``loss_alpha``, ``alpha``, ``entropy``.

    Raises:
        ValueError: K, M or V outside [1, N]; of more than 2^20 subnetworks all, or several without replacement; a module that
            reads the index without ``num_subnets``.

    .. note:: All randomness of an update is data, see :meth:`draw`. The parts, :meth:`qvalue_loss`, :meth:`actor_loss` and
        :meth:`alpha_loss`, are functions of (parameters, batch, draws): they trace with ``torch.compile(fullgraph=True)`` and
        run under ``torch.vmap``.

    .. note:: :class:`torch.nn.Dropout` in a network is replaced, in place, by :class:`~omnet_torchrl.SeededDropout`, whose
        noise the draws seed. Called outside the loss in training mode, it repeats one noise until you set another
        ``dropout_seed``. Other kinds of dropout (of channels, alpha) draw from torch's global generator, with a warning.

    .. note:: The target network has the online network's masks, always: its leaves that are not floating point are read from
        the online parameters at each call.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.objectives import SoftUpdate
        >>> from omnet_torchrl import make_actor, make_qvalue
        >>> env = GymEnv("Pendulum-v1")
        >>> kwargs = {"num_cells": (32, 32), "num_subnets": 5, "sparsity": [0.0, 0.5, 0.5]}
        >>> actor, qvalue = (make(env.observation_spec, env.action_spec, **kwargs) for make in (make_actor, make_qvalue))
        >>> loss = OMNetSACLoss(actor, qvalue)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> sorted(loss(env.rollout(8)).keys())
        ['alpha', 'entropy', 'loss_actor', 'loss_alpha', 'loss_qvalue']
    """

    @dataclass
    class _AcceptedKeys(SACLoss._AcceptedKeys):
        """Those of :class:`~torchrl.objectives.SACLoss`, and ``subnet``, where the modules read the index."""

        subnet: NestedKey = "subnet"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule,
        *,
        num_trained_subnets: int | None = 1,
        num_target_subnets: int | None = 2,
        num_value_subnets: int | None = None,
        replacement: bool = False,
        value_reduction: Literal["mean", "min"] = "mean",
        loss_function: str = "l2",
        alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        action_spec: TensorSpec | None = None,
        fixed_alpha: bool = False,
        target_entropy: float | Literal["auto"] = "auto",
        log_prob_offset: float = 0.0,
        delay_qvalue: bool = True,
        separate_losses: bool = False,
        reduction: Literal["none", "mean", "sum"] | None = None,
        skip_done_states: bool = False,
        deactivate_vmap: bool = False,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
        scalar_output_mode: Literal["exclude", "non_tensor"] | None = None,
    ):
        if not isinstance(qvalue_network, nn.Module):
            raise TypeError(
                "qvalue_network must be one module; separate critics are one module too: "
                f"SubnetQValueOperator(EnsembleMLP(..., num_subnets=2)). Got {type(qvalue_network).__name__}."
            )
        if value_reduction not in ("mean", "min"):
            raise ValueError(f"value_reduction must be 'mean' or 'min', got {value_reduction!r}.")
        for network in (actor_network, qvalue_network):
            seed_dropout(network)
        super().__init__(
            actor_network,
            qvalue_network,
            num_qvalue_nets=0,  # the critic is not expanded: what the index selects is its own affair
            loss_function=loss_function,
            alpha_init=alpha_init,
            min_alpha=min_alpha,
            max_alpha=max_alpha,
            action_spec=action_spec,
            fixed_alpha=fixed_alpha,
            target_entropy=target_entropy,
            delay_qvalue=delay_qvalue,
            separate_losses=separate_losses,
            reduction=reduction,
            skip_done_states=skip_done_states,
            deactivate_vmap=deactivate_vmap,
            use_prioritized_weights=use_prioritized_weights,
            scalar_output_mode=scalar_output_mode,
        )
        self.num_subnets = _num_subnets(qvalue_network, self.tensor_keys.subnet, "qvalue_network")
        self.num_actor_subnets = _num_subnets(actor_network, self.tensor_keys.subnet, "actor_network")
        self.replacement, self.value_reduction = replacement, value_reduction
        self.log_prob_offset = float(log_prob_offset)
        self.num_trained_subnets = self._checked_count("num_trained_subnets", num_trained_subnets)
        self.num_target_subnets = self._checked_count("num_target_subnets", num_target_subnets)
        self.num_value_subnets = self._checked_count("num_value_subnets", num_value_subnets)
        counts = {"critic": num_trained_subnets, "target": num_target_subnets, "value": num_value_subnets}
        self._every = {name for name, count in counts.items() if count is None}
        self._mask_keys = [k for k, v in self.qvalue_network_params.items(True, True) if not v.is_floating_point()]
        networks = (self.actor_network_params, self.qvalue_network_params)
        self._seeded = any(key[-1] == SEED for params in networks for key in params.keys(True, True))
        # Made now rather than at first use, so that nothing is registered while tracing or missing from a state dict. Where
        # the action's spec is not known yet (a trainer may hand it over), the first use makes it or says what is missing.
        self.make_value_estimator()
        with contextlib.suppress(RuntimeError):
            self.target_entropy  # noqa: B018

    def _checked_count(self, name: str, count: int | None) -> int:
        if self.num_subnets > MANY and (count is None or (count != 1 and not self.replacement)):
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
            _num_subnets(getattr(self, name), self.tensor_keys.subnet, name)

    def reset_parameters_recursive(self) -> None:
        """Draw the networks anew; the target starts as the online critic again. Masks and temperature stay."""
        super().reset_parameters_recursive()
        if self.delay_qvalue:
            self.target_qvalue_network_params.data.update_(self.qvalue_network_params.data)

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> OMNetSACLoss:
        """As :meth:`~torchrl.objectives.LossModule.make_value_estimator`, on the device of the networks; returns the loss."""
        super().make_value_estimator(value_type, **{"device": self._default_device, **hyperparams})
        return self

    def draw(
        self,
        tensordict: TensorDictBase,
        generator: torch.Generator | None = None,
        *,
        num_updates: int | None = None,
        actor: Sequence[bool] | None = None,
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
            actor (sequence of bool or None): ``num_updates`` of them, whether an actor update belongs to each: ``noise`` of
                those without one is not drawn, and 0. ``None`` (default): to all.

        Returns:
            TensorDict: on the device of the parameters, without (further) batch size: the int64 indices ``critic (K,)``,
            ``target (M,)``, ``value (V,)``, ``next_actor ()``, ``actor ()``; and the standard-normal ``next_noise``, ``noise``
            of the next and the current action, of the action's shape (left out where the action is no tensor); where a network
            has dropout, ``dropout (5,)``, int64 seeds of its noise in the passes ``critic, target, value, next_actor, actor``
            (:class:`~omnet_torchrl.SeededDropout`). Replace any of them before you pass it on: indices of shape ``batch`` for
            the actors or ``(K, *batch)`` for the critics choose per element.

        Raises:
            ValueError: ``actor`` has another length than ``num_updates``.
        """
        if actor is not None and len(actor) != num_updates:
            raise ValueError(f"actor must have num_updates={num_updates} elements, got {len(actor)}.")
        device = self.log_alpha.device
        lead = () if num_updates is None else (num_updates,)
        source = {"generator": generator, "device": device}
        counts = {"critic": self.num_trained_subnets, "target": self.num_target_subnets, "value": self.num_value_subnets}
        draws = {
            name: draw_indices(
                self.num_subnets, count, lead=lead, replacement=self.replacement and name not in self._every, **source
            )
            for name, count in counts.items()
        }
        for name in ("next_actor", "actor"):
            draws[name] = draw_indices(self.num_actor_subnets, 1, lead=lead, **source).squeeze(-1)
        if self._seeded:
            draws["dropout"] = torch.randint(2**32, (*lead, len(PASSES)), **source)
        action = tensordict.get(self.tensor_keys.action)
        if isinstance(action, Tensor):
            shape, dtype = (*lead, *action.shape), self.log_alpha.dtype
            draws["next_noise"] = torch.randn(shape, **source, dtype=dtype)
            if actor is None:
                draws["noise"] = torch.randn(shape, **source, dtype=dtype)
            else:
                draws["noise"] = torch.zeros(shape, device=device, dtype=dtype)
                for row in (row for row, follows in enumerate(actor) if follows):
                    draws["noise"][row].normal_(generator=generator)
        return TensorDict(draws, batch_size=lead, device=device)

    @dispatch
    def forward(self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None) -> TensorDictBase:
        """All three losses of a batch, with :meth:`draw`'s draws unless they are given; writes the priority."""
        draws = self.draw(tensordict) if draws is None else draws
        loss_qvalue, qvalue_data = self.qvalue_loss(tensordict, draws=draws)
        loss_actor, actor_data = self.actor_loss(tensordict, draws=draws)
        loss_alpha = self._reduced(self.alpha_loss(actor_data["log_prob"]), tensordict)
        tensordict.set(self.tensor_keys.priority, qvalue_data["td_error"])
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_alpha": loss_alpha}
        scalars = {"alpha": self._alpha, "entropy": -actor_data["log_prob"].mean()}
        if self.reduction == "none":
            output = TensorDict(losses, batch_size=tensordict.batch_size)
            if self.scalar_output_mode == "non_tensor":
                for name, value in scalars.items():
                    output.set_non_tensor(name, value)
        else:
            output = TensorDict({**losses, **scalars})
        self._clear_weakrefs(
            tensordict, output, "actor_network_params", "qvalue_network_params", "target_qvalue_network_params"
        )
        return output

    def qvalue_loss(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Critic loss, the sum over the trained subnetworks (equation 4). Costs nothing of the actor's loss.

        Args:
            tensordict (TensorDictBase): a batch; it is not written to.

        Keyword Args:
            draws (TensorDictBase or None): see :meth:`draw`. ``None``: drawn here.
            params (TensorDictBase or None): parameters to use instead of the loss's own: any of ``actor_network_params``,
                ``qvalue_network_params``, ``target_qvalue_network_params``, ``log_alpha``, named as the attributes they stand
                for. Bounds of the temperature are applied to a given ``log_alpha``'s value; keeping it within is the caller's.

        Returns:
            tuple: the loss, reduced, and ``{"td_error": (*batch,), "target_value": (*batch,), "pred_value": (K, *batch)}``,
            detached.
        """
        draws = self.draw(tensordict) if draws is None else draws
        target = self.compute_target(tensordict, draws=draws, params=params)
        critic_params = self._params("qvalue_network_params", params)
        action = tensordict.get(self.tensor_keys.action)
        pred = self._qvalue(critic_params, tensordict, action, draws.get("critic"), dropout_seed(draws, "critic"))
        loss = distance_loss(pred, target.expand_as(pred), loss_function=self.loss_function).sum(0)
        pred = pred.detach()
        data = {"td_error": (pred - target).abs().amax(0), "target_value": target, "pred_value": pred}
        return self._reduced(loss, tensordict), data

    def actor_loss(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actor loss against the mean of the critic's subnetworks (equation 5); arguments as in :meth:`qvalue_loss`.

        Returns:
            tuple: the loss, reduced, and ``{"log_prob": (*batch,), "action": (*batch, action_dim)}``, detached.
        """
        draws = self.draw(tensordict) if draws is None else draws
        actor_params = self._params("actor_network_params", params)
        noise, seed = draws.get("noise", None), dropout_seed(draws, "actor")
        action, log_prob = self._act(actor_params, tensordict, draws.get("actor"), noise, seed)
        critic_params = self._params("qvalue_network_params", params).detach()
        qvalue = self._qvalue(critic_params, tensordict, action, draws.get("value"), dropout_seed(draws, "value"))
        qvalue = qvalue.mean(0) if self.value_reduction == "mean" else qvalue.amin(0)
        _check_log_prob(log_prob, qvalue)
        loss = self._temperature(params) * log_prob - qvalue
        return self._reduced(loss, tensordict), {"log_prob": log_prob.detach(), "action": action.detach()}

    def alpha_loss(self, log_prob: Tensor, *, params: TensorDictBase | None = None) -> Tensor:
        r"""Temperature loss :math:`-\log\alpha\,(\log\pi + \bar H)`, not reduced.

        Args:
            log_prob (Tensor): of :meth:`actor_loss`'s actions, ``(*batch,)``; detached here.

        Keyword Args:
            params (TensorDictBase or None): ``log_alpha`` to use instead of the loss's own.
        """
        return -self._params("log_alpha", params) * (log_prob.detach() + self.target_entropy)

    @torch.no_grad()
    def compute_target(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> Tensor:
        """Regression target of the critics, ``(*batch,)``: the value estimator's, of the soft value of the next state.

        Arguments as in :meth:`qvalue_loss`.
        """
        draws = self.draw(tensordict) if draws is None else draws
        tensordict = tensordict.copy()
        following = tensordict.get("next").copy()
        if self.skip_done_states:
            following = self._without_terminal(following)
        actor_params = self._params("actor_network_params", params)
        noise, seed = draws.get("next_noise", None), dropout_seed(draws, "next_actor")
        action, log_prob = self._act(actor_params, following, draws.get("next_actor"), noise, seed)
        target_params, seed = self._target_params(params), dropout_seed(draws, "target")
        value = self._qvalue(target_params, following, action, draws.get("target"), seed).amin(0)
        _check_log_prob(log_prob, value)
        value = value - self._temperature(params) * log_prob
        tensordict.set("next", following.set(self.value_estimator.tensor_keys.value, value.unsqueeze(-1)))
        return self.value_estimator.value_estimate(tensordict).squeeze(-1)

    qvalue_v2_loss = qvalue_loss  # SACLoss's name of it

    def _act(
        self,
        params: TensorDictBase,
        tensordict: TensorDictBase,
        subnet: Tensor,
        noise: Tensor | None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A reparametrised action of one actor subnetwork, and its log-probability, with the offset."""
        inputs = self._inputs(self.actor_network, tensordict, subnet)
        params = with_seed(params, seed)
        with set_exploration_type(ExplorationType.RANDOM), params.to_module(self.actor_network, preserve_module_state=False):
            action, log_prob = rsample_with_noise(self.actor_network.get_dist(inputs), noise)
        return action, log_prob + self.log_prob_offset if self.log_prob_offset else log_prob

    def _qvalue(
        self, params: TensorDictBase, tensordict: TensorDictBase, action: Any, subnet: Tensor, seed: Tensor | None = None
    ) -> Tensor:
        """Values of the asked critic subnetworks, ``(K, *batch)``."""
        batch = tensordict.batch_size
        params = with_seed(params, seed)
        if subnet.ndim <= 1:
            subnet = subnet.reshape(-1, *(1 for _ in batch))
        inputs = self._inputs(self.qvalue_network, tensordict, subnet).set(self.tensor_keys.action, action)
        with params.to_module(self.qvalue_network, preserve_module_state=False):
            value = self.qvalue_network(inputs).get(self.tensor_keys.state_action_value, None)
        if value is None:
            raise KeyError(
                f"the critic writes {self.qvalue_network.out_keys} and no {self.tensor_keys.state_action_value!r}: say which "
                "key is its value with loss.set_keys(state_action_value=...)."
            )
        value = value.squeeze(-1)
        # A critic that ignores the index answers without its dimension.
        return value.expand(subnet.shape[0], *batch)

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
        terminated = following.get(self.tensor_keys.terminated)
        for key in dict.fromkeys([*self.actor_network.in_keys, *self.qvalue_network.in_keys]):
            value = following.get(key, None)
            if isinstance(value, Tensor) and key != self.tensor_keys.subnet and value.is_floating_point():
                following.set(key, value.masked_fill(expand_as_right(terminated.squeeze(-1), value), 0.0))
        return following

    def _params(self, name: str, params: TensorDictBase | None) -> Any:
        given = None if params is None else params.get(name, None)
        return getattr(self, name) if given is None else given

    def _target_params(self, params: TensorDictBase | None) -> TensorDictBase:
        online = self._params("qvalue_network_params", params)
        if not self.delay_qvalue:
            return online.detach()
        target = self._params("target_qvalue_network_params", params)
        # Plain tensors: what is marked as a buffer can't be put back by a network that calls another one functionally.
        target = (target._param_td if isinstance(target, TensorDictParams) else target).detach()
        return target.update(online.select(*self._mask_keys)) if self._mask_keys else target

    def _temperature(self, params: TensorDictBase | None) -> Tensor:
        if params is None or params.get("log_alpha", None) is None:
            return self._alpha
        log_alpha = params.get("log_alpha").detach()
        if self.min_log_alpha is not None or self.max_log_alpha is not None:
            log_alpha = log_alpha.clamp(self.min_log_alpha, self.max_log_alpha)
        return log_alpha.exp()

    def _reduced(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        return self._reduce_loss(loss, tensordict=tensordict, weights=self._maybe_get_priority_weight(tensordict))


def _check_log_prob(log_prob: Tensor, value: Tensor) -> None:
    if log_prob.shape != value.shape:
        raise RuntimeError(
            f"the actor's log-probability must have the batch's shape {tuple(value.shape)}, as the critic's value, got "
            f"{tuple(log_prob.shape)}. Does the distribution sum over the action dimensions?"
        )


def _num_subnets(network: TensorDictModuleBase, subnet_key: NestedKey, name: str) -> int:
    """Number of subnetworks that a network says it has; 1 for one that reads no index."""
    answers = (getattr(module, "num_subnets", None) for module in network.modules())
    said = {answer for answer in answers if isinstance(answer, int)}
    if len(said) > 1:
        raise ValueError(f"the layers of {name} disagree on the number of subnetworks: {sorted(said)}.")
    if not said and subnet_key in network.in_keys:
        raise ValueError(f"{name} reads {subnet_key!r} but does not say of how many: its module needs num_subnets.")
    return said.pop() if said else 1
