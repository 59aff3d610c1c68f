"""Options that contradict each other, each of which is in its range: a ``ValueError`` names both."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from omnet_torchrl.envs import task_names
from omnet_torchrl.envs.minatar import GAMES
from omnet_torchrl.training.options.options import CollectConfig, TopologyConfig, TrainConfig
from omnet_torchrl.training.options.rows import ROWS, network_sparsity, row
from omnet_torchrl.updates.mask_schedule import CHOICES

MAX_LAYERS = 64
MINATAR = "MinAtar/"  # before the name of a game
STRUCTURES = ("random", "spatial", "predictive", "l1")
# Options of topology that only some methods read.
_METHODS = {
    **dict.fromkeys(("average_decay", "scored_under"), ("saliency",)),
    **dict.fromkeys(("scored_by", "recent_frames"), ("saliency", "rigl")),
    **dict.fromkeys(("fraction",), ("rigl", "set")),
    **dict.fromkeys(("interval", "warm_up_frames", "freeze_overlap", "freeze_return", "end"), ("saliency", "rigl", "set")),
}


def check_contradictions(config: TrainConfig) -> None:
    """Raise a ``ValueError`` if two values contradict each other."""
    for check in (_check_network, _check_loss, _check_topology, _check_tasks, _check_collect, _check_frames):
        check(config)


def _check_network(config: TrainConfig) -> None:
    network, limit = config.network, config.network.num_subnets
    sparsity, layers = network.sparsity, len(network.num_cells) + (network.masks != "unit") + (network.channels is not None)
    unknown = {"unit": ("mask_bias", "dense_input", "dense_output"), "redrawn": ("mask_bias",)}.get(network.masks, ())
    for name in unknown:
        if getattr(network, name):
            advice = "leave it out, or mask weights"
            raise ValueError(f"network.{name} must be false with network.masks={network.masks}, got true: {advice}.")
    if min(network.num_cells, default=0) < 1 or len(network.num_cells) > MAX_LAYERS:
        given = network.num_cells if len(network.num_cells) <= MAX_LAYERS else f"{len(network.num_cells)} numbers"
        raise ValueError(f"network.num_cells must be one to {MAX_LAYERS} numbers of at least 1, got {given}.")
    for number in sparsity if isinstance(sparsity, list) else [sparsity]:
        if type(number) not in (int, float) or not 0 <= number < 1:
            raise ValueError(f"network.sparsity must be a number in [0, 1), or a list of them, got {sparsity!r}.")
    dense = " and ".join(f"network.{name}=true" for name in ("dense_input", "dense_output") if getattr(network, name))
    if isinstance(sparsity, list) and len(sparsity) != layers:
        of = "linear layers" if network.masks != "unit" else "hidden layers with network.masks=unit"
        of = "layers, the convolution first" if network.channels is not None else of
        raise ValueError(f"network.sparsity must have one number for each of {layers} {of}, got {sparsity}.")
    if isinstance(sparsity, list) and dense:
        raise ValueError(f"network.sparsity must be one number with {dense}, got {sparsity}: write 0 in the list instead.")
    if dense and not any(network_sparsity(network)) and sparsity:  # type: ignore[arg-type]
        raise ValueError(f"network.sparsity must be 0 where {dense} leaves no layer to mask, got {sparsity}.")
    for name in ("num_trained_subnets", "num_target_subnets"):
        count = getattr(config.loss, name)
        if count is not None and not 1 <= count <= limit:
            advice = f"set loss.{name}={min(max(count, 1), limit)}" + (" or more subnets" if count > limit else "")
            raise ValueError(f"loss.{name} must be in [1, network.num_subnets={limit}], got {count}: {advice}.")
    if network.masks == "redrawn" and not config.loss.replacement:
        reason = "whose masks are drawn one by one"
        raise ValueError(f"loss.replacement must be true with network.masks=redrawn, {reason}, got false.")


def _check_loss(config: TrainConfig) -> None:
    """What only some of the losses, networks and environments have."""
    network, kind, grid = config.network, row(config.algorithm).loss, config.env.startswith(MINATAR)
    if kind == "dqn" and not grid:
        games = ", ".join(MINATAR + game for game in GAMES)
        raise ValueError(f"algorithm={config.algorithm} plays MinAtar's games: env must be one of {games}, got {config.env}.")
    if grid and kind != "dqn":
        rows = f"{', '.join(name for name in ROWS if ROWS[name].loss == 'dqn')}, with minatar_dqn.py and env={config.env}"
        raise ValueError(f"algorithm must be one of {rows}, got {config.algorithm}.")
    for name, off in {"channels": "null", "structure": "null", "freeze_hidden": "false"}.items():
        if getattr(network, name) and not (grid and network.critic == "masked" and network.masks == "weight"):
            needs = f"env={MINATAR}<game>, network.critic=masked and network.masks=weight"
            raise ValueError(f"network.{name} must be {off} but with {needs}, got {getattr(network, name)!r}.")
    if network.structure is not None:
        if network.structure not in STRUCTURES:
            raise ValueError(f"network.structure must be null or one of {', '.join(STRUCTURES)}, got {network.structure!r}.")
        if network.channels is not None:
            raise ValueError("network.channels must be null with network.structure, which is of the first layer, got both.")
        if network.mask_bias:
            raise ValueError("network.mask_bias must be false with network.structure, whose bias is one for all, got true.")
    if (network.structure == "l1") != (network.structure_run is not None):
        given = f"network.structure={network.structure} and network.structure_run={network.structure_run}"
        raise ValueError(f"network.structure=l1 and network.structure_run must be given together, got {given}.")
    if config.loss.l1 and kind != "dqn":
        raise ValueError(f"loss.l1 must be 0 with algorithm={config.algorithm}, got {config.loss.l1}: leave it out.")
    if config.observation_offset and grid:
        raise ValueError(f"observation_offset must be 0 with env={config.env}, whose cells are booleans: leave it out.")
    if config.normalize_observations and grid:
        raise ValueError(f"normalize_observations must be false with env={config.env}, whose cells are booleans: leave it out.")
    if config.eval.bias_episodes and kind != "sac":
        raise ValueError(f"eval.bias_episodes must be 0 with algorithm={config.algorithm}, got {config.eval.bias_episodes}.")


def _check_topology(config: TrainConfig) -> None:
    """What contradicts a schedule of masks, or is read by another one only."""
    network, topology, method = config.network, config.topology, config.topology.method
    given = {name: value for name, value in vars(topology).items() if value != getattr(TopologyConfig(), name)}
    for name in given:
        known = _METHODS.get(name, CHOICES["method"])
        if method not in known:
            needs = f"only with topology.method={' or '.join(known)}, got topology.method={method or 'null'}"
            raise ValueError(f"topology.{name}={given[name]} is read {needs}: leave it out.")
    if method is None:
        if network.actor == "sparse":
            raise ValueError(
                "network.actor=sparse needs topology.method, which chooses its mask, got null: give one, or dense."
            )
        return
    if network.critic in ("shared", "heads"):
        got = f"network.critic={network.critic}, whose layers have no masks"
        raise ValueError(f"topology.method must be null with {got}, got {method}: leave it out.")
    needed: dict[str, Any] = {"masks": "weight", "dense_input": False, "dense_output": False, "freeze_hidden": False}
    for name, value in {**needed, "structure": None}.items():
        if (got := getattr(network, name)) != value:
            expected = f"network.{name} must be {str(value).lower() if value is not None else 'null'}"
            raise ValueError(f"{expected} with topology.method={method}, which changes the masks of all layers, got {got}.")
    if isinstance(network.sparsity, list):
        reason = "topology.layers shares the weights out to layers"
        raise ValueError(
            f"network.sparsity must be one number with topology.method={method}: {reason}, got {network.sparsity}."
        )
    if topology.layers == "global" and method != "saliency":
        raise ValueError(f"topology.layers must be erk or uniform with topology.method={method}, got global.")
    if topology.scored_by == "both" and row(config.algorithm).loss != "sac":
        raise ValueError(f"topology.scored_by must be critic with algorithm={config.algorithm}, which is not SAC, got both.")
    if topology.freeze_return is not None and not config.eval.episodes:
        raise ValueError(f"topology.freeze_return={topology.freeze_return:g} needs evaluations, got eval.episodes=0.")
    if topology.end is not None and topology.end <= config.init_random_frames:
        limit = f"init_random_frames={config.init_random_frames}, when masks are first chosen"
        raise ValueError(f"topology.end must be above {limit}, got {topology.end}: raise it.")


def _check_tasks(config: TrainConfig) -> None:
    """What several tasks ask of the other options."""
    network, names = config.network, task_names(config.env)
    tasks, several = len(names), row(config.algorithm).loss == "tasks"
    if several != (tasks > 1):
        rows = ", ".join(name for name in ROWS if ROWS[name].loss == "tasks")
        advice = f"use one of {rows}, with multitask.py" if tasks > 1 else "join two or more by '+', or use another row"
        given = f"env={config.env} is {tasks} task{'s' * (tasks > 1)}"
        raise ValueError(f"{given}, which algorithm={config.algorithm} is not for: {advice}.")
    for role in ("critic", "actor"):
        kind = getattr(network, role)
        if not several and (kind in ("shared", "heads") or (role, kind) == ("actor", "separate")):
            raise ValueError(f"network.{role} must not be {kind} with algorithm={config.algorithm}: it is for several tasks.")
    if not several:
        return
    if network.actor != network.critic or network.masks == "redrawn" or config.loss.num_trained_subnets is not None:
        got = f"critic={network.critic}, actor={network.actor}, masks={network.masks}"
        got += f", loss.num_trained_subnets={config.loss.num_trained_subnets}"
        expected = "network.critic and network.actor must be the same, masks not redrawn, loss.num_trained_subnets null"
        raise ValueError(f"with algorithm={config.algorithm}, {expected}, got {got}: leave them out.")
    if network.num_subnets != tasks:
        advice = f"set network.num_subnets={tasks}"
        raise ValueError(f"network.num_subnets must be {tasks}, one for each task, got {network.num_subnets}: {advice}.")
    if config.loss.num_target_subnets is None or config.num_envs != 1 or config.loss.replacement:
        got = f"{config.loss.num_target_subnets}, num_envs={config.num_envs}, loss.replacement={config.loss.replacement}"
        expected = "loss.num_target_subnets must be the critics of each task, num_envs 1, loss.replacement false"
        raise ValueError(f"with several tasks, {expected}, got {got}: leave them out.")
    counts = {name: getattr(config, name) for name in ("total_frames", "init_random_frames", "buffer_size")}
    for name, number in {**counts, "optim.batch_size": config.optim.batch_size}.items():
        if number % tasks:
            above = math.ceil(number / tasks) * tasks
            raise ValueError(f"{name} must be a multiple of the {tasks} tasks, got {number}: use {name}={above}.")


def _check_collect(config: TrainConfig) -> None:
    """What workers can't do, or a run without them does not read."""
    collect = config.collect
    given = f"collect.backend={collect.backend}"
    if collect.backend == "direct":
        for name in ("num_workers", "steps"):
            if getattr(collect, name) != getattr(CollectConfig(), name):
                got = f"collect.{name}={getattr(collect, name)}"
                raise ValueError(f"{got} is read only with collect.backend=process or ray, got direct: leave it out.")
        return
    if config.resume is not None:
        reason = "the episodes of workers can't be brought back, and no run goes on exactly"
        raise ValueError(f"resume must be null with {given}, got {config.resume}: {reason}; start another run.")
    if len(task_names(config.env)) > 1:
        raise ValueError(f"collect.backend must be direct with the several tasks of env={config.env}, got {collect.backend}.")
    if collect.backend == "ray" and find_spec("ray") is None:
        raise ValueError(f"{given} needs a package that can't be imported: pip install 'omnet-torchrl[ray]'.")
    frames = config.environments * collect.steps
    if config.init_random_frames % frames:
        above = math.ceil(config.init_random_frames / frames) * frames
        product = f"num_envs * collect.num_workers * collect.steps = {frames}"
        got = f"got {config.init_random_frames}: use init_random_frames={above}"
        raise ValueError(f"init_random_frames must be a multiple of {product} with {given}, {got}.")


