"""The options of a run are checked before it starts; here they are also read, written and compared.

A wrong value, or two that contradict each other, is a ``ValueError`` that says what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from omnet_torchrl.envs import task_names
from omnet_torchrl.training.device import resolve_device
from omnet_torchrl.training.options.memory import check_memory
from omnet_torchrl.training.options.options import TrainConfig
from omnet_torchrl.training.options.rows import ROWS, network_sparsity, row
from omnet_torchrl.training.record.files import one_line, read_file, replace_file

# What a resumed run may change: how long it lasts (total_frames may only grow), how it is watched and kept, and where it is
# computed. Everything else decides which numbers it trains on, and a run of two halves would be neither of the two.
MAY_CHANGE = (
    *("total_frames", "eval", "checkpoint", "logger", "wandb", "log_interval", "progress"),
    *("device", "compile", "num_threads", "stop_when_diverged", "folder", "resume"),
)

# The ends as in mathematics; no range of floats holds nan or infinity. None is always inside. What is counted ends where no
# run would: an environment is made for each of num_envs and of the episodes of an evaluation.
_RANGES = {
    "[1, 1e12]": "total_frames init_random_frames policy_update_delay buffer_size log_interval reset_interval eval.interval "
    "optim.batch_size optim.target_update_interval exploration.epsilon_frames max_episode_steps",
    "[0, 1e12]": "checkpoint.interval",
    "[1, 1e6]": "network.num_subnets network.fan_in",
    "[2, 1e6]": "checkpoint.keep",
    "[1, 4096]": "num_envs network.channels",
    "[0, 4096]": "eval.episodes eval.bias_episodes",
    "[1, 1024]": "num_threads",
    f"[0, {2**31})": "seed",
    "(0, 1e6]": "utd_ratio",
    "(0, inf)": "loss.alpha_init optim.lr",
    "[0, inf)": "observation_offset exploration.noise loss.policy_noise loss.noise_clip",
    "[0, 1]": "loss.gamma exploration.epsilon_start exploration.epsilon_end",
    "[0, 1)": "network.dropout",
    "(0, 1]": "optim.tau",
    "(-inf, inf)": "loss.target_entropy",
}
MAX_LAYERS = 64
MINATAR = "MinAtar/"  # before the name of a game
STRUCTURES = ("random", "spatial", "predictive")
_CHOICES = {
    "network.critic": ("masked", "separate", "shared", "heads"),
    "network.actor": ("masked", "dense", "separate", "shared", "heads"),
    "network.masks": ("weight", "unit", "redrawn"),
    "loss.value_reduction": ("mean", "min", "first"),
    "loss.target_reduction": ("min", "mean", "subnet"),
    "loss.loss_function": ("l2", "l1", "smooth_l1"),
    "precision": ("float32", "bfloat16"),
    "logger": ("csv", "tensorboard", "wandb"),
    "wandb.mode": ("offline", "online", "disabled"),
}

if not OmegaConf.has_resolver("now"):  # of ${now:...}; Hydra replaces it with its own, which does the same
    OmegaConf.register_new_resolver("now", lambda pattern: datetime.now().strftime(pattern), use_cache=True)


def to_config(config: DictConfig | Mapping[str, Any] | TrainConfig, *, sweep: bool = False) -> TrainConfig:
    """A checked config, its interpolations resolved, from what Hydra composed or a nested mapping; see :func:`validate`.

    With ``resume=auto``, and in a ``sweep``, the default folder has the options that are not the row's defaults in the place of
    the time of day: the same run has the same folder whenever it is started.
    """
    validate(result := _typed(config))
    if sweep or result.resume == "auto":
        raw = OmegaConf.to_container(config if isinstance(config, DictConfig) else OmegaConf.create(config))  # type: ignore
        folder = raw.get("folder", TrainConfig.folder)  # type: ignore[union-attr]
        if folder == TrainConfig.folder:
            result.folder = str(Path(result.folder).with_name(_run_name(result)))
        elif "${now:" in folder and result.resume == "auto":
            raise ValueError(f"resume=auto needs a folder without the time of day, got folder={folder}: leave the time out.")
    return result


def _run_name(config: TrainConfig) -> str:
    """The name of a run among those of its environment, row and seed: the options that are not the row's defaults."""
    same = {"env": config.env, "algorithm": config.algorithm, "seed": config.seed, "total_frames": config.total_frames}
    changed = differences(_typed(same), config)
    text = ",".join(f"{name}={value}" for name, (_, value) in sorted(changed.items())) or "default"
    name = re.sub(r"[^\w.=,-]+", "_", text)[:200]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def validate(config: TrainConfig) -> None:
    """Raise a ``ValueError`` if a value is of another type or out of its range, or if two values contradict each other."""
    typed = _typed(config)
    values = leaves(typed)
    row(typed.algorithm)
    for interval, names in _RANGES.items():
        low, high = map(float, interval[1:-1].split(","))
        for name in names.split():
            value = values[name]
            ends = {low if interval[0] == "[" else None, high if interval[-1] == "]" else None}
            if value is not None and not low < value < high and value not in ends:
                raise ValueError(f"{name} must be in {interval}, got {value}.")
    for name, choices in _CHOICES.items():
        if values[name] not in (*choices, None):
            closest = _closest(values[name], choices)
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {values[name]!r}; did you mean {closest}?")
    _check_network(typed)
    _check_loss(typed)
    _check_tasks(typed)
    _check_frames(typed)
    check_memory(typed, resolve_device(typed.device))
    for name, value in leaves(config).items():
        if value == "":
            raise ValueError(f"{name} must not be empty.")
        if name not in values:
            raise ValueError(unknown(name))
        if value != values[name]:
            raise ValueError(f"{name} must be of its type and resolved, got {value!r}: use what to_config returns.")


