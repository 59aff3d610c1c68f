"""The rows of the results table, and what the options of a run build.

A row is data: options that differ from the defaults, which are OMNet's. All rows go through the same networks with an index,
the same loss, update and loop; what tells them apart is which critics there are and which of them an update asks
(:class:`~omnet_torchrl.OMNetSACLoss`). Section 4.1 of https://arxiv.org/abs/2310.14009, figures 2 and 4, and the controls with
LayerNorm that the paper lacks.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Adam
from torchrl.data import TensorSpec
from torchrl.objectives import SoftUpdate

from omnet_torchrl.builders import make_actor, make_qvalue
from omnet_torchrl.ensembles import EnsembleMLP
from omnet_torchrl.layers import MaskedMLP
from omnet_torchrl.masks import each_sparsity, kept_units
from omnet_torchrl.metrics import sac_flops
from omnet_torchrl.modules import SubnetActor, SubnetQValueOperator, check_action_spec
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.redrawn import RedrawnMLP
from omnet_torchrl.training.adam import LazyAdam
from omnet_torchrl.training.global_numbers import derived_seed
from omnet_torchrl.training.options import NetworkConfig, TrainConfig
from omnet_torchrl.training.update import SACUpdate
from omnet_torchrl.units import UnitMaskedMLP

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
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    dropout: dict[str, float] = field(default_factory=dict)
    entropy_per_action: float | None = None


def _separate(critics: int, layer_norm: bool = False, num_target_subnets: int | None = None, **options: Any) -> dict[str, Any]:
    """Options of a row without masks: separate critics, all trained, and a dense actor."""
    network = {"critic": "separate", "actor": "dense", "num_subnets": critics, "sparsity": 0.0, **options.pop("network", {})}
    norms = {"critic_layer_norm": layer_norm, "actor_layer_norm": layer_norm}
    loss = {"num_trained_subnets": None, "num_target_subnets": num_target_subnets}
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


@dataclass
class Algorithm:
    """What an update trains: its networks, the loss over them, and the update itself."""

    actor: SubnetActor
    qvalue: SubnetQValueOperator
    loss: OMNetSACLoss
    update: SACUpdate


def build(
    config: TrainConfig, observation_spec: TensorSpec, action_spec: TensorSpec, device: torch.device | str = "cpu"
) -> Algorithm:
    """The networks, loss and update that the options of a run describe, whatever the row.

    Args:
        config (TrainConfig): checked options, see :func:`~omnet_torchrl.training.config.to_config`.
        observation_spec, action_spec (TensorSpec): of the environment.
        device (torch.device or str): of everything built.
    """
    actor = make_actor(observation_spec, action_spec, **network_options(config, "actor"), device=device)
    qvalue = make_qvalue(observation_spec, action_spec, **network_options(config, "critic"), device=device)
    loss = OMNetSACLoss(actor, qvalue, **loss_options(config, action_spec))
    loss.make_value_estimator(gamma=config.loss.gamma)
    optimiser = LazyAdam if config.optim.lazy else Adam
    critic_optim = optimiser(qvalue.parameters(), lr=config.optim.lr)
    actor_optim = optimiser([*actor.parameters(), loss.log_alpha], lr=config.optim.lr)
    target_updater = SoftUpdate(loss, tau=config.optim.tau)
    return Algorithm(actor, qvalue, loss, SACUpdate(loss, critic_optim, actor_optim, target_updater, compile=config.compile))


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


def training_flops(config: TrainConfig, observation_dim: int, action_dim: int, *, exact: bool = False) -> float:
    """Training FLOPs of one critic update and its share of the actor's, see :func:`~omnet_torchrl.metrics.sac_flops`.

    Args:
        config (TrainConfig): the run's options.
        observation_dim, action_dim (int): sizes of observation and action.

    Keyword Args:
        exact (bool): as PyTorch computes it, instead of the paper's convention. Defaults to ``False``.
    """
    loss, network, number = config.loss, config.network, config.network.num_subnets
    return sac_flops(
        observation_dim,
        action_dim,
        _active_cells(network, "critic"),
        actor_cells=_active_cells(network, "actor"),
        num_online=number if loss.num_trained_subnets is None else loss.num_trained_subnets,
        num_target=number if loss.num_target_subnets is None else loss.num_target_subnets,
        num_value=number,
        policy_update_delay=config.policy_update_delay,
        batch_size=config.optim.batch_size,
        exact=exact,
    )


def _active_cells(network: NetworkConfig, role: str) -> list[int]:
    """The hidden units that a subnetwork computes with: masks over weights leave all of them in the product."""
    masked = network.masks == "unit" and getattr(network, role) == "masked"
    sparsities = each_sparsity(network.sparsity if masked else 0.0, len(network.num_cells), "hidden layer")
    return [kept_units(units, each) for units, each in zip(network.num_cells, sparsities, strict=True)]


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
    common = {"num_cells": network.num_cells, "layer_norm": getattr(network, f"{role}_layer_norm")}
    if role == "critic" and dropout(config):
        common["dropout"] = dropout(config)
    if getattr(network, role) != "masked":
        return {**common, "network_class": EnsembleMLP, "num_subnets": network.num_subnets if role == "critic" else 1}
    # Masks of their own for actor and critic, the same on every device.
    generator = derived_seed(config.seed, "masks", role)
    sparsity: dict[str, Any] = {**common, "sparsity": network_sparsity(network), "generator": generator}
    if network.masks == "redrawn":
        return {**sparsity, "network_class": RedrawnMLP}
    if network.masks == "unit":
        return {**sparsity, "network_class": UnitMaskedMLP, "num_subnets": network.num_subnets}
    masks = {"num_subnets": network.num_subnets, "mask_bias": network.mask_bias}
    return {**sparsity, "network_class": MaskedMLP, **masks}


def loss_options(config: TrainConfig, action_spec: TensorSpec) -> dict[str, Any]:
    """The arguments of :class:`~omnet_torchrl.OMNetSACLoss`: K, M and V of the row, and its temperature.

    As REDQ's, the loss scores the action rescaled to [-1, 1]: of Humanoid-v4's 17 dimensions in [-0.4, 0.4], an action as the
    environment takes it has an entropy that is lower by 15.6 nats.
    """
    space = check_action_spec(action_spec).space
    half = (space.high - space.low).double() / 2
    redrawn = config.network.critic == "masked" and config.network.masks == "redrawn"
    return {
        "num_trained_subnets": config.loss.num_trained_subnets,
        "num_target_subnets": config.loss.num_target_subnets,
        "num_value_subnets": config.network.num_subnets if redrawn else None,
        "replacement": config.loss.replacement,
        "alpha_init": config.loss.alpha_init,
        "target_entropy": target_entropy(config, half.numel()),
        "log_prob_offset": half.log().sum().item(),
    }
