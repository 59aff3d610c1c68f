"""The options of a run are checked before it starts; here they are also read, written and compared.

A wrong value, or two that contradict each other, is a ``ValueError`` that says what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from datetime import datetime
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import ConfigKeyError, ConfigTypeError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from omnet_torchrl.training.device import resolve_device
from omnet_torchrl.training.options.contradictions import check_contradictions
from omnet_torchrl.training.options.memory import check_memory
from omnet_torchrl.training.options.options import TrainConfig
from omnet_torchrl.training.options.rows import ROWS, row
from omnet_torchrl.training.record.files import one_line, read_file, replace_file
from omnet_torchrl.updates.mask_schedule import CHOICES

# What a resumed run may change: how long it lasts (total_frames may only grow), how it is watched and kept, and where it is
# computed. Everything else decides which numbers it trains on, and a run of two halves would be neither of the two.
MAY_CHANGE = (
    *("total_frames", "eval", "checkpoint", "logger", "wandb", "log_interval", "progress"),
    *("device", "compile", "num_threads", "stop_when_diverged", "folder", "resume"),
)
# Options that no number depends on, or of which the conditions of a checkpoint tell more.
UNBOUND = ("folder", "resume", "progress", "device", "compile", "num_threads")

# The ends as in mathematics; no range of floats holds nan or infinity. None is always inside. What is counted ends where no
# run would: an environment is made for each of num_envs and of the episodes of an evaluation.
_RANGES = {
    "[1, 1e12]": "total_frames init_random_frames policy_update_delay buffer_size log_interval reset_interval eval.interval "
    "optim.batch_size optim.target_update_interval exploration.epsilon_frames max_episode_steps topology.interval topology.end "
    "topology.recent_frames",
    "[0, 1e12]": "checkpoint.interval topology.warm_up_frames",
    "[1, 1e6]": "network.num_subnets network.fan_in",
    "[2, 1e6]": "checkpoint.keep",
    "[1, 4096]": "num_envs network.channels collect.num_workers collect.steps",
    "[0, 4096]": "eval.episodes eval.bias_episodes",
    "[1, 1024]": "num_threads",
    f"[0, {2**31})": "seed",
    "(0, 1e6]": "utd_ratio",
    "(0, inf)": "loss.alpha_init optim.lr",
    "[0, inf)": "loss.l1 observation_offset exploration.noise loss.policy_noise loss.noise_clip",
    "[0, 1]": "loss.gamma exploration.epsilon_start exploration.epsilon_end topology.fraction",
    "[0, 1)": "network.dropout topology.average_decay",
    "(0, 1]": "optim.tau topology.freeze_overlap",
    "(-inf, inf)": "loss.target_entropy topology.freeze_return",
}
_CHOICES = {
    "network.critic": ("masked", "separate", "shared", "heads"),
    "network.actor": ("masked", "dense", "sparse", "separate", "shared", "heads"),
    "network.masks": ("weight", "unit", "redrawn"),
    **{f"topology.{name}": choices for name, choices in CHOICES.items()},
    "loss.value_reduction": ("mean", "min", "first"),
    "loss.target_reduction": ("min", "mean", "subnet"),
    "loss.loss_function": ("l2", "l1", "smooth_l1"),
    "collect.backend": ("direct", "process", "ray"),
    "precision": ("float32", "bfloat16"),
    "logger": ("csv", "tensorboard", "wandb"),
    "wandb.mode": ("offline", "online", "disabled"),
}
_TYPES = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"},
    **{"list[int]": "a list of whole numbers", "list[str]": "a list of texts"},
}


if not OmegaConf.has_resolver("now"):  # of ${now:...}; Hydra replaces it with its own, which does the same
    OmegaConf.register_new_resolver("now", lambda pattern: datetime.now().strftime(pattern), use_cache=True)


def to_config(config: DictConfig | Mapping[str, Any] | TrainConfig, *, sweep: bool = False) -> TrainConfig:
    """A checked config, its interpolations resolved, from what Hydra composed or a nested mapping; see :func:`validate`.

    With ``resume=auto``, and in a ``sweep``, the default folder has the options that are not the row's defaults in the place of
    the time of day: the same run has the same folder whenever it is started.
    """
    result = _typed(config)
    _check(result, result)
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
    _check(_typed(config), config)


def _check(typed: TrainConfig, config: TrainConfig) -> None:
    """As :func:`validate`, of a config and what it is once each value is of its type."""
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
    check_contradictions(typed)
    check_memory(typed, resolve_device(typed.device))
    for name, value in leaves(config).items():
        if value == "":
            raise ValueError(f"{name} must not be empty.")
        if name not in OPTIONS:
            raise ValueError(unknown(name))
        if value != values[name]:
            raise ValueError(f"{name} must be of its type and resolved, got {value!r}: use what to_config returns.")


def unknown(key: str) -> str:
    """The message that there is no such option, with the closest one."""
    same = [name for name in OPTIONS if name.split(".")[-1] == key.split(".")[-1]] or [_closest(key, OPTIONS)]
    return f"unknown option {key!r}; did you mean {' or '.join(map(repr, same))}?"


def refused(error: OmegaConfBaseException) -> str:
    """What OmegaConf refuses, in one line: the option, the type that it must have, and what came."""
    name = re.sub(r"\[\d+\]", "", str(error.full_key or "options"))
    value = OmegaConf.create({"value": error.value}).value if isinstance(error.value, Node) else error.value
    if isinstance(error, ConfigKeyError):
        return unknown(name)
    if name not in OPTIONS or not isinstance(error, ValidationError | ConfigTypeError):
        return f"{name}: {str(error.msg).splitlines()[0]}"
    *groups, last = name.split(".")
    annotation = type(reduce(getattr, groups, TrainConfig())).__annotations__[last]
    expected = _TYPES.get(annotation.removesuffix(" | None"), f"options in braces, as {last}={{name:value}}")
    given = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    got = given if isinstance(error, ValidationError) else "something else"
    advice = f": write {value:.0f}" if "int" in annotation and isinstance(value, float) and value.is_integer() else ""
    return f"{name} must be {expected}{' or null' * annotation.endswith('None')}, got {got}{advice}."


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every option by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        found |= leaves(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name: value}
    return found


def differences(a: TrainConfig | Mapping[str, Any], b: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What keeps config ``b`` from resuming a run of ``a``: dotted name to both values; see ``MAY_CHANGE``.

    ``a`` may also be what :func:`bound` has given.
    """
    first = leaves(a) if isinstance(a, TrainConfig) else a
    fixed = {name: pair for name, pair in changes(first, b).items() if name.split(".")[0] not in MAY_CHANGE}
    before = first.get("total_frames", 0)
    return fixed | ({"total_frames": (before, b.total_frames)} if b.total_frames < before else {})


