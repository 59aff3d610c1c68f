"""What the options of a run build: networks, loss and update, the same way for every row of the results table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Adam
from torchrl.data import TensorSpec

from omnet_torchrl.builders import make_qvalue
from omnet_torchrl.deterministic import AnyActor, SubnetQValueActor
from omnet_torchrl.envs import task_names
from omnet_torchrl.layers import EnsembleMLP, MaskedMLP, RedrawnMLP, RunningNormalization, SharedMLP, UnitMaskedMLP
from omnet_torchrl.masks import each_sparsity, kept_units
from omnet_torchrl.metrics import sac_flops
from omnet_torchrl.modules import SubnetQValueOperator
from omnet_torchrl.objectives import OMNetDQNLoss, OMNetSACLoss, OMNetTD3Loss, SubnetLoss
from omnet_torchrl.specs import check_action_spec
from omnet_torchrl.training.grid import freeze_hidden, structure_options
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.options import NetworkConfig, TopologyConfig, TrainConfig, row
from omnet_torchrl.training.options.rows import TARGET_ENTROPY, dropout, network_sparsity, target_entropy
from omnet_torchrl.training.policy import MAKE
from omnet_torchrl.updates import LazyAdam, MaskSchedule, Update


@dataclass
class Algorithm:
    """What an update trains: its networks, the loss over them, and the update itself; of a DQN, both networks are one."""

    actor: AnyActor
    qvalue: SubnetQValueOperator | SubnetQValueActor
    loss: SubnetLoss
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
    kind, optimiser = row(config.algorithm).loss, LazyAdam if config.optim.lazy else Adam
    normalize = normalization(config, observation_spec)
    actor: AnyActor = make_policy(config, observation_spec, action_spec, device, normalize)
    qvalue: Any = actor
    loss: SubnetLoss
    if isinstance(actor, SubnetQValueActor):
        freeze_hidden(config, actor)
        loss = OMNetDQNLoss(actor, **loss_options(config, action_spec))
        networks = [list(actor.parameters())]
    else:
        options: dict[str, Any] = {**network_options(config, "critic"), "normalize": normalize, "device": device}
        qvalue = make_qvalue(observation_spec, action_spec, **options)
        loss = (OMNetTD3Loss if kind == "td3" else OMNetSACLoss)(actor, qvalue, **loss_options(config, action_spec))
        networks = [list(qvalue.parameters()), [*actor.parameters(), *([] if kind == "td3" else [loss.log_alpha])]]
    loss.make_value_estimator(gamma=config.loss.gamma)
    optims = [optimiser([p for p in params if p.requires_grad], lr=config.optim.lr) for params in networks]
    return Algorithm(actor, qvalue, loss, Update(loss, optims, **update_options(config)))


def make_policy(
    config: TrainConfig,
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    device: Any = "cpu",
    normalize: RunningNormalization | None = None,
) -> AnyActor:
    """The policy of a run, whatever the row: of a DQN, its network."""
    options = policy_options(config) | ({} if normalize is None else {"normalize": normalize})
    options |= structure_options(config, observation_spec)
    return MAKE[options.pop("loss")](observation_spec, action_spec, **options, device=device)


def policy_options(config: TrainConfig) -> dict[str, Any]:
    """The row's loss, and the arguments of its policy."""
    kind = row(config.algorithm).loss
    options = grid_options(config) if kind == "dqn" else network_options(config, "actor")
    return {"loss": kind, **options, **({"normalize": True} if config.normalize_observations else {})}


def normalization(config: TrainConfig, observation_spec: TensorSpec) -> RunningNormalization | None:
    """What actor and critic begin with, the same for both; ``None`` where observations are read as they are."""
    return RunningNormalization(observation_spec["observation"].shape[-1]) if config.normalize_observations else None


