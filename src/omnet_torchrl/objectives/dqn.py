r"""The DQN loss over subnetworks.

"OMNet can be easily applied to various deep reinforcement learning algorithms" (section 3.2 of
https://arxiv.org/abs/2310.14009); here to DQN ("Human-level control through deep reinforcement learning", Mnih et al., 2015).
With discrete actions there is no actor: a subnetwork that is drawn at reset acts greedily on its own values, which is
Bootstrapped DQN with masks for heads. One update draws indices :math:`i` (trained) and :math:`j_1, j_2` (target):

.. math::
    L_Q = \big(r + \gamma \min_{j \in \{j_1, j_2\}} Q_{\bar\theta_j}(s', a^*) - Q_{\theta_i}(s, a)\big)^2, \quad
    a^* = \arg\max_a Q_{\theta_i}(s', a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, square
from torchrl.data import TensorSpec
from torchrl.objectives import DQNLoss

from omnet_torchrl.layers import StructuredLinear
from omnet_torchrl.objectives.draws import dropout_seed
from omnet_torchrl.objectives.networks import check_shape, prepare_networks, refuse_arguments
from omnet_torchrl.objectives.subnet_loss import LossStep
from omnet_torchrl.objectives.td_loss import REDUCTIONS, TDLoss
from omnet_torchrl.specs import check_discrete_spec, one_spec

TARGETS = ("min", "mean", "subnet")


class OMNetDQNLoss(TDLoss, DQNLoss):
    r"""DQN loss of OMNet; DQN and its relatives are configurations of it.

    ===============================  ==========================  ============  ==========  ====================  ==========
    row                              network                     trained (K)   target (M)  ``target_reduction``  double
    ===============================  ==========================  ============  ==========  ====================  ==========
    OMNet (default)                  one masked network, N 5     1             2           ``"min"``             yes
    DQN, Double DQN                  1 network                   1             1           any                   no, yes
    Averaged DQN                     any                         1             all         ``"mean"``            no
    Maxmin DQN                       N separate networks         1             all         ``"min"``             no
    Bootstrapped DQN                 N networks or N masks       all           -           ``"subnet"``          no or yes
    ===============================  ==========================  ============  ==========  ====================  ==========

    Args:
        value_network (TensorDictModule): all action values, e.g. :class:`~omnet_torchrl.SubnetQValueActor` or, as one
            subnetwork, any :class:`~torchrl.modules.QValueActor`.

    Keyword Args:
        num_trained_subnets, num_target_subnets, replacement: as of :class:`~omnet_torchrl.OMNetSACLoss`.
        target_reduction (str): which values of the target network count in the next state: of each action the ``"min"``
            (default) or the ``"mean"`` of M, or, of each trained subnetwork, those of the same ``"subnet"``.
        double_dqn (bool): the action of the next state is the best one of the trained subnetwork (default); ``False``: of the
            values that count.
        loss_function (str): defaults to ``"l2"``.
        l1 (float): coefficient of the L1 norm of the hidden layers' weights, which is added to the loss: it learns a structure,
            see :func:`~omnet_torchrl.structures.l1_structure`. Defaults to 0.
        action_space (str, TensorSpec or None): ``"one-hot"``, ``"categorical"`` or a spec. ``None`` (default): the network's.
        **kwargs: ``delay_value``, ``reduction`` and ``use_prioritized_weights`` as in :class:`~torchrl.objectives.DQNLoss`.

    Keys:
        Reads those of :class:`~torchrl.objectives.DQNLoss`, and ``bootstrap_mask``, ``(*batch, N)``, where the batch has it:
        the weight of the transition in the loss of each subnetwork, drawn when the transition was stored (Bootstrapped DQN).
        Writes ``td_error``, :math:`\max_K (Q - y)^2`, ``(*batch,)``. ``subnet`` is an accepted key but no input.

    Returns:
        TensorDict: ``loss``.

    Raises:
        TypeError: actions that are not discrete; an argument of DQNLoss that this loss lacks.
        ValueError: as :class:`~omnet_torchrl.OMNetSACLoss`.

    .. note:: The notes of :class:`~omnet_torchrl.OMNetSACLoss` hold: all randomness of an update is data (:meth:`draw`), and
        masks are live. ``Update(loss, tau=1.0, target_update_interval=1_000)`` copies the network into its target at intervals.

    Examples:
        >>> from torchrl.data import OneHot, Unbounded
        >>> from torchrl.objectives import HardUpdate
        >>> from omnet_torchrl import make_qvalue_actor
        >>> loss = OMNetDQNLoss(make_qvalue_actor(Unbounded(4), OneHot(2), sparsity=[0, 0.5, 0.5]))
        >>> updater = HardUpdate(loss, value_network_update_interval=1_000)
        >>> loss.num_trained_subnets, loss.num_target_subnets
        (1, 2)
    """

    @dataclass
    class _AcceptedKeys(DQNLoss._AcceptedKeys):
        """Those of :class:`~torchrl.objectives.DQNLoss`, ``subnet``, the index, and ``bootstrap_mask``."""

        subnet: NestedKey = "subnet"
        bootstrap_mask: NestedKey = "bootstrap_mask"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _networks = ("value_network",)
    _actor_draws = _noise_draws = _delayed_noise_draws = ()
    _loss_key, _value_key = "loss", "action_value"
    _error = staticmethod(square)

    def __init__(
        self,
        value_network: TensorDictModule,
        *,
        num_trained_subnets: int | None = 1,
        num_target_subnets: int | Literal["auto"] | None = "auto",
        replacement: bool = False,
        target_reduction: Literal["min", "mean", "subnet"] = "min",
        double_dqn: bool = True,
        loss_function: str = "l2",
        l1: float = 0.0,
        action_space: str | TensorSpec | None = None,
        **kwargs: Any,
    ):
        refuse_arguments(OMNetDQNLoss, kwargs)
        if target_reduction not in TARGETS:
            raise ValueError(f"target_reduction must be one of {', '.join(map(repr, TARGETS))}, got {target_reduction!r}.")
        prepare_networks(value_network=value_network)
        if isinstance(action_space, TensorSpec):
            action_space = check_discrete_spec(one_spec(action_space, self.default_keys().action))
        elif action_space is None:
            action_space = getattr(value_network, "action_space", None)
            if action_space is None and self.default_keys().action_value not in value_network.out_keys:
                raise TypeError(
                    f"value_network must write the values of all actions, as SubnetQValueActor does, got "
                    f"{type(value_network).__name__}, which writes {value_network.out_keys}. With continuous actions there are "
                    "OMNetSACLoss and OMNetTD3Loss."
                )
        options = {"double_dqn": double_dqn, "loss_function": loss_function, "action_space": action_space, **kwargs}
        super().__init__(value_network, **options)
        if self.action_space not in ("one_hot", "categorical"):
            raise TypeError(f"the actions must be one-hot or categorical, got the action space {self.action_space!r}.")
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1 must be in [0, inf), got {l1}.")
        self.target_reduction, self.l1 = target_reduction, l1
        layers, named = dict(self.value_network.named_modules()), self.value_network_params.items(True, True)
        weights = [(name, each, layers[".".join(name[:-1])]) for name, each in named if name[-1] == "weight"]
        # Those of normalisations are vectors; of a structure, too.
        matrices = [name for name, each, layer in weights if each.ndim > 1 or isinstance(layer, StructuredLinear)]
        self._hidden = tuple(matrices[:-1])
        self._init_subnets(replacement, trained=num_trained_subnets, target=num_target_subnets)

    @property
    def optional_in_keys(self) -> list[NestedKey]:
        """As :attr:`SubnetLoss.optional_in_keys`, and the mask of each transition."""
        return [*super().optional_in_keys, self.tensor_keys.bootstrap_mask]

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> OMNetDQNLoss:
        """As :meth:`~torchrl.objectives.LossModule.make_value_estimator`; the values of next states are this loss's."""
        super().make_value_estimator(value_type, **{"value_network": None, **hyperparams})
        return self

    def steps(self) -> tuple[LossStep, ...]:
        """The one step of the value network, whose target network follows it."""
        return (self.critic_step(),)

    def qvalue_loss(
        self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None, params: TensorDictBase | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`TDLoss.qvalue_loss`, with the L1 norm of the hidden layers."""
        loss, data = super().qvalue_loss(tensordict, draws=draws, params=params)
        if self.l1:
            weights = self._params("value_network_params", params)
            loss = loss + self.l1 * sum(weights.get(name).abs().sum() for name in self._hidden)
        return loss, data

    @dispatch
    def forward(self, tensordict: TensorDictBase, *, draws: TensorDictBase | None = None) -> TensorDictBase:
        """The loss of a batch, with :meth:`draw`'s draws unless they are given; writes the priority."""
        loss, data = self.qvalue_loss(tensordict, draws=draws)
        tensordict.set(self.tensor_keys.priority, data["td_error"])
        output = TensorDict({"loss": loss})
        self._clear_weakrefs(tensordict, output, "value_network_params", "target_value_network_params")
        return output

    def _prediction(self, tensordict: TensorDictBase, draws: TensorDictBase, params: Any) -> Tensor:
        values = self.value(tensordict, None, draws.get("critic"), params=params, seed=dropout_seed(draws, "critic"))
        action = tensordict.get(self.tensor_keys.action)
        one_hot, batch = self.action_space == "one_hot", tensordict.batch_size
        if one_hot or action.numel() != batch.numel():
            check_shape(self.tensor_keys.action, action, values.shape[1:] if one_hot else batch)
        if one_hot:
            return (values * action.to(values.dtype)).sum(-1)
        index = action.reshape(*batch, 1)
        return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)

    def _next_value(self, following: TensorDictBase, draws: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        """The value of the next state; of several trained subnetworks whose target differs, one for each."""
        own = self.target_reduction == "subnet"
        target_params, seed = self._target_params("value_network", params), dropout_seed(draws, "target")
        values = self.value(following, None, draws.get("critic" if own else "target"), params=target_params, seed=seed)
        if not own:
            values = REDUCTIONS[self.target_reduction](values).unsqueeze(0)
        choosing = values
        if self.double_dqn:
            online, seed = self._params("value_network_params", params).detach(), dropout_seed(draws, "value")
            choosing = self.value(following, None, draws.get("critic"), params=online, seed=seed)
        value = values.expand_as(choosing).gather(-1, choosing.argmax(-1, keepdim=True)).squeeze(-1)
        return value.squeeze(0) if len(value) == 1 else value

    def _of_each(self, loss: Tensor, tensordict: TensorDictBase, subnet: Tensor) -> Tensor:
        """The losses under the mask of each transition."""
        mask = tensordict.get(self.tensor_keys.bootstrap_mask, None)
        if mask is None:
            return loss
        if subnet.ndim == 1:
            subnet = subnet.reshape(-1, *(1 for _ in tensordict.batch_size))
        return loss * mask.movedim(-1, 0).gather(0, subnet.expand_as(loss)).to(loss.dtype)
