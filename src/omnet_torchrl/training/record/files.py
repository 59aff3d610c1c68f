"""Files that stay whole, whatever kills the process."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What systems answer that can't open a folder, or can't flush one.
UNSUPPORTED = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENOTSUP}


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to the disk, and put it in the place of ``path`` at once.

    The folder is flushed too, where that can be done.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            os.fsync(folder)
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
