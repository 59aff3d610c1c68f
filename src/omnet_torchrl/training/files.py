"""Files that are whole or not there, whatever kills the process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
    try:
        _flush_folder(path.parent)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
