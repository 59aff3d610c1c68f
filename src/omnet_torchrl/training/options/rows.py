"""The rows of the results table, as data.

A row is the options that differ from the defaults, which are OMNet's. All rows go through the same networks with an index, the
same update and loop; what tells them apart is the loss, which critics there are, and which of them an update asks
(:class:`~omnet_torchrl.OMNetSACLoss`, :class:`~omnet_torchrl.OMNetTD3Loss`, :class:`~omnet_torchrl.OMNetDQNLoss`). Section 4.1
of https://arxiv.org/abs/2310.14009, figures 2 and 4, the controls with LayerNorm that the paper lacks, and TD3 and DQN.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from omnet_torchrl.training.options.options import NetworkConfig, TrainConfig

# Target entropies that REDQ published for the paper's tasks, in nats, of actions rescaled to [-1, 1] (its code scores them so).
TARGET_ENTROPY = {"Hopper-v4": -1.0, "Walker2d-v4": -3.0, "Ant-v4": -4.0, "Humanoid-v4": -2.0}
DROPOUT = 0.01  # for a task that table 1 does not have


@dataclass(frozen=True)
class Row:
    """One method of the results table.

    Args:
        label (str): its name in figures.
        options (dict): what differs from the defaults, nested as in :class:`~omnet_torchrl.training.options.TrainConfig`.
        dropout (dict): task to the value of ``network.dropout=null``.
        entropy_per_action (float or None): the target entropy is this times the action's dimensions. ``None``: REDQ's values.
        loss (str): ``"sac"`` (default), ``"td3"`` or ``"dqn"``; ``"tasks"``: SAC whose subnetworks are tasks.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    dropout: dict[str, float] = field(default_factory=dict)
    entropy_per_action: float | None = None
    loss: str = "sac"


def _separate(critics: int, layer_norm: bool = False, num_target_subnets: int | None = None, **options: Any) -> dict[str, Any]:
    """Options of a row without masks: separate critics, all trained, and a dense actor."""
    network = {"critic": "separate", "actor": "dense", "num_subnets": critics, "sparsity": 0.0, **options.pop("network", {})}
    norms = {"critic_layer_norm": layer_norm, "actor_layer_norm": layer_norm}
    loss = {"num_trained_subnets": None, "num_target_subnets": num_target_subnets, **options.pop("loss", {})}
    return {"network": {**norms, **network}, "loss": loss, **options}


_DROPOUT = {"dropout": None, "critic_layer_norm": True}  # Linear, Dropout, LayerNorm, ReLU
_TABLE_1 = {
    "droq": {"Hopper-v4": 0.001, "Walker2d-v4": 0.003, "Ant-v4": 0.01, "Humanoid-v4": 0.03},
    "sin_droq": {"Hopper-v4": 0.001, "Walker2d-v4": 0.01, "Ant-v4": 0.1, "Humanoid-v4": 0.01},
}

ROWS = {
    "omnet": Row("OMNet"),
    "omnet_critic": Row("OMNet, critic only", {"network": {"actor": "dense"}}),
    "omnet_infinity": Row("OMNet, masks redrawn", {"network": {"masks": "redrawn"}, "loss": {"replacement": True}}),
    "sac": Row("SAC", _separate(2, utd_ratio=1, policy_update_delay=1)),
    "sac_20": Row("SAC-20", _separate(2)),
    "redq": Row("REDQ", _separate(10, num_target_subnets=2)),
    "droq": Row("DroQ", _separate(2, network=_DROPOUT), _TABLE_1["droq"]),
    "sr_sac": Row("SR-SAC", _separate(2, reset_interval=100_000), entropy_per_action=-0.5),
    "sin_sac": Row("Sin-SAC", _separate(1)),
    "sin_droq": Row("Sin-DroQ", _separate(1, network=_DROPOUT), _TABLE_1["sin_droq"]),
    "sr_sin_sac": Row("SR-Sin-SAC", _separate(1, reset_interval=100_000), entropy_per_action=-0.5),
    "redq_layer_norm": Row("REDQ + LayerNorm", _separate(10, True, num_target_subnets=2)),
    "sac_20_layer_norm": Row("SAC-20 + LayerNorm", _separate(2, True)),
    "sin_sac_layer_norm": Row("Sin-SAC + LayerNorm", _separate(1, True)),
}

# TD3's own counts: Fujimoto et al., 2018, whose actor ascends the first critic.
_TD3: dict[str, Any] = {"utd_ratio": 1, "policy_update_delay": 2}
ROWS |= {
    "omnet_td3": Row("OMNet-TD3", loss="td3"),
    "td3": Row("TD3", _separate(2, loss={"value_reduction": "first"}, **_TD3), loss="td3"),
    "redq_td3": Row("REDQ-style TD3", _separate(10, num_target_subnets=2), loss="td3"),
    "sin_td3": Row("Sin-TD3", _separate(1), loss="td3"),
}