def bound(config: TrainConfig) -> dict[str, Any]:
    """The options that numbers depend on, by their dotted names, as a run keeps them."""
    return {name: value for name, value in leaves(config).items() if name not in UNBOUND}


def changes(kept: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The options of ``config`` that differ from those of :func:`bound`, and both values.

    Those that are newer than the run had their defaults. What JSON has kept may have other keys: numbers are strings there.
    """
    first, plain = {**bound(TrainConfig()), **kept}, partial(json.dumps, sort_keys=True, default=str)
    each = {name: (first[name], value) for name, value in bound(config).items()}
    return {name: (before, now) for name, (before, now) in each.items() if before != now and plain(before) != plain(now)}


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


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(TrainConfig)


def _typed(config: Any) -> TrainConfig:
    given = config if isinstance(config, DictConfig) else OmegaConf.create(config)
    if missing := _missing(OmegaConf.to_container(given, resolve=False)):  # which merging would leave at their defaults
        raise ValueError(f"{', '.join(missing)} must have a value, got ???: give one, or leave it out.")
    name = given.get("algorithm") if OmegaConf.is_dict(given) else None
    row_options = ROWS[name].options if isinstance(name, str) and name in ROWS else {}  # for those that are not given
    try:
        merged = OmegaConf.merge(_schema(), row_options, given)
        OmegaConf.copy_cache(from_config=given, to_config=merged)  # ${now:...} stays the time that Hydra's folder has
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(refused(error)) from error


def _missing(options: Any, prefix: str = "") -> list[str]:
    """The names of options that are ``???``, which is OmegaConf's word for a value that is still to be given."""
    if not isinstance(options, dict):
        return [prefix[:-1]] if options == "???" else []
    return [name for key, value in options.items() for name in _missing(value, f"{prefix}{key}.")]


def _closest(name: str, names: Iterable[str]) -> str:
    return "".join(difflib.get_close_matches(name, list(names), n=1, cutoff=0))


# Every name that an option can have, those of groups included.
OPTIONS = {**vars(TrainConfig()), **leaves(TrainConfig())}