def update_options(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of :class:`~omnet_torchrl.Update`, beside its optimisers."""
    options = {"policy_update_delay": config.policy_update_delay, "precision": config.precision, "compile": config.compile}
    return {"tau": config.optim.tau, "target_update_interval": config.optim.target_update_interval, **options}


def topology_options(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of :class:`~omnet_torchrl.MaskSchedule`."""
    options = {name: value for name, value in vars(config.topology).items() if name != "recent_frames"}
    density = round(1 - float(config.network.sparsity), 12)
    return {**options, "density": density, "seed": derived_seed(config.seed, "topology")}


def make_topology(config: TrainConfig, update: Update) -> MaskSchedule | None:
    """The schedule that changes the masks of a run's networks; ``None`` where they stay."""
    return MaskSchedule(update, **topology_options(config)) if config.topology.method else None


def grid_options(config: TrainConfig) -> dict[str, Any]:
    """The arguments of :func:`~omnet_torchrl.grids.make_grid_qvalue_actor`."""
    return {"channels": config.network.channels, **network_options(config, "critic")}


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
    kind, number = getattr(network, role), network.num_subnets
    if role == "critic" and row(config.algorithm).loss == "tasks":
        number *= config.loss.num_target_subnets or 1  # those of task t are the ones from t times this on
    if kind in ("shared", "heads"):
        shared = {"num_networks": number // network.num_subnets, "heads": kind == "heads"}
        return {**common, "network_class": SharedMLP, "num_subnets": number, **shared}
    if kind != "masked":
        if config.topology.method and kind != "dense":
            common["sparsity"] = 0.0  # masks that keep everything, for the schedule to change
        one = kind in ("dense", "sparse") or (role == "actor" and row(config.algorithm).loss != "tasks")
        return {**common, "network_class": EnsembleMLP, "num_subnets": 1 if one else number}
    # Masks of their own for actor and critic, the same on every device.
    generator = derived_seed(config.seed, "masks", role)
    sparsity: dict[str, Any] = {**common, "sparsity": network_sparsity(network), "generator": generator}
    if network.masks == "redrawn":
        return {**sparsity, "network_class": RedrawnMLP}
    if network.masks == "unit":
        return {**sparsity, "network_class": UnitMaskedMLP, "num_subnets": number}
    masks = {"num_subnets": number, "mask_bias": network.mask_bias}
    return {**sparsity, "network_class": MaskedMLP, **masks}


def loss_options(config: TrainConfig, action_spec: TensorSpec) -> dict[str, Any]:
    """The arguments of the row's loss: K, M and V, and what SAC, TD3 or DQN has beside them.

    As REDQ's, the SAC loss scores the action rescaled to [-1, 1]: of Humanoid-v4's 17 dimensions in [-0.4, 0.4], an action as
    the environment takes it has an entropy that is lower by 15.6 nats. TD3's noise of the target is scaled in the same way.
    """
    loss, kind = config.loss, row(config.algorithm).loss
    counts = {"num_trained_subnets": loss.num_trained_subnets, "num_target_subnets": loss.num_target_subnets}
    counts["replacement"] = loss.replacement
    if kind == "dqn":
        options = {
            "target_reduction": loss.target_reduction,
            "double_dqn": loss.double_dqn,
            "loss_function": loss.loss_function,
            "l1": loss.l1,
        }
        return {**counts, **options, "delay_value": True}
    redrawn = config.network.critic == "masked" and config.network.masks == "redrawn"
    counts["num_value_subnets"] = config.network.num_subnets if redrawn else None
    space = check_action_spec(action_spec).space
    half = (space.high - space.low).double() / 2
    if kind == "td3":
        noise = {name: getattr(loss, name) * half.mean().item() for name in ("policy_noise", "noise_clip")}
        return {**counts, **noise, "value_reduction": loss.value_reduction, "loss_function": loss.loss_function}
    entropy = {"target_entropy": target_entropy(config, half.numel()), "log_prob_offset": half.log().sum().item()}
    which: dict[str, Any] = {"choose": "batch"} if kind == "tasks" else counts
    return {**which, "alpha_init": loss.alpha_init, **entropy}


def describe(config: TrainConfig, actor: AnyActor, qvalue: SubnetQValueOperator | SubnetQValueActor) -> dict[str, str]:
    """The lines printed before a run starts."""
    network, sizes = config.network, {}
    for name, module in (("actor", actor), ("critic", qvalue)) if actor is not qvalue else (("network", qvalue),):
        weights = list(module.parameters())
        shape = [_inputs(module), *network.num_cells, weights[-1].shape[-1]]
        trained, total = (sum(w.numel() for w in weights if w.requires_grad or each) for each in (False, True))
        fixed = "" if trained == total else f", {trained:,} of them trained"
        sizes[name] = f"{' - '.join(map(str, shape))}, {total:,} parameters{fixed}"
    kept = ""
    if network.masks == "unit":
        masked = next(each for each in qvalue.modules() if isinstance(each, UnitMaskedMLP))
        kept = f", {' - '.join(map(str, masked.extract(0).num_cells))} hidden units"
    if row(config.algorithm).loss == "tasks":
        each = f"{network.num_subnets} tasks, each with {config.loss.num_target_subnets} critics and an actor"
        of = {
            "masked": f"one network under {network.masks} masks of sparsity {network.sparsity}{kept}",
            "separate": "separate networks",
            "shared": "one dense network for all, told the task",
            "heads": "one dense network for all, with an output layer for each",
        }
        subnets = f"{each}: {of[network.critic]}"
    elif network.critic == "masked":
        number = "2^31, drawn at each call" if network.masks == "redrawn" else str(network.num_subnets)
        subnets = f"{number}, {network.masks} masks of sparsity {network.sparsity}{kept}, in the critic"
        subnets += "" if actor is qvalue else " and the actor" if network.actor == "masked" else "; a dense actor"
    else:
        critics = "critic" + "s" * (network.num_subnets > 1)
        subnets = f"{network.num_subnets} separate {critics}" + ", one actor" * (actor is not qvalue)
    changes = ", ".join(f"{k} {v}" for k, v in vars(config.topology).items() if v != getattr(TopologyConfig(), k))
    masks = {"masks": f"{1 - network.sparsity:.0%} of the weights, {changes}"} if changes else {}
    count, collect = config.environments * len(task_names(config.env)), config.collect
    environments = f"{count} environment{'s' * (count > 1)}"
    if collect.backend != "direct":
        environments += f" of {collect.num_workers} worker{'s' * (collect.num_workers > 1)}, collect.backend={collect.backend}"
    delay = config.policy_update_delay
    every = "" if actor is qvalue else f", actor every {delay} updates" if delay > 1 else ", actor in each"
    lines = {
        "algorithm": row(config.algorithm).label,
        **sizes,
        "subnets": subnets,
        **masks,
        "frames": f"{config.total_frames:,}, of them {config.init_random_frames:,} random; {environments}",
        "updates": f"{config.utd_ratio:g} per frame{every}, batch {config.optim.batch_size}",
    }
    if config.normalize_observations:
        lines["observations"] = "normalised by running mean and variance"
    compared = row(config.algorithm).loss == "sac" and config.env in TARGET_ENTROPY  # the tasks of the paper's comparison
    return lines | ({"training FLOPs": _flops(config, actor)} if compared else {})


def _inputs(module: torch.nn.Module) -> int:
    """What the first layer reads: channels, or numbers."""
    return next(getattr(layer, of) for layer in module.modules() for of in ("in_channels", "in_features") if hasattr(layer, of))


def _flops(config: TrainConfig, actor: AnyActor) -> str:
    action_dim, observation_dim = actor.spec[actor.action_key].shape[-1], next(actor.parameters()).shape[-1]
    flops = training_flops(config, observation_dim, action_dim)
    counts: dict[str, Any] = {"num_online": 10, "num_value": 10, "policy_update_delay": config.policy_update_delay}
    redq = sac_flops(observation_dim, action_dim, config.network.num_cells, **counts, batch_size=config.optim.batch_size)
    return f"{flops / 1e6:.1f} M per update, {flops / redq:.0%} of REDQ's with 10 critics (dense count)"
