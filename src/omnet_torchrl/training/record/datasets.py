"""Datasets: transitions that were recorded once, to be learned from without an environment.

A dataset is a folder: ``transitions/``, a memory-mapped TensorDict, which :meth:`tensordict.TensorDict.load_memmap` reads
without this package, and ``dataset.json``, which says what it is of and has the hash of each file. An element is a transition,
``(n,)``, or, of several tasks, one of each, ``(n, T)``, as in the replay of a run. It is written under another name and
renamed: a folder that is there is whole. Files hold tensors, numbers and strings; nothing is unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv

from omnet_torchrl.envs import TasksEnv
from omnet_torchrl.training.record.files import (
    CheckpointError,
    check_file,
    fingerprint,
    one_line,
    read_file,
    replace_file,
    seal,
    writing,
)

FORMAT = 1
# What a transition has; of several tasks, "subnet" too, the number of its task, which "next" has as well.
KEYS: tuple[Any, ...] = ("observation", "action", *(("next", name) for name in ("observation", "reward", "done", "terminated")))


def write_dataset(folder: str | Path, transitions: TensorDictBase, env: EnvBase, /, **fields: Any) -> Path:
    """Write a dataset into a folder that is new.

    Args:
        folder (str or Path): to be made.
        transitions (TensorDictBase): ``(n,)``, or ``(n, T)`` of several tasks, in the order of ``env``'s.
        env (EnvBase): that they were recorded in, or one with its spaces and tasks.
        **fields: what ``dataset.json`` is to say beside: where the transitions come from, seeds.

    Returns:
        Path: the folder.

    Raises:
        ValueError: the folder exists; transitions that lack a key, are empty, or are not of the environment's spaces.
    """
    path, tasks = Path(folder).expanduser().resolve(), tasks_of(env)
    if path.exists():
        raise ValueError(f"the dataset's folder must be new, got {path}, which exists: choose another, or delete it.")
    missing = [key for key in KEYS if transitions.get(key, None) is None]
    shape = f"(n, {len(tasks)}), one of each task" if tasks else "(n,)"
    if missing or not transitions.numel() or transitions.shape[1:] != torch.Size([len(tasks)] if tasks else []):
        what = f"no {missing[0]!r}" if missing else f"batch size {tuple(transitions.shape)}"
        raise ValueError(f"transitions must have {', '.join(map(str, KEYS))} and batch size {shape}, got {what}.")
    data = transitions.select(*KEYS).to("cpu")
    if tasks:
        for key in ("subnet", ("next", "subnet")):  # TorchRL's IQLLoss asks for the value of the next state
            data.set(key, torch.arange(len(tasks)).expand(data.shape))
    spaces = spaces_of(env)
    _check_spaces(_spaces(data, spaces), spaces, "transitions", "the environment")
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        data.memmap(temporary / "transitions", copy_existing=True)  # they may be another dataset's
        files = {name: fingerprint(temporary / name) for name in _files(temporary)}
    said = {"format": FORMAT, "transitions": data.numel(), "tasks": tasks, "spaces": spaces, "mean_return": _returns(data)}
    plain = json.loads(json.dumps({**said, **fields, "files": files}, default=str))
    replace_file(temporary / "dataset.json", json.dumps({**plain, "sha256": seal(plain)}, indent=1).encode())
    with writing(path):
        temporary.rename(path)
    return path


def read_dataset(folder: str | Path, env: EnvBase | None = None) -> tuple[TensorDict, dict[str, Any]]:
    """The transitions of a dataset, which stay on the disk until they are read, and what ``dataset.json`` says.

    Args:
        folder (str or Path): of :func:`write_dataset`.
        env (EnvBase or None): whose spaces and tasks it must be of. ``None`` (default): any.

    Returns:
        tuple: transitions ``(n,)`` or ``(n, T)``, and a dictionary.

    Raises:
        ValueError: there is no dataset, a file of it is missing, cut off or another than was written; it is of other spaces or
            tasks.

    Examples:
        >>> transitions, what = read_dataset("data/cheetahs", env)  # doctest: +SKIP
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=TensorStorage(transitions), writer=ImmutableDatasetWriter(), batch_size=128
        ... )  # doctest: +SKIP
        >>> batch = buffer.sample().transpose(0, 1)  # (T, B) of several tasks  # doctest: +SKIP
    """
    path = Path(folder).expanduser().resolve()
    if not (path / "dataset.json").is_file():
        found = "no dataset.json in it" if path.is_dir() else "no such folder"
        raise ValueError(f"{path} must be the folder of a dataset, got {found}: record one, see docs/guides/tasks.md.")
    try:
        what = json.loads(read_file(path / "dataset.json"))
        if what.get("format") != FORMAT or what.get("sha256") != seal(what):
            raise CheckpointError(f"dataset.json is not what was written, or not of format {FORMAT}.")
        known = {name for name in what["files"] if name.endswith((".memmap", "meta.json"))}
        if extra := _files(path) - known:
            raise CheckpointError(f"{min(extra)} is none of its files.")
        for name, expected in what["files"].items():
            check_file(path / name, name, expected)
        data = TensorDict.load_memmap(path / "transitions", allow_pickle=False)
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"the dataset in {path} is damaged ({one_line(error)}): record it anew, or copy it again.") from error
    if env is not None:
        if (expected_tasks := list(tasks_of(env))) != what["tasks"]:
            got = ", ".join(what["tasks"]) or "a single one"
            raise ValueError(f"the dataset must be of the tasks {', '.join(expected_tasks) or 'of one'}, got {got} in {path}.")
        _check_spaces(what["spaces"], spaces_of(env), "dataset", "the environment")
    return data, what


def spaces_of(env: EnvBase) -> dict[str, Any]:
    """The sizes of observation and action, and the action's bounds; of several tasks, which have the same, those of one."""
    space = env.action_spec.space
    size = env.action_spec.shape[-1]
    bounds = {name: getattr(space, name).reshape(-1, size)[0].tolist() for name in ("low", "high")}
    return {"observation": env.observation_spec["observation"].shape[-1], "action": size, **bounds}


def tasks_of(env: EnvBase) -> tuple[str, ...]:
    """The names of several tasks; none of one."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return tuple(dict.fromkeys(env.tasks)) if isinstance(env, TasksEnv) else ()


def _spaces(data: TensorDictBase, spaces: Mapping[str, Any]) -> dict[str, Any]:
    return {**spaces, **{name: data[name].shape[-1] for name in ("observation", "action")}}


def _check_spaces(got: Mapping[str, Any], expected: Mapping[str, Any], what: str, where: str) -> None:
    for name, value in expected.items():
        if got.get(name) != value:
            described = f"{name} of {value}" if name in ("observation", "action") else f"the action's {name} of {value}"
            raise ValueError(f"the {what} must have the spaces of {where}, {described}, got {got.get(name)}: use its own task.")


def _returns(data: TensorDictBase) -> list[float | None]:
    """The mean return of the episodes that ended, of all tasks or of each: rewards over ends."""
    rewards, done = (data["next", name].reshape(len(data), -1).double() for name in ("reward", "done"))
    ended, ends = done.flip(0).cumsum(0).flip(0) > 0, done.sum(0)  # the episode that goes on at the end is left out
    means: Tensor = (rewards * ended).sum(0) / ends
    return [round(mean, 3) if end else None for mean, end in zip(means.tolist(), ends.tolist(), strict=True)]


def _files(path: Path) -> set[str]:
    return {str(file.relative_to(path).as_posix()) for file in (path / "transitions").rglob("*") if not file.is_dir()}
