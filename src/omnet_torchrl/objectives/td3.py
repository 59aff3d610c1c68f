r"""The TD3 loss over subnetworks.

Equations 4 and 5 of "One is More: Diverse Perspectives within a Single Network for Efficient DRL" (2023,
https://arxiv.org/abs/2310.14009) over TD3 ("Addressing Function Approximation Error in Actor-Critic Methods", Fujimoto et al.,
2018, https://arxiv.org/abs/1802.09477). One update draws indices :math:`i` (trained), :math:`j_1, j_2` (target),
:math:`i', i''` (actor) and the noise :math:`\epsilon` that smooths the target policy:

.. math::
    L_Q &= \big(r + \gamma \min_{j \in \{j_1, j_2\}} Q_{\bar\theta_j}(s', a') - Q_{\theta_i}(s, a)\big)^2, &
    a' &= \mathrm{clip}\big(\mu_{\bar\phi_{i''}}(s') + \mathrm{clip}(\sigma\epsilon, -c, c)\big) \\
    L_\mu &= -\tfrac1N \textstyle\sum_k Q_{\theta_k}(s, \mu_{\phi_{i'}}(s))

On a fixed dataset, TD3+BC ("A Minimalist Approach to Offline Reinforcement Learning", Fujimoto and Gu, 2021,
https://arxiv.org/abs/2106.06860, equation 5) keeps the actor near the data:

.. math::
    L_\mu = -\lambda\, Q(s, \mu(s)) + \big(\mu(s) - a\big)^2, \qquad \lambda = \alpha \,/\, \mathrm{mean}_B |Q(s, \mu(s))|
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.objectives import TD3Loss

from omnet_torchrl.objectives.draws import dropout_seed
from omnet_torchrl.objectives.networks import check_actor, check_shape, prepare_networks, refuse_arguments
from omnet_torchrl.objectives.subnet_loss import LossStep
from omnet_torchrl.objectives.td_loss import REDUCTIONS, TDLoss, check_reduction, of_tasks
from omnet_torchrl.specs import check_action_spec, one_spec


class OMNetTD3Loss(TDLoss, TD3Loss):
    r"""TD3 loss of OMNet; TD3, its REDQ-style variant and TD3 with a single critic are configurations of it.

    =====================  =================================  ============  ==========  ===========
    row                    critic                             trained (K)   target (M)  value (V)
    =====================  =================================  ============  ==========  ===========
    OMNet (default)        one masked network, N 5            1             2           all
    TD3                    2 separate networks                all           2           all, "first"
    REDQ-style             10 separate networks               all           2           all
    single critic          1 network                          1             1           all
    pathways               one masked network, a mask a task  the task's    the task's  the task's
    =====================  =================================  ============  ==========  ===========

    Args:
        actor_network (TensorDictModule): deterministic actor, e.g. :class:`~omnet_torchrl.SubnetDeterministicActor`. An actor
            that reads no index is one subnetwork.
        qvalue_network (TensorDictModule): critic, as of :class:`~omnet_torchrl.OMNetSACLoss`.

    Keyword Args:
        num_trained_subnets, num_target_subnets, num_value_subnets, replacement, choose: as of
            :class:`~omnet_torchrl.OMNetSACLoss`.
        value_reduction (str): the actor ascends the ``"mean"`` (default, equation 5), the ``"min"`` or, as TorchRL's TD3 with
            two critics, the ``"first"`` of V.
        bc (float or None): :math:`\alpha` of TD3+BC, positive; 2.5 in its paper, whose actor ascends the ``"first"``. The mean
            of :math:`|Q|` is over the batch, of several tasks over each task's row. The squared distance is of the action as
            the environment takes it, its mean over the dimensions. ``None`` (default): TD3, without the data's actions.
        loss_function (str): of the critic. Defaults to ``"l2"``, the squared error of equation 4 and of TD3; TD3Loss's default
            is ``"smooth_l1"``.
        action_spec (TensorSpec or None): of the action, whose bounds the smoothed target action keeps. ``None`` (default):
            ``bounds``, or the actor's ``spec``.
        **kwargs: ``bounds``, ``policy_noise`` (0.2), ``noise_clip`` (0.5), ``delay_actor``, ``delay_qvalue``,
            ``separate_losses``, ``reduction``, ``deactivate_vmap`` and ``use_prioritized_weights`` as in
            :class:`~torchrl.objectives.TD3Loss`.

    Keys:
        Reads those of :class:`~torchrl.objectives.TD3Loss`; writes ``td_error``, :math:`\max_K (Q - y)^2`, as TD3Loss does.
        ``subnet`` is an accepted key but no input, as in :class:`~omnet_torchrl.OMNetSACLoss`.

    Returns:
        TensorDict: ``loss_actor``, ``loss_qvalue``, ``pred_value``, ``state_action_value_actor``, ``next_state_value``,
        ``target_value``; with ``bc``, ``bc_loss``, the mean squared distance.

    Raises:
        TypeError: actions that are not continuous with finite bounds; an argument of TD3Loss that this loss lacks.
        ValueError: as :class:`~omnet_torchrl.OMNetSACLoss`; no bounds of the action are known; ``bc`` is not positive.

    .. note:: The notes of :class:`~omnet_torchrl.OMNetSACLoss` hold: all randomness of an update is data (:meth:`draw`), and
        masks are live, those of the target actor too.

    .. note:: In an :class:`~omnet_torchrl.Update`, the actor and its target move in every ``policy_update_delay``-th update (2
        in TD3's paper). The critic's target moves after each critic step; with ``target_update_interval=2`` as seldom as there.

    Examples:
        >>> from torchrl.data import Bounded, Unbounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from omnet_torchrl import make_deterministic_actor, make_qvalue
        >>> specs = Unbounded(11), Bounded(-1, 1, (3,))
        >>> loss = OMNetTD3Loss(make_deterministic_actor(*specs), make_qvalue(*specs))
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> loss.num_trained_subnets, loss.num_target_subnets, loss.num_value_subnets
        (1, 2, 5)
    """

    @dataclass
    class _AcceptedKeys(TD3Loss._AcceptedKeys):
        """Those of :class:`~torchrl.objectives.TD3Loss`, and ``subnet``, where the modules read the index."""

        subnet: NestedKey = "subnet"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _noise_draws = ("next_noise",)
    _delayed_noise_draws = ()
    _error = staticmethod(torch.square)

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule,
        *,
        num_trained_subnets: int | None = 1,
        num_target_subnets: int | Literal["auto"] | None = "auto",
        num_value_subnets: int | None = None,
        replacement: bool = False,
        choose: Literal["uniform", "batch"] = "uniform",
        value_reduction: Literal["mean", "min", "first"] = "mean",
        bc: float | None = None,
        loss_function: str = "l2",
        action_spec: TensorSpec | None = None,
        **kwargs: Any,
    ):
        refuse_arguments(OMNetTD3Loss, kwargs)
        check_reduction(value_reduction)
        if bc is not None and not 0 < bc < math.inf:
            raise ValueError(f"bc must be a positive number, or None for TD3 without the data's actions, got {bc}.")
        prepare_networks(actor_network=actor_network, qvalue_network=qvalue_network)
        check_actor(actor_network, qvalue_network, stochastic=False)
        if action_spec is None and kwargs.get("bounds") is None:
            action_spec = getattr(actor_network, "spec", None)
            if action_spec is None:
                raise ValueError("the actor has no spec with the bounds of the action: give action_spec or bounds.")
        if action_spec is not None:
            action_spec = check_action_spec(one_spec(action_spec, self.default_keys().action))
        options = {"num_qvalue_nets": 0, "loss_function": loss_function, "action_spec": action_spec, **kwargs}
        super().__init__(actor_network, qvalue_network, **options)
        self.value_reduction, self.bc = value_reduction, bc
        counts = {"trained": num_trained_subnets, "target": num_target_subnets, "value": num_value_subnets}
        self._init_subnets(replacement, choose, **counts)

    def steps(self) -> tuple[LossStep, ...]:
        """The critic's step, and the delayed one of the actor, whose target network follows it."""
        actor = ("actor_network_params",)
        targets = actor if self.delay_actor else ()
        return self.critic_step(), LossStep("actor", actor, self._actor_objective, targets=targets, delayed=True)

    @dispatch
    def forward(self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None) -> TensorDictBase:
        """Both losses of a batch, with :meth:`draw`'s draws unless they are given; writes the priority."""
        draws = self.drawn(tensordict, draws)
        loss_qvalue, critic = self.qvalue_loss(tensordict, draws=draws)
        loss_actor, actor = self.actor_loss(tensordict, draws=draws)
        tensordict.set(self.tensor_keys.priority, critic.pop("td_error"))
        data = {name: value for name, value in {**actor, **critic}.items() if not name.endswith("_task")}
        output = TensorDict({"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, **data})
        names = [name for name in self.parameter_groups() if name.endswith("_params")]
        self._clear_weakrefs(tensordict, output, *names)
        return output

    def actor_loss(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actor loss against the mean of the critic's subnetworks (equation 5); arguments as in :meth:`qvalue_loss`.

        Returns:
            tuple: the loss, reduced, and ``{"state_action_value_actor": (V, *batch)}``, detached; with ``bc``, also
            ``bc_loss``; of several tasks, ``loss_actor_task (T,)`` and ``bc_loss_task``.
        """
        draws = self.drawn(tensordict, draws)
        options = {"params": self._params("actor_network_params", params), "seed": dropout_seed(draws, "actor")}
        action = self.deterministic_action(tensordict, draws.get("actor"), **options)
        qvalue = self._value_of_policy(tensordict, action, draws, params)
        value, data = REDUCTIONS[self.value_reduction](qvalue), {"state_action_value_actor": qvalue.detach()}
        if self.bc is None:
            loss, own = -value, {"loss_actor": -value}
        else:
            # A row is of one task; without tasks, the batch is the row.
            size = value.detach().abs().mean(-1 if self.choose == "batch" else None, keepdim=True)
            distance = (action - tensordict.get(self.tensor_keys.action)).square().mean(-1)
            loss = distance - self.bc / size.clamp_min(torch.finfo(size.dtype).tiny) * value
            own, data["bc_loss"] = {"loss_actor": loss, "bc_loss": distance}, distance.detach().mean()
        return self._reduced(loss, tensordict), data | self._logged(tensordict, **own)

    value_loss = TDLoss.qvalue_loss  # TD3Loss's name of it

    def _next_value(self, following: TensorDictBase, draws: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """The minimum over the target subnetworks, of the smoothed action of the target actor."""
        options = {"params": self._target_params("actor_network", params), "seed": dropout_seed(draws, "next_actor")}
        action = self.deterministic_action(following, draws.get("next_actor"), **options)
        noise = draws.get("next_noise")  # of the shape of the batch's action
        check_shape(self.tensor_keys.action, noise, (*noise.shape[:-1], action.shape[-1]))
        noise = (noise.to(action.dtype) * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        action = (action + noise).clamp(self.min_action, self.max_action)
        target_params, seed = self._target_params("qvalue_network", params), dropout_seed(draws, "target")
        return self.value(following, action, draws.get("target"), params=target_params, seed=seed).amin(0)

    def _actor_objective(
        self, batch: TensorDictBase, draws: TensorDictBase, params: TensorDictBase
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, data = self.actor_loss(batch, draws=draws, params=params)
        cloned = {} if self.bc is None else {"bc_loss": data["bc_loss"]}
        return loss, {"loss_actor": loss.detach(), **cloned, **of_tasks(data)}
