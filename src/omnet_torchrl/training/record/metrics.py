"""``metrics.csv``: the exact values of a run, and the source of every plot. An error in writing it is an error of the run."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

HEADER = b"frames,seconds,name,value\n"


class CSVLogger:
    """``metrics.csv``: the columns ``frames, seconds, name, value``, one record per value; values as Python writes them, exact.

    Args:
        path (str or Path): the file.
        position (int or None): where a resumed run goes on, in bytes: :attr:`position` at its checkpoint. What was written
            after it is cut off. ``None`` (default) makes a new file.

    Raises:
        ValueError: a new file where there is one; a ``position`` that is not the end of a record of the file.
    """

    def __init__(self, path: str | Path, position: int | None = None):
        self.path = Path(path)
        if position is not None:
            self._check(position)
            self._file = self.path.open("r+b")
            self._file.seek(position)
            self._file.truncate()
            return
        try:
            self._file = self.path.open("x+b")
        except FileExistsError:
            raise ValueError(f"{path} exists already: give the position to go on from, or another path.") from None
        self._file.write(HEADER)
        self._file.flush()

    def _check(self, position: int) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        if not len(HEADER) <= position <= len(content):
            raise ValueError(
                f"position must be in [{len(HEADER)}, {len(content)}], the size of {self.path}, got {position}: the file is "
                "not the one that the checkpoint was saved with."
            )
        if content[position - 1 : position] != b"\n":
            raise ValueError(f"position must be the end of a record of {self.path}, got {position}: the file has changed.")

    def log(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Write a record per value, and hand them to the operating system: they outlive this process."""
        text = io.StringIO()
        records = ((frames, f"{seconds:.1f}", name, repr(float(value))) for name, value in metrics.items())
        csv.writer(text, lineterminator="\n").writerows(records)
        self._file.write(text.getvalue().encode())
        self._file.flush()

    @property
    def position(self) -> int:
        """Size of the file in bytes, everything logged included: what a checkpoint keeps."""
        return self._file.tell()

    def sync(self) -> None:
        """Wait until what is written is on the disk: it outlives the machine."""
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
    header, *records = Path(path).read_bytes().split(b"\n")
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