def unknown(key: str) -> str:
    """The message that there is no such option, with the closest one."""
    same = [name for name in OPTIONS if name.split(".")[-1] == key.split(".")[-1]] or [_closest(key, OPTIONS)]
    return f"unknown option {key!r}; did you mean {' or '.join(map(repr, same))}?"


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every option by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        found |= leaves(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return found


def differences(a: TrainConfig | Mapping[str, Any], b: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What keeps config ``b`` from resuming a run of ``a``: dotted name to both values; see ``MAY_CHANGE``.

    ``a`` may also be the :func:`leaves` that a checkpoint keeps.
    """
    first, second = leaves(a) if isinstance(a, TrainConfig) else a, leaves(b)
    fixed = [name for name in second if name.split(".")[0] not in MAY_CHANGE]
    fixed += ["total_frames"] if b.total_frames < first.get("total_frames", 0) else []
    return {name: (first.get(name), second[name]) for name in fixed if first.get(name) != second[name]}


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Names with the values before and now, in words."""
    each = [f"{name} was {before}, now {now}" for name, (before, now) in changes.items()]
    return "; ".join(each[:5]) + (f"; and {len(each) - 5} more" if len(each) > 5 else "")


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write ``config`` as YAML, with its interpolations resolved; a file that is there is replaced at once."""
    replace_file(Path(path), OmegaConf.to_yaml(_typed(config)).encode())


def load_config(path: str | Path) -> TrainConfig:
    """Read what :func:`save_config` wrote. Only names and types are checked: the run may have had another machine's device.

    Raises:
        ValueError: there is no such file, or it has no options.
    """
    try:
        given = OmegaConf.create(read_file(Path(path)).decode())
    except (ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} can't be read: {one_line(error)}") from error
    if not given or not OmegaConf.is_dict(given):
        raise ValueError(f"{path} must hold the options of a run, got nothing of the kind: is it damaged?")
    return _typed(given)


def _check_network(config: TrainConfig) -> None:
    network, limit = config.network, config.network.num_subnets
    sparsity, layers = network.sparsity, len(network.num_cells) + (network.masks != "unit")
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
    if grid != (kind == "dqn"):
        rows = ", ".join(name for name in ROWS if (ROWS[name].loss == "dqn") == grid)
        raise ValueError(f"algorithm must be one of {rows} with env={config.env}, got {config.algorithm}.")
    for name in ("channels", "structure"):
        if getattr(network, name) is not None and not (grid and network.critic == "masked" and network.masks == "weight"):
            needs = f"env={MINATAR}<game>, network.critic=masked and network.masks=weight"
            raise ValueError(f"network.{name} must be null but with {needs}, got {getattr(network, name)!r}.")
    if network.structure is not None:
        if network.structure not in STRUCTURES:
            raise ValueError(f"network.structure must be null or one of {', '.join(STRUCTURES)}, got {network.structure!r}.")
        if network.channels is not None:
            raise ValueError("network.channels must be null with network.structure, which is of the first layer, got both.")
    if network.freeze_hidden and not (grid and network.critic == "masked" and network.masks == "weight"):
        needs = f"env={MINATAR}<game>, network.critic=masked and network.masks=weight"
        raise ValueError(f"network.freeze_hidden must be false but with {needs}, got true.")
    if config.observation_offset and grid:
        raise ValueError(f"observation_offset must be 0 with env={config.env}, whose cells are booleans: leave it out.")
    if config.eval.bias_episodes and kind != "sac":
        raise ValueError(f"eval.bias_episodes must be 0 with algorithm={config.algorithm}, got {config.eval.bias_episodes}.")


def _check_tasks(config: TrainConfig) -> None:
    """What several tasks ask of the other options."""
    network, names = config.network, task_names(config.env)
    tasks, several = len(names), row(config.algorithm).loss == "tasks"
    if several != (tasks > 1):
        rows = ", ".join(name for name in ROWS if (ROWS[name].loss == "tasks") != several)
        advice = f"use one of {rows}" if tasks > 1 else f"join two or more by '+', or use one of {rows}"
        raise ValueError(f"env={config.env} is {tasks} task(s), which algorithm={config.algorithm} is not for: {advice}.")
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
    for name, number in leaves(config).items():
        if name in ("total_frames", "init_random_frames", "optim.batch_size", "buffer_size") and number % tasks:
            above = math.ceil(number / tasks) * tasks
            raise ValueError(f"{name} must be a multiple of the {tasks} tasks, got {number}: use {name}={above}.")


def _check_frames(config: TrainConfig) -> None:
    total, init, num_envs, batch_size = config.total_frames, config.init_random_frames, config.num_envs, config.optim.batch_size
    for name, frames in (("total_frames", total), ("init_random_frames", init)):
        if frames % num_envs:
            above = math.ceil(frames / num_envs) * num_envs
            raise ValueError(f"{name} must be a multiple of num_envs={num_envs}, got {frames}: use {name}={above}.")
    if init >= total:
        raise ValueError(f"init_random_frames must be below total_frames={total}, or nothing is trained, got {init}: lower it.")
    if batch_size > init:
        reason = "the first batch would repeat transitions; lower it, or raise init_random_frames"
        raise ValueError(f"optim.batch_size must be at most init_random_frames={init}, got {batch_size}: {reason}.")
    for name, needed in (("optim.batch_size", batch_size), ("num_envs", num_envs)):
        if needed > config.buffer_size:
            raise ValueError(f"buffer_size must be at least {name}={needed}, got {config.buffer_size}: raise it.")
    updates = int(config.utd_ratio * (total - init) + 1e-6)
    if config.policy_update_delay > updates:
        limit = f"{updates}, the critic updates of the run (utd_ratio={config.utd_ratio} in each of {total - init} frames)"
        reason = "the actor would never be trained; lower it"
        raise ValueError(f"policy_update_delay must be at most {limit}, got {config.policy_update_delay}: {reason}.")


def _typed(config: Any) -> TrainConfig:
    given = config if isinstance(config, DictConfig) else OmegaConf.create(config)
    if missing := _missing(OmegaConf.to_container(given, resolve=False)):  # which merging would leave at their defaults
        raise ValueError(f"{', '.join(missing)} must have a value, got ???: give one, or leave it out.")
    name = given.get("algorithm") if OmegaConf.is_dict(given) else None
    row_options = ROWS[name].options if isinstance(name, str) and name in ROWS else {}  # for those that are not given
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), row_options, given)
        OmegaConf.copy_cache(from_config=given, to_config=merged)  # ${now:...} stays the time that Hydra's folder has
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except ConfigKeyError as error:
        raise ValueError(unknown(str(error.full_key))) from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'options'}: {str(error.msg).splitlines()[0]}") from error


def _missing(options: Any, prefix: str = "") -> list[str]:
    """The names of options that are ``???``, which is OmegaConf's word for a value that is still to be given."""
    if not isinstance(options, dict):
        return [prefix[:-1]] if options == "???" else []
    return [name for key, value in options.items() for name in _missing(value, f"{prefix}{key}.")]


def _closest(name: str, names: Iterable[str]) -> str:
    return "".join(difflib.get_close_matches(name, list(names), n=1, cutoff=0))


# Every name that an option can have, those of groups included.
OPTIONS = {**vars(TrainConfig()), **leaves(TrainConfig())}
