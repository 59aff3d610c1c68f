"""What the options of a run build: the arguments of networks and loss."""

from __future__ import annotations

from typing import Any

from omnet_torchrl.layers import MaskedMLP
from omnet_torchrl.training.options import NetworkConfig, TrainConfig
from omnet_torchrl.units import UnitMaskedMLP

# Target entropies that REDQ published for the paper's tasks, in nats.
TARGET_ENTROPY = {"Hopper-v4": -1.0, "Walker2d-v4": -3.0, "Ant-v4": -4.0, "Humanoid-v4": -2.0}


def target_entropy(config: TrainConfig, action_dim: int) -> float:
    """The entropy that the temperature aims at, in nats."""
    given = config.loss.target_entropy
    return TARGET_ENTROPY.get(config.env, -float(action_dim)) if given is None else given


def network_sparsity(network: NetworkConfig) -> float | list[float]:
    """The argument ``sparsity`` of the networks, with ``dense_input`` and ``dense_output`` applied."""
    if not (network.dense_input or network.dense_output):
        return network.sparsity
    layers = [float(network.sparsity)] * (len(network.num_cells) + 1)
    layers[0] *= not network.dense_input
    layers[-1] *= not network.dense_output
    return layers


def network_options(config: TrainConfig, role: str) -> dict[str, Any]:
    """The arguments of :func:`~omnet_torchrl.make_actor` (``role="actor"``) and ``make_qvalue`` (``"critic"``)."""
    network = config.network
    weight = {"network_class": MaskedMLP, "mask_bias": network.mask_bias}
    return {
        **(weight if network.masks == "weight" else {"network_class": UnitMaskedMLP}),
        "num_subnets": network.num_subnets,
        "sparsity": network_sparsity(network),
        "num_cells": network.num_cells,
        "layer_norm": getattr(network, f"{role}_layer_norm"),
    }
