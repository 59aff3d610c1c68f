"""What a loss over subnetworks checks of the networks that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from omnet_torchrl.layers.dropout import seed_dropout

# Arguments of TorchRL's losses that ours lack, and what takes their place.
EVERYWHERE = {
    "num_qvalue_nets": "the number of critics is the critic's: make_qvalue(..., network_class=EnsembleMLP, num_subnets=2)",
    "gamma": "call loss.make_value_estimator(gamma=...)",
    "priority_key": "call loss.set_keys(priority=...)",
}
ELSEWHERE = {
    "OMNetSACLoss": EVERYWHERE
    | {
        "value_network": "there is no separate state-value network: this is the version of SAC without one",
        "delay_actor": "targets are computed with the current actor",
        "delay_value": "there is no separate state-value network",
    },
}


def refuse_arguments(loss: str, given: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` at an argument of TorchRL's loss that ours lacks; it says what takes its place."""
    elsewhere = ELSEWHERE.get(loss, EVERYWHERE)
    for name in elsewhere.keys() & given.keys():
        raise TypeError(f"{loss} has no argument {name!r} of {loss.removeprefix('OMNet')}: {elsewhere[name]}.")


def prepare_networks(**networks: Any) -> None:
    """Check the networks of a loss before it is built, and make their dropout a function of a seed.

    Raises:
        TypeError: a network is no module, but a list of critics, as TorchRL's losses take.
    """
    for name, network in networks.items():
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"{name} must be one module; separate critics are one module too: "
                f"SubnetQValueOperator(EnsembleMLP(..., num_subnets=2)). Got {type(network).__name__}."
            )
        seed_dropout(network)


def count_subnets(network: TensorDictModuleBase, subnet_key: NestedKey, name: str) -> int:
    """Number of subnetworks that a network says it has; 1 for one that reads no index.

    Raises:
        ValueError: its layers disagree, or it reads the index and has no ``num_subnets``.
    """
    answers = (getattr(module, "num_subnets", None) for module in network.modules())
    said = {answer for answer in answers if isinstance(answer, int)}
    if len(said) > 1:
        raise ValueError(f"the layers of {name} disagree on the number of subnetworks: {sorted(said)}.")
    if not said and subnet_key in network.in_keys:
        raise ValueError(f"{name} reads {subnet_key!r} but does not say of how many: its module needs num_subnets.")
    return said.pop() if said else 1


def check_log_prob(log_prob: Tensor, value: Tensor) -> None:
    """Raise a ``RuntimeError`` unless there is a log-probability for each value."""
    if log_prob.shape != value.shape:
        raise RuntimeError(
            f"the actor's log-probability must have the batch's shape {tuple(value.shape)}, as the critic's value, got "
            f"{tuple(log_prob.shape)}. Does the distribution sum over the action dimensions?"
        )
