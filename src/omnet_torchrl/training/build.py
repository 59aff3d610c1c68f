"""What the options of a run build: networks, loss and update, the same way for every row of the results table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Adam
from torchrl.data import TensorSpec

from omnet_torchrl.builders import make_actor, make_qvalue
from omnet_torchrl.layers import EnsembleMLP, MaskedMLP, RedrawnMLP, UnitMaskedMLP
from omnet_torchrl.masks import each_sparsity, kept_units
from omnet_torchrl.metrics import sac_flops
from omnet_torchrl.modules import SubnetActor, SubnetQValueOperator
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.specs import check_action_spec
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.options import NetworkConfig, TrainConfig, row
from omnet_torchrl.training.options.rows import dropout, network_sparsity, target_entropy
from omnet_torchrl.updates import LazyAdam, Update


@dataclass
class Algorithm:
    """What an update trains: its networks, the loss over them, and the update itself."""

    actor: SubnetActor
    qvalue: SubnetQValueOperator
    loss: OMNetSACLoss
    update: Update


def build(
    config: TrainConfig, observation_spec: TensorSpec, action_spec: TensorSpec, device: torch.device | str = "cpu"
) -> Algorithm:
    """The networks, loss and update that the options of a run describe, whatever the row.

    Args:
        config (TrainConfig): checked options, see :func:`~omnet_torchrl.training.options.to_config`.
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
    return Algorithm(actor, qvalue, loss, Update(loss, [critic_optim, actor_optim], **update_options(config)))


def update_options(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of :class:`~omnet_torchrl.Update`, beside its optimisers."""
    options = {"policy_update_delay": config.policy_update_delay, "precision": config.precision, "compile": config.compile}
    return {"tau": config.optim.tau, **options}


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


def describe(config: TrainConfig, actor: SubnetActor, qvalue: SubnetQValueOperator) -> dict[str, str]:
    """The lines printed before a run starts."""
    network, sizes = config.network, {}
    for name, module in (("actor", actor), ("critic", qvalue)):
        weights = list(module.parameters())
        shape = [weights[0].shape[-1], *network.num_cells, weights[-1].shape[-1]]
        total = sum(weight.numel() for weight in weights)
        sizes[name] = f"{' - '.join(map(str, shape))}, {total:,} parameters"
    action_dim = actor.spec[actor.action_key].shape[-1]
    observation_dim = next(actor.parameters()).shape[-1]
    flops = training_flops(config, observation_dim, action_dim)
    redq = sac_flops(
        observation_dim,
        action_dim,
        network.num_cells,
        num_online=10,
        num_value=10,
        policy_update_delay=config.policy_update_delay,
        batch_size=config.optim.batch_size,
    )
    kept = ""
    if network.masks == "unit":
        kept = f", {' - '.join(map(str, qvalue.module.extract(0).num_cells))} hidden units"
    if network.critic == "masked":
        number = "2^31, drawn at each call" if network.masks == "redrawn" else str(network.num_subnets)
        subnets = f"{number}, {network.masks} masks of sparsity {network.sparsity}{kept}, in the critic"
        subnets += " and the actor" if network.actor == "masked" else "; a dense actor"
    else:
        subnets = f"{network.num_subnets} separate critics, one actor"
    return {
        "algorithm": row(config.algorithm).label,
        **sizes,
        "subnets": subnets,
        "frames": f"{config.total_frames:,}, of them {config.init_random_frames:,} random; {config.num_envs} environment(s)",
        "updates": f"{config.utd_ratio:g} per frame, actor every {config.policy_update_delay}, batch {config.optim.batch_size}",
        "training FLOPs": f"{flops / 1e6:.1f} M per update, {flops / redq:.0%} of REDQ's with 10 critics (dense count)",
    }
