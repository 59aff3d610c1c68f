"""``metrics.csv``: the exact values of a run, and the source of every plot. An error in writing it is an error of the run."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnet_torchrl.training.record.files import CheckpointError, fingerprint, read_file, writing

HEADER = b"frames,seconds,name,value\n"


class CSVLogger:
    """``metrics.csv``: the columns ``frames, seconds, name, value``, one record per value; values as Python writes them, exact.

    Args:
        path (str or Path): the file.
        position (Mapping or None): where a resumed run goes on: :attr:`position` at its checkpoint. What was written after it
            is cut off. ``None`` (default) makes a new file.

    Raises:
        ValueError: a new file where there is one.
        CheckpointError: a ``position`` that the file does not have, or before which it has changed.
    """

    def __init__(self, path: str | Path, position: Mapping[str, Any] | None = None):
        self.path = Path(path)
        if position is not None:
            content = read_file(self.path)[: position["size"]]
            if fingerprint(content) != position:
                raise CheckpointError(
                    f"the first {position['size']:,} bytes of {self.path} are not those of the checkpoint: put the file back."
                )
            self._hash = hashlib.sha256(content)
            self._file = self.path.open("r+b")
            self._file.truncate(self._file.seek(len(content)))
            return
        try:
            self._file = self.path.open("x+b")
        except FileExistsError:
            raise ValueError(f"{path} exists already: give the position to go on from, or another path.") from None
        self._hash = hashlib.sha256()
        self._write(HEADER)

    def _write(self, content: bytes) -> None:
        with writing(self.path):
            self._file.write(content)
            self._file.flush()
        self._hash.update(content)

    def log(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Write a record per value, and hand them to the operating system: they outlive this process."""
        text = io.StringIO()
        records = ((frames, f"{seconds:.1f}", name, repr(float(value))) for name, value in metrics.items())
        csv.writer(text, lineterminator="\n").writerows(records)
        self._write(text.getvalue().encode())

    @property
    def position(self) -> dict[str, Any]:
        """The fingerprint of the file, everything logged included: what a checkpoint keeps."""
        return {"size": self._file.tell(), "sha256": self._hash.hexdigest()}

    def sync(self) -> None:
        """Wait until what is written is on the disk: it outlives the machine."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing can be logged any more."""
        self._file.close()


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """The frames and the values of each name in a ``metrics.csv``, in the order written.

    A last record that was cut short, because the process was killed, is left out with a warning.

    Raises:
        ValueError: the file isn't one of :class:`CSVLogger`, or a record before the last is damaged.
    """
    header, *records = read_file(Path(path)).split(b"\n")
    if header.strip() != HEADER.strip():
        raise ValueError(f"{path} must begin with {HEADER.decode().strip()!r}, got {header[:80]!r}.")
    # Only a line break ends a record: the "12" that is left of "1200.5" looks whole.
    torn = len(records) + 2 if records and records.pop() else None
    metrics: dict[str, tuple[list[int], list[float]]] = {}
    for number, record in enumerate(records, start=2):
        try:
            at, _, name, text = next(csv.reader([record.decode()]))
            frames, value = int(at), float(text)
        except (ValueError, csv.Error):
            if torn or number <= len(records):
                raise ValueError(f"{path}, line {number}: expected frames,seconds,name,value, got {record!r}.") from None
            torn = number
            break
        series = metrics.setdefault(name, ([], []))
        series[0].append(frames)
        series[1].append(value)
    if torn:
        warnings.warn(f"{path}, line {torn}: the last record is cut short and left out.", stacklevel=2)
    return metrics