def _check_frames(config: TrainConfig) -> None:
    total, init, batch_size = config.total_frames, config.init_random_frames, config.optim.batch_size
    each = config.environments
    what = "num_envs" if each == config.num_envs else "num_envs * collect.num_workers"
    for name, frames in (("total_frames", total), ("init_random_frames", init)):
        if frames % each:
            above = math.ceil(frames / each) * each
            raise ValueError(f"{name} must be a multiple of {what}={each}, got {frames}: use {name}={above}.")
    if init >= total:
        raise ValueError(f"init_random_frames must be below total_frames={total}, or nothing is trained, got {init}: lower it.")
    if batch_size > init:
        reason = "the first batch would repeat transitions; lower it, or raise init_random_frames"
        raise ValueError(f"optim.batch_size must be at most init_random_frames={init}, got {batch_size}: {reason}.")
    for name, needed in (("optim.batch_size", batch_size), (what, each)):
        if needed > config.buffer_size:
            raise ValueError(f"buffer_size must be at least {name}={needed}, got {config.buffer_size}: raise it.")
    updates = int(config.utd_ratio * (total - init) + 1e-6)
    if config.policy_update_delay > updates:
        limit = f"{updates}, the critic updates of the run (utd_ratio={config.utd_ratio} in each of {total - init} frames)"
        reason = "the actor would never be trained; lower it"
        raise ValueError(f"policy_update_delay must be at most {limit}, got {config.policy_update_delay}: {reason}.")
