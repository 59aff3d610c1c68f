"""Files that stay whole, whatever kills the process, and that are read whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What systems answer that can't open a folder, or can't flush one.
UNSUPPORTED = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENOTSUP}


class CheckpointError(ValueError):
    """A file that a run is resumed with is missing, damaged, or another than was written."""


class WriteError(OSError):
    """A file of a run can't be written: the disk is full, or the folder is gone."""


def fingerprint(content: bytes | memoryview | Path) -> dict[str, Any]:
    """What tells a content, or that of a file, from every other one: its ``size`` in bytes, and its ``sha256``."""
    if isinstance(content, Path):  # which may be larger than memory
        with content.open("rb") as file:
            return {"size": content.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def seal(content: Mapping[str, Any]) -> str:
    """The hash of the content of a JSON file, without the ``sha256`` that it carries."""
    others = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_file(path: Path, expected: Mapping[str, Any] | None = None) -> bytes:
    """The content of a file, which must have the fingerprint ``expected``. ``None`` (default) takes any.

    Everything that a run is resumed with is read here. A pipe in the place of a file is not opened: that would wait for a
    writer for ever.

    Raises:
        CheckpointError: there is no such file, it can't be read, or it is another one.
    """
    with _reading(path, path.name, expected):
        content = path.read_bytes()
        if expected is not None and fingerprint(content)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{path.name} is not what was written.")
    return content


def check_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    """As :func:`read_file`, of a file that may be larger than memory, and that errors call ``name``."""
    with _reading(path, name, expected):
        if fingerprint(path)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{name} is not what was written.")


@contextlib.contextmanager
def _reading(path: Path, name: str, expected: Mapping[str, Any] | None) -> Iterator[None]:
    """Before, check that there is a file of the expected size; within, an error of reading it is a CheckpointError."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{name} {'is no file' if os.path.lexists(path) else 'is missing'}.")
        if expected is not None and path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{name} must have {expected['size']} bytes, got {path.stat().st_size}.")
        yield
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{name} can't be read ({one_line(error)}).") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name, flush it to the disk, and put it in the place of ``path`` at once.

    The folder is flushed too, where that can be done.

    Raises:
        WriteError: it can't be written; ``path`` is as it was, and what was written is deleted again, to make room.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)  # a pipe or a link that is there is not written to
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _flush(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an error of the system is a :class:`WriteError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} can't be written ({error.strerror or error}).") from error


def _flush(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            number = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, number)
            os.fsync(number)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


def append_positions(path: Path, columns: Sequence[str], positions: Iterable[Sequence[Any]]) -> None:
    """Append positions, each of which ends with x and y, to a CSV file. A line that a killed process left unfinished goes."""
    kept = path.read_bytes() if path.exists() else b""
    kept = kept[: kept.rfind(b"\n") + 1]
    with path.open("a", newline="") as file:
        file.truncate(len(kept))
        writer = csv.writer(file, lineterminator="\n")
        if not kept:
            writer.writerow(columns)
        writer.writerows([*position[:-2], *(f"{value:.6g}" for value in position[-2:])] for position in positions)