def _dqn(label: str, num_subnets: int = 1, sparsity: float = 0.0, critic: str = "masked", **loss: Any) -> Row:
    """A row with the network and numbers of MinAtar's own DQN (https://arxiv.org/abs/1903.03176), but with Adam."""
    network = {"critic": critic, "actor": "dense", "num_subnets": num_subnets, "sparsity": sparsity, "num_cells": [128]}
    network |= {"critic_layer_norm": False, "channels": 16 if critic == "masked" else None}
    numbers = {"utd_ratio": 1, "policy_update_delay": 1, "buffer_size": 100_000, "num_envs": 8}
    optim = {"lr": 2.5e-4, "batch_size": 32, "tau": 1.0, "target_update_interval": 1_000}
    defaults = {"num_trained_subnets": 1, "num_target_subnets": 1, "loss_function": "smooth_l1", "double_dqn": False}
    return Row(label, {"network": network, "optim": optim, "loss": {**defaults, **loss}, **numbers}, loss="dqn")


# Masks that follow the weights, 95 % sparse (Arnob et al., 2024, and Graesser et al., 2022); sac_small has as many parameters.
_FREEZE = {"freeze_overlap": 0.8, "warm_up_frames": 20_000, "end": 60_000}


def _sparse(label: str, method: str, **topology: Any) -> Row:
    """SAC with two critics and an actor under a mask each."""
    network = {"actor": "sparse", "sparsity": 0.95}
    masks = {"method": method, **topology}
    return Row(label, _separate(2, network=network, topology=masks, utd_ratio=1, policy_update_delay=1))


ROWS |= {
    "dapd": _sparse("DAPD", "saliency", **_FREEZE),
    "rigl": _sparse("RigL", "rigl", end=240_000, grown_weights="zero"),
    "set": _sparse("SET", "set", fraction=0.05, grown_weights="zero"),
    "static_erk": _sparse("static sparse SAC", "static"),
    "sac_small": Row("small SAC", _separate(2, network={"num_cells": [52, 52]}, utd_ratio=1, policy_update_delay=1)),
    "omnet_adaptive": Row(
        "OMNet, adaptive masks", {"topology": {"method": "saliency", "layers": "uniform", "scored_under": "own"}}
    ),
}

ROWS |= {
    "omnet_dqn": _dqn("OMNet-DQN", 5, 0.5, num_target_subnets=2, double_dqn=True),
    "dqn": _dqn("DQN"),
    "double_dqn": _dqn("Double DQN", double_dqn=True),
    "averaged_dqn": _dqn("Averaged DQN", 5, critic="separate", num_target_subnets=None, target_reduction="mean"),
    "maxmin_dqn": _dqn("Maxmin DQN", 4, critic="separate", num_target_subnets=None),
    "bootstrapped_dqn": _dqn("Bootstrapped DQN", 10, critic="separate", num_trained_subnets=None, target_reduction="subnet"),
    "omnet_bootstrapped_dqn": _dqn("Bootstrapped DQN on masks", 5, 0.5, num_trained_subnets=None, target_reduction="subnet"),
}


def _tasks(label: str, networks: str, sparsity: float = 0.0) -> Row:
    """A row of several tasks, with two critics and an actor for each: what is theirs, and what is all tasks'."""
    network = {"critic": networks, "actor": networks, "num_subnets": 2, "sparsity": sparsity}
    loss = {"num_trained_subnets": None, "num_target_subnets": 2}
    return Row(label, {"network": network, "loss": loss, "utd_ratio": 1, "policy_update_delay": 1}, loss="tasks")


ROWS |= {
    "pathways": _tasks("pathways", "masked", 0.5),
    "shared_tasks": _tasks("one dense network", "shared"),
    "multi_head": _tasks("multi-head", "heads"),
    "separate_tasks": _tasks("separate networks", "separate"),
}


def row(name: str) -> Row:
    """The row called ``name``; a ``ValueError`` names the closest."""
    if name not in ROWS:
        closest = ", ".join(difflib.get_close_matches(name, ROWS, n=3, cutoff=0))
        raise ValueError(f"algorithm must be one of {', '.join(ROWS)}, got {name!r}; the closest are {closest}.")
    return ROWS[name]


def target_entropy(config: TrainConfig, action_dim: int) -> float:
    """The entropy that the temperature aims at, of the action rescaled to [-1, 1], in nats."""
    given, per_action = config.loss.target_entropy, row(config.algorithm).entropy_per_action
    if given is not None:
        return given
    return TARGET_ENTROPY.get(config.env, -float(action_dim)) if per_action is None else per_action * action_dim


def dropout(config: TrainConfig) -> float:
    """The critic's dropout."""
    given = config.network.dropout
    return row(config.algorithm).dropout.get(config.env, DROPOUT) if given is None else given


def network_sparsity(network: NetworkConfig) -> float | list[float]:
    """The argument ``sparsity`` of the networks, with ``dense_input`` and ``dense_output`` applied."""
    if not (network.dense_input or network.dense_output):
        return network.sparsity
    layers = [float(network.sparsity)] * (len(network.num_cells) + 1 + (network.channels is not None))
    layers[0] *= not network.dense_input
    layers[-1] *= not network.dense_output
    return layers
