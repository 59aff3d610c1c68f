r"""Policies that are functions of the observation: TD3's actor, and DQN's, greedy on a subnetwork's action values.

Neither explores by itself. TorchRL's exploration modules follow it in a :class:`~tensordict.nn.TensorDictSequential`:
:class:`~torchrl.modules.AdditiveGaussianModule` after the first, :class:`~torchrl.modules.EGreedyModule` after the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, dispatch
from torch import nn
from torchrl.data import Composite, TensorSpec
from torchrl.modules import QValueActor, TanhModule

from omnet_torchrl.modules import SubnetActor, SubnetPolicy, call_indexed, get_num_subnets
from omnet_torchrl.specs import check_action_spec, check_discrete_spec

MAX_ASKED = 2**10  # subnetworks that one call may ask


class _IndexedSequential(SubnetPolicy):
    """A sequence of modules whose first one reads the index."""

    in_keys: list[NestedKey]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the output of the subnetwork that the index names."""
        return call_indexed(super().forward, self.num_subnets, self.in_keys, tensordict, *args, **kwargs)  # type: ignore[misc]


class SubnetDeterministicActor(_IndexedSequential, TensorDictSequential):
    r"""Deterministic policy of one subnetwork, :math:`\mu_{\phi_k}(s)`, squashed by tanh into the bounds of the action.

    Args:
        module (nn.Module): called as ``module(*inputs, subnet)`` and with an attribute ``num_subnets``; returns ``(*batch,
            action_dim)``, the action before squashing.
        action_spec (Bounded): the action's specification: continuous, with finite bounds.
        in_keys (sequence of NestedKey): the inputs, the index last. Defaults to ``["observation", "subnet"]``.
        action_key (NestedKey): defaults to ``"action"``.

    Keys:
        Written: the action, and ``param``, what it was before squashing.

    Raises:
        ValueError, TypeError, KeyError: as :class:`~omnet_torchrl.SubnetActor`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from omnet_torchrl import MaskedMLP
        >>> network = MaskedMLP(in_features=17, out_features=6, num_cells=[256, 256], generator=0)
        >>> actor = SubnetDeterministicActor(network, Bounded(-1, 1, (6,)))
        >>> td = TensorDict(observation=torch.zeros(32, 17), subnet=torch.randint(5, (32,)), batch_size=[32])
        >>> actor(td)["action"].shape
        torch.Size([32, 6])
    """

    def __init__(
        self,
        module: nn.Module,
        action_spec: TensorSpec,
        in_keys: Sequence[NestedKey] | None = None,
        action_key: NestedKey = "action",
    ):
        in_keys = ["observation", "subnet"] if in_keys is None else list(in_keys)
        spec, num_subnets = check_action_spec(action_spec), get_num_subnets(module)
        parameter = next(module.parameters(), None)
        if parameter is not None:  # the bounds, which each call reads, belong where the network is
            spec = spec.to(parameter.device)
        super().__init__(*_squashed(module, spec, in_keys, action_key))
        self.num_subnets, self.subnet_key, self.action_key = num_subnets, in_keys[-1], action_key
        self.spec = Composite({action_key: spec})

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the action of the subnetwork that the index names."""
        output = super().forward(tensordict, *args, **kwargs)
        size, expected = output.get("param").shape[-1], self.spec[self.action_key].shape[-1]
        if size != expected:
            raise ValueError(f"the actor's network must have action_dim={expected} outputs, got {size}.")
        return output

    def extract(self, subnet: int) -> TensorDictSequential:
        """Return subnetwork ``subnet`` as a plain policy that reads no index."""
        network, spec = self.module[0].module.extract(subnet), self.spec[self.action_key]
        return TensorDictSequential(*_squashed(network, spec, self.in_keys[:-1], self.action_key)).train(self.training)


class SubnetQValueActor(_IndexedSequential, QValueActor):
    r"""Greedy policy of one subnetwork, :math:`\arg\max_a Q_{\theta_k}(s, a)`, over discrete actions.

    Args:
        module (nn.Module): called as ``module(*inputs, subnet)`` and with an attribute ``num_subnets``; returns ``(*batch,
            num_actions)``.
        action_spec (OneHot or Categorical): the action's specification.
        in_keys (sequence of NestedKey): the inputs, the index last. Defaults to ``["observation", "subnet"]``.
        action_key (NestedKey): defaults to ``"action"``.

    Keys:
        Written: the action, ``action_value`` ``(*batch, num_actions)`` and ``chosen_action_value`` ``(*batch, 1)``.

    Raises:
        ValueError, TypeError, KeyError: as :class:`~omnet_torchrl.SubnetActor`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import OneHot
        >>> from omnet_torchrl import MaskedMLP
        >>> network = MaskedMLP(in_features=4, out_features=2, num_cells=[64], sparsity=[0.0, 0.5], generator=0)
        >>> actor = SubnetQValueActor(network, OneHot(2))
        >>> td = TensorDict(observation=torch.zeros(32, 4), subnet=torch.randint(5, (32,)), batch_size=[32])
        >>> actor(td)["action"].shape
        torch.Size([32, 2])
        >>> actor.mean_policy()(td.exclude("subnet"))["action_value"].shape
        torch.Size([32, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        action_spec: TensorSpec,
        in_keys: Sequence[NestedKey] | None = None,
        action_key: NestedKey = "action",
    ):
        in_keys = ["observation", "subnet"] if in_keys is None else list(in_keys)
        spec, num_subnets = check_discrete_spec(action_spec), get_num_subnets(module)
        super().__init__(TensorDictModule(module, in_keys, ["action_value"]), spec=spec, action_key=action_key)
        self.num_subnets, self.subnet_key, self.action_key = num_subnets, in_keys[-1], action_key

    def mean_policy(self) -> QValueActor:
        """Return the policy that is greedy on the mean of all subnetworks' values, e.g. for evaluation.

        It reads no index and has this actor's current weights, always.

        Raises:
            ValueError: there are too many subnetworks to ask all, as of a :class:`~omnet_torchrl.RedrawnMLP`.
        """
        if self.num_subnets > MAX_ASKED:
            raise ValueError(f"the mean is of at most {MAX_ASKED} subnetworks, got {self.num_subnets}: extract some of them.")
        module = _MeanValue(self.module[0])
        return QValueActor(module, spec=self.spec[self.action_key], action_key=self.action_key).train(self.training)

    def extract(self, subnet: int) -> QValueActor:
        """Return subnetwork ``subnet`` as a plain :class:`~torchrl.modules.QValueActor` that reads no index."""
        module = TensorDictModule(self.module[0].module.extract(subnet), self.in_keys[:-1], ["action_value"])
        return QValueActor(module, spec=self.spec[self.action_key], action_key=self.action_key).train(self.training)


class _MeanValue(TensorDictModuleBase):
    """The mean of all subnetworks' action values."""

    def __init__(self, network: TensorDictModule):
        super().__init__()
        self.network, self.in_keys, self.out_keys = network, network.in_keys[:-1], network.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = [tensordict.get(key) for key in self.in_keys]
        every = torch.arange(get_num_subnets(self.network.module), device=inputs[0].device)
        # One index for all of what is there, whatever the batch size says of it.
        values = torch.stack([self.network.module(*inputs, subnet) for subnet in every.unbind()])
        return tensordict.set(self.out_keys[0], values.mean(0))


def _squashed(
    module: nn.Module, spec: TensorSpec, in_keys: Sequence[NestedKey], action_key: NestedKey
) -> tuple[TensorDictModule, TanhModule]:
    tanh = TanhModule(in_keys=["param"], out_keys=[action_key], spec=Composite({action_key: spec}))
    return TensorDictModule(module, in_keys=list(in_keys), out_keys=["param"]), tanh


AnyActor = SubnetActor | SubnetDeterministicActor | SubnetQValueActor
