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
from dataclasses import dataclass
from typing import Any, Literal

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SACLoss

from omnet_torchrl.layers.dropout import with_seed
from omnet_torchrl.objectives.draws import dropout_seed, rsample_with_noise
from omnet_torchrl.objectives.networks import called_with, check_actor, check_log_prob, prepare_networks, refuse_arguments
from omnet_torchrl.objectives.subnet_loss import LossStep
from omnet_torchrl.objectives.td_loss import REDUCTIONS, TDLoss, check_reduction, of_tasks


class OMNetSACLoss(TDLoss, SACLoss):
    r"""SAC loss of OMNet; SAC, DroQ, REDQ and single-critic rows are configurations of it.

    =====================  =================================  ============  ==========  ===========
    row                    critic                             trained (K)   target (M)  value (V)
    =====================  =================================  ============  ==========  ===========
    OMNet (default)        one masked network, N 5            1             2           all
    SAC, DroQ              2 separate networks                all           2           all
    REDQ                   10 separate networks               all           2           all
    single critic          1 network                          1             1           all
    pathways               one masked network, a mask a task  the task's    the task's  the task's
    =====================  =================================  ============  ==========  ===========

    Args:
        actor_network (ProbabilisticTensorDictSequential): stochastic actor, e.g. :class:`~omnet_torchrl.SubnetActor`. An actor
            that reads no index is one subnetwork.
        qvalue_network (TensorDictModule): critic, e.g. :class:`~omnet_torchrl.SubnetQValueOperator`. Whatever reads an index
            and has an attribute ``num_subnets`` will do; a critic that reads none is one subnetwork.

    Keyword Args:
        num_trained_subnets (int or None): K, critics trained in one update, drawn without replacement; their losses are summed.
            ``None``: all. Defaults to 1.
        num_target_subnets (int, str or None): M, target critics the minimum is taken over, drawn without replacement. ``None``:
            all. ``"auto"`` (default): 2, or 1 where the critic is one network.
        num_value_subnets (int or None): V, critics the actor is trained against. Defaults to ``None``, all.
        replacement (bool): draw the K, M and V indices independently, so that some may be equal; all (``None``) are all of
            them. A :class:`~omnet_torchrl.RedrawnMLP` needs it. Defaults to ``False``.
        choose (str): ``"uniform"`` (default): indices are drawn. ``"batch"``: the batch's ``subnet`` is the task of each
            transition, as :class:`~omnet_torchrl.TasksEnv` and ``SubnetPrimer(T, fixed=torch.arange(T))`` write it: task t
            has the actor's subnetwork t and, of C times as many of the critic, those from Ct to Ct + C - 1, its C critics
            (2t and 2t + 1 of 2T). All C are trained, minimised over and averaged: leave K, M and V out. A batch is ``(T, B)``
            with one task in each row, and its losses are the sums of the tasks'; or ``(B,)`` with any tasks, which is slower.
            Each task has a temperature of its own, ``log_alpha (T,)``. To scale the rewards of tasks, append TorchRL's
            ``RewardScaling(0.0, scale[:, None])`` to the environment.
        value_reduction (str): the actor ascends the ``"mean"`` (default, equation 5), the ``"min"``, as TorchRL's SAC does, or
            the ``"first"`` of V.
        loss_function (str): of the critic. Defaults to ``"l2"``, the squared error of equation 4.
        target_entropy (float or str): of the policy, in nats. ``"auto"`` (default): minus the number of action dimensions, as
            in SACLoss, which is meant for actions in [-1, 1]; for others give ``log_prob_offset`` too.
        log_prob_offset (float): added to the log-probability of every action, in the targets, the actor's and the
            temperature's loss. 0 (default): of the action as the environment takes it, as in SACLoss.
            ``((space.high - space.low) / 2).log().sum()`` of the action's spec: of the action rescaled to [-1, 1], as REDQ and
            DroQ score it, and the training job. Where actions are in [-0.2, 0.2], SACLoss's soft value of a step is lower by
            1.6 times the temperature for each dimension, which a task whose episodes end feels as a price of living on.
        **kwargs: ``alpha_init``, ``min_alpha``, ``max_alpha``, ``action_spec``, ``fixed_alpha``, ``delay_qvalue``,
            ``separate_losses``, ``reduction``, ``use_prioritized_weights``, ``scalar_output_mode`` and ``deactivate_vmap`` as
            in :class:`~torchrl.objectives.SACLoss`; ``skip_done_states`` feeds zeros instead of the next observation where the
            next state is terminal, so that whatever stands there (NaN) has no effect.

    Keys:
        Reads those of :class:`~torchrl.objectives.SACLoss`; writes ``td_error``, :math:`\max_K |Q - y|`. ``subnet`` is an
        accepted key (``set_keys(subnet=...)``) but no input: the index of the behaviour policy in a batch is ignored and left
        as it is.

    Returns:
        TensorDict: ``loss_qvalue``, ``loss_actor``, ``loss_alpha``, ``alpha``, ``entropy``.

    Raises:
        ValueError: K, M or V outside [1, N], or given with ``choose="batch"``, or critics that can't be shared out to the
            tasks; of more than 2^20 subnetworks all, or several without replacement; a module that
            reads the index without ``num_subnets``.
        TypeError: an argument of SACLoss that this loss lacks; the message says what takes its place.

    .. note:: All randomness of an update is data, see :meth:`draw`. The parts, :meth:`qvalue_loss`, :meth:`actor_loss` and
        :meth:`alpha_loss`, are functions of (parameters, batch, draws): they trace with ``torch.compile(fullgraph=True)`` and
        run under ``torch.vmap``.

    .. note:: :class:`torch.nn.Dropout` in a network is replaced, in place, by :class:`~omnet_torchrl.SeededDropout`, whose
        noise the draws seed. Called outside the loss in training mode, it repeats one noise until you set another
        ``dropout_seed``. Other kinds of dropout (of channels, alpha) draw from torch's global generator, with a warning.

    .. note:: Masks are live: whoever writes the masks of a network in place changes the next call. The target network has the
        online network's masks, always: its buffers are read from the online parameters.

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
    _unread_settings = (*TDLoss._unread_settings, "alpha_init")

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule,
        *,
        num_trained_subnets: int | None = 1,
        num_target_subnets: int | Literal["auto"] | None = "auto",
        num_value_subnets: int | None = None,
        replacement: bool = False,
        choose: Literal["uniform", "batch"] = "uniform",
        value_reduction: Literal["mean", "min", "first"] = "mean",
        loss_function: str = "l2",
        target_entropy: float | Literal["auto"] = "auto",
        log_prob_offset: float = 0.0,
        **kwargs: Any,
    ):
        refuse_arguments(OMNetSACLoss, kwargs)
        check_reduction(value_reduction)
        prepare_networks(actor_network=actor_network, qvalue_network=qvalue_network)
        check_actor(actor_network, qvalue_network, stochastic=True)
        # num_qvalue_nets=0: the critic is not expanded, what the index selects is its own affair.
        options = {"num_qvalue_nets": 0, "loss_function": loss_function, "target_entropy": target_entropy, **kwargs}
        super().__init__(actor_network, qvalue_network, **options)
        self.value_reduction, self.log_prob_offset = value_reduction, float(log_prob_offset)
        counts = {"trained": num_trained_subnets, "target": num_target_subnets, "value": num_value_subnets}
        self._init_subnets(replacement, choose, **counts)
        if choose == "batch":  # a temperature for each task
            self.log_alpha.data = self.log_alpha.data.repeat(self.num_actor_subnets)
        # Registered now rather than at first use, while tracing. Where the action's spec is not known yet (a trainer may hand
        # it over), the first use makes it or says what is missing.
        with contextlib.suppress(RuntimeError):
            self.target_entropy  # noqa: B018

    def steps(self) -> tuple[LossStep, ...]:
        """The critic's step, and the delayed one of actor and temperature."""
        temperature = () if self.fixed_alpha else ("log_alpha",)
        return (
            self.critic_step(),
            LossStep(
                "actor", ("actor_network_params", *temperature), self._actor_objective, delayed=True, after=self._bound_alpha
            ),
        )

    def reset(self) -> None:
        """As :meth:`~omnet_torchrl.objectives.SubnetLoss.reset`; the temperature is ``alpha_init`` again."""
        super().reset()
        self.log_alpha.data.copy_(self.alpha_init.log())

    def parameter_groups(self) -> dict[str, Any]:
        """The networks, their targets, and ``log_alpha``."""
        return {**super().parameter_groups(), "log_alpha": self.log_alpha}

    @dispatch
    def forward(self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None) -> TensorDictBase:
        """All three losses of a batch, with :meth:`draw`'s draws unless they are given; writes the priority."""
        draws = self.drawn(tensordict, draws)
        loss_qvalue, qvalue_data = self.qvalue_loss(tensordict, draws=draws)
        loss_actor, actor_data = self.actor_loss(tensordict, draws=draws)
        loss_alpha = self._reduced(self.alpha_loss(actor_data["log_prob"], subnet=draws.get("actor")), tensordict)
        tensordict.set(self.tensor_keys.priority, qvalue_data["td_error"])
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_alpha": loss_alpha}
        scalars = {"alpha": self._alpha.mean(), "entropy": -actor_data["log_prob"].mean()}
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

    def actor_loss(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actor loss against the mean of the critic's subnetworks (equation 5); arguments as in :meth:`qvalue_loss`.

        Returns:
            tuple: the loss, reduced, and ``{"log_prob": (*batch,), "action": (*batch, action_dim)}``, detached.
        """
        draws = self.drawn(tensordict, draws)
        actor_params = self._params("actor_network_params", params)
        options = {"noise": draws.get("noise", None), "seed": dropout_seed(draws, "actor"), "params": actor_params}
        action, log_prob = self.act(tensordict, draws.get("actor"), **options)
        qvalue = REDUCTIONS[self.value_reduction](self._value_of_policy(tensordict, action, draws, params))
        check_log_prob(log_prob, qvalue)
        loss = self._temperature(params, draws.get("actor")) * log_prob - qvalue
        data = {"log_prob": log_prob.detach(), "action": action.detach()}
        return self._reduced(loss, tensordict), data | self._logged(tensordict, loss_actor=loss, entropy=-log_prob)

    def alpha_loss(self, log_prob: Tensor, *, params: TensorDictBase | None = None, subnet: Tensor | None = None) -> Tensor:
        r"""Temperature loss :math:`-\log\alpha\,(\log\pi + \bar H)`, not reduced.

        Args:
            log_prob (Tensor): of :meth:`actor_loss`'s actions, ``(*batch,)``; detached here.

        Keyword Args:
            params (TensorDictBase or None): ``log_alpha`` to use instead of the loss's own.
            subnet (Tensor or None): with ``choose="batch"``, the task of each, which has a temperature of its own.
        """
        log_alpha = self._params("log_alpha", params)
        log_alpha = log_alpha if self.choose == "uniform" or subnet is None else log_alpha[subnet]
        return -log_alpha * (log_prob.detach() + self.target_entropy)

    def _next_value(self, following: TensorDictBase, draws: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """The soft value of the next state, with the minimum over the target subnetworks (equation 4)."""
        actor_params = self._params("actor_network_params", params)
        options = {"noise": draws.get("next_noise", None), "seed": dropout_seed(draws, "next_actor"), "params": actor_params}
        action, log_prob = self.act(following, draws.get("next_actor"), **options)
        target_params, seed = self._target_params("qvalue_network", params), dropout_seed(draws, "target")
        value = self.value(following, action, draws.get("target"), params=target_params, seed=seed).amin(0)
        check_log_prob(log_prob, value)
        return value - self._temperature(params, draws.get("next_actor")) * log_prob

    qvalue_v2_loss = TDLoss.qvalue_loss  # SACLoss's name of it

    def act(
        self,
        tensordict: TensorDictBase,
        subnet: Tensor,
        *,
        noise: Tensor | None = None,
        params: TensorDictBase | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A reparametrised random action of one actor subnetwork, and its log-probability, ``log_prob_offset`` included.

        Args:
            tensordict (TensorDictBase): of batch size ``batch``, with the actor's inputs. It is not written to.
            subnet (Tensor): int64, ``()``; or ``batch``, which chooses for each element.

        Keyword Args:
            noise (Tensor or None): standard normal, of the action's shape. ``None``: drawn from torch's global generator.
            params (TensorDictBase or None): of the actor. ``None``: the loss's own, ``actor_network_params``.
            seed (Tensor or None): of the noise of dropout, if the actor has it. ``None``: the seed that is set.

        Returns:
            tuple: action ``(*batch, action_dim)`` and log-probability ``(*batch,)``.
        """
        inputs = self._inputs(self.actor_network, tensordict, subnet)
        params = with_seed(self.actor_network_params if params is None else params, seed)
        with set_exploration_type(ExplorationType.RANDOM), called_with(self.actor_network, params, inputs=inputs):
            action, log_prob = rsample_with_noise(self.actor_network.get_dist(inputs), noise, self.tensor_keys.action)
        return action, log_prob + self.log_prob_offset if self.log_prob_offset else log_prob

    def _actor_objective(
        self, batch: TensorDictBase, draws: TensorDictBase, params: TensorDictBase
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss_actor, data = self.actor_loss(batch, draws=draws, params=params)
        task = self.drawn(batch, draws).get("actor")
        loss_alpha = self._reduced(self.alpha_loss(data["log_prob"], params=params, subnet=task), batch)
        outputs = {"loss_actor": loss_actor.detach(), "loss_alpha": loss_alpha.detach(), "entropy": -data["log_prob"].mean()}
        return loss_actor + loss_alpha, outputs | of_tasks(data)

    def _bound_alpha(self, params: TensorDictBase) -> dict[str, Tensor]:
        log_alpha = params.get("log_alpha")
        if self.min_log_alpha is not None or self.max_log_alpha is not None:
            log_alpha.clamp_(self.min_log_alpha, self.max_log_alpha)
        alpha = log_alpha.exp()
        return {"alpha": alpha} if self.choose == "uniform" else {"alpha": alpha.mean(), "alpha_task": alpha}

    def _temperature(self, params: TensorDictBase | None, subnet: Tensor) -> Tensor:
        if params is None or params.get("log_alpha", None) is None:
            alpha = self._alpha
        else:
            log_alpha = params.get("log_alpha").detach()
            if self.min_log_alpha is not None or self.max_log_alpha is not None:
                log_alpha = log_alpha.clamp(self.min_log_alpha, self.max_log_alpha)
            alpha = log_alpha.exp()
        return alpha if self.choose == "uniform" else alpha[subnet]
