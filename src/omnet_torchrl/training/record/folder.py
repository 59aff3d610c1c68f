"""The folder of a run: what ran, with which code, how it ended, and where its files are."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from omnet_torchrl.training.record.files import CheckpointError, one_line, read_file, replace_file, seal

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# What is read of run.json, and its types.
FIELDS = {
    **{"status": str, "sessions": list, "process": str | None, "saved": int | None, "spaces": dict | None},
    **{"env": str | None, "wandb_id": str | None, "options": dict | None},
}
PACKAGES = ("omnet-torchrl", "torch", "tensordict", "torchrl", "gymnasium", "mujoco", "numpy")


def now() -> str:
    """The wall-clock time in ISO format, with the time zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """The versions that a run's numbers depend on; ``None`` where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def conditions(device: torch.device, compiled: bool) -> dict[str, Any]:
    """What the exact numbers of a run depend on beside its options and the machine: versions and flags."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    flags = {"device": f"{device.type} ({name})", "compile": compiled, "num_threads": torch.get_num_threads()}
    return {**flags, **versions()}


def git_commit() -> str | None:
    """The commit of this package, with ``-dirty`` if its files differ or are new; ``None`` where it is in no git checkout."""
    package = Path(__file__).parents[2]

    def git(*command: str) -> str:
        # Without optional locks, asking doesn't disturb a git command of the user's that runs now.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        output = subprocess.check_output(
            ["git", *command], cwd=package, text=True, stderr=subprocess.DEVNULL, timeout=2, env=environment
        )
        return output.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not a checkout that merely has the installed package in a folder
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _code() -> dict[str, Any]:
    return {"command": sys.argv, "versions": versions(), "git_commit": git_commit()}


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory that this process, without its children, has had at a time so far, in MiB.

    ``peak_memory_mib`` of the machine (not on Windows) and, on a CUDA ``device``, ``peak_gpu_memory_mib`` of PyTorch's tensors.
    """
    peaks = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
    if device.type == "cuda":
        peaks["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) // 2**20
    return peaks


class RunFolder:
    """The folder of a run: ``run.json, config.yaml, metrics.csv, checkpoints/, learning_curve.png``.

    ``run.json`` says what ran and how it ended: ``status`` (running, finished, interrupted, diverged, failed), ``started``,
    ``ended``, ``command``, ``versions``, ``git_commit``, ``process`` (the last that had the folder), ``sessions`` (each start:
    when, from how many frames, when the run was resumed also with which code, and :func:`peak_memory` at its end, unless it was
    killed), ``sha256`` of all that, and what :meth:`write_info` adds. Made by :meth:`create` or :meth:`open`.

    Args:
        path (str or Path): the folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_path, self.metrics_path = self.path / "config.yaml", self.path / "metrics.csv"
        self.checkpoint_path, self.curve_path = self.path / "checkpoints", self.path / "learning_curve.png"
        self._lock = FileLock(self.checkpoint_path / "lock", timeout=0)

    @classmethod
    def create(
        cls,
        path: str | Path,
        before: Callable[[RunFolder], Mapping[str, Any] | None] = lambda _: None,
        *,
        exist_ok: bool = False,
    ) -> RunFolder:
        """Make the folder of a new run: ``path`` or, if it exists already, the first free one of ``path-1, path-2, ...``.

        ``before`` gets the folder while it is no run yet: what it writes is there wherever a ``run.json`` is, which gets the
        fields that it returns.
        ``exist_ok`` takes ``path`` itself, if nothing is in it but what a run that was killed at this very point has left.

        Raises:
            ValueError: it can't be made.
        """
        path = Path(path).expanduser().resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for number in itertools.count():
                # Two runs of a sweep may ask in the same second: whoever makes the folder has it.
                folder = cls(path.with_name(f"{path.name}-{number}") if number else path)
                with suppress(FileExistsError):
                    folder.path.mkdir(exist_ok=exist_ok)
                    break
            names = {each.name.removesuffix(".tmp") for each in folder.path.iterdir()}
            if names - {folder.config_path.name, folder.checkpoint_path.name, "run.json"}:
                raise ValueError(f"folder must be new, empty or a run's, got {path}, which has other files: choose another.")
            folder.checkpoint_path.mkdir(exist_ok=exist_ok)
        except OSError as error:
            raise ValueError(f"folder must be one that can be made, got {path} ({error.strerror}): choose another.") from error
        fields = before(folder) or {}
        folder._write({"status": "running", "started": now(), "ended": None, **_code(), **fields, "sessions": []})
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            ValueError: there is no ``run.json``, or none that can be read; names runs beneath the folder.
        """
        folder = cls(Path(path).expanduser().resolve())
        if not os.path.lexists(folder.path / "run.json"):
            found = [str(run.parent) for run in itertools.islice(folder.path.rglob("run.json"), 3)]
            hint = f"; there are runs beneath it, e.g. {', '.join(found)}" if found else ""
            missing = "expected run.json in it, which is missing" if folder.path.exists() else "it does not exist"
            raise ValueError(f"{folder.path} is no run folder: {missing}{hint}.")
        try:
            folder.info  # noqa: B018
        except CheckpointError as error:
            raise ValueError(f"{folder.path} is no run folder: {error}") from error
        return folder

    @property
    def info(self) -> dict[str, Any]:
        """The content of ``run.json``; a :class:`CheckpointError` if it is not what a run writes there."""
        try:
            content = json.loads(read_file(self.path / "run.json"))
            if content.get("sha256", seal(content)) != seal(content):  # runs of earlier versions have none
                raise ValueError("it is not what the run wrote: put it back or, if you edited it, delete its sha256")
            wrong = [name for name, kind in FIELDS.items() if not isinstance(content.get(name), kind)]
            if wrong or not all(type(session["frames"]) is int for session in content["sessions"]):
                raise ValueError(f"{', '.join(wrong) or 'sessions'} must be as a run writes it")
        except Exception as error:  # whatever it holds
            raise CheckpointError(f"its run.json can't be read ({one_line(error)}).") from error
        return content

    def write_info(self, **fields: Any) -> None:
        """Set fields of ``run.json``, which is replaced at once: a reader sees the old or the new, whole."""
        self._write({**self.info, **fields})

    def _write(self, info: dict[str, Any]) -> None:
        plain = json.loads(json.dumps(info, default=str))
        replace_file(self.path / "run.json", json.dumps({**plain, "sha256": seal(plain)}, indent=2).encode())

    def begin_session(self, frames: int = 0, **fields: Any) -> None:
        """Note that the run starts, or goes on from ``frames``, in this process; sets ``fields`` as well."""
        sessions = self.info["sessions"]
        session = {"started": now(), "frames": frames, **(_code() if sessions else {})}
        self.write_info(status="running", ended=None, **fields, sessions=[*sessions, session])

    def end_session(self, status: str, device: torch.device, **fields: Any) -> None:
        """Note how what :meth:`begin_session` began has ended, and its peak memory; sets ``fields`` as well."""
        *before, session = self.info["sessions"]
        self.write_info(status=status, ended=now(), **fields, sessions=[*before, {**session, **peak_memory(device)}])

    def lock(self) -> None:
        """Keep everybody else out, other processes too, until :meth:`unlock` or the end of this process, whatever ends it.

        Raises:
            ValueError: somebody else has the folder.
        """
        if self._lock.is_locked:
            return
        try:
            self.checkpoint_path.mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.checkpoint_path} must be a folder that can be made ({error.strerror}).") from error
        try:
            self._lock.acquire()
        except Timeout:
            owner = self.info.get("process", "unknown")
            raise ValueError(f"the run in {self.path} still goes on (process {owner}): stop it first.") from None
        except (OSError, NotImplementedError):  # a file system without locks
            pass
        self.write_info(process=f"{os.getpid()} on {platform.node()}")

    def unlock(self) -> None:
        """Let other processes go on with the run."""
        self._lock.release()
