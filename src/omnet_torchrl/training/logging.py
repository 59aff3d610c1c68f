"""Where the values of a run go: ``metrics.csv``, and a logger that follows along.

``metrics.csv`` is the record, and the source of every plot: one row per logged value, exact. An error while it is written is an
error of the run. TensorBoard and wandb are a convenience: they get the same values through a bounded queue and a thread of
their own, so that once started they can fail, hang or fill up without stopping or slowing anything.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from typing import Any

from omnet_torchrl.training.run_folder import RunFolder
from omnet_torchrl.training.trackers import Tracker, reason, start_tensorboard, start_wandb

HEADER = b"frames,seconds,name,value\n"
KINDS = ("csv", "tensorboard", "wandb")
CLOSE_SECONDS = 10.0


class CSVLogger:
    """``metrics.csv``: the columns ``frames, seconds, name, value``, one row per value; values as Python writes them, exact.

    Args:
        path (str or Path): the file.
        position (int or None): where a resumed run goes on, in bytes: :attr:`position` at its checkpoint. What was written
            after it is cut off. ``None`` (default) makes a new file.

    Raises:
        ValueError: a new file where there is one; a ``position`` that is not the end of a row of the file.
    """

    def __init__(self, path: str | Path, position: int | None = None):
        self.path = Path(path)
        if position is None:
            try:
                self._file: io.BufferedIOBase = self.path.open("xb")
            except FileExistsError:
                raise ValueError(f"{path} exists already: give the position to go on from, or another path.") from None
            self._file.write(HEADER)
            self.flush()
        else:
            self._file = self._cut(position)

    def _cut(self, position: int) -> io.BufferedIOBase:
        size = self.path.stat().st_size if self.path.exists() else 0
        if not len(HEADER) <= position <= size:
            raise ValueError(
                f"position must be in [{len(HEADER)}, {size}], the size of {self.path}, got {position}: the file is not the "
                "one that the checkpoint was saved with."
            )
        file = self.path.open("r+b")
        file.seek(position - 1)
        if file.read(1) != b"\n":
            file.close()
            raise ValueError(f"position must be the end of a row of {self.path}, got {position}: the file has changed.")
        file.seek(position)
        file.truncate()
        return file

    def log(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Write a row per value, and hand them to the operating system: they outlive this process."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerows((frames, f"{seconds:.1f}", name, repr(float(value))) for name, value in metrics.items())
        self._file.write(text.getvalue().encode())
        self.flush()

    @property
    def position(self) -> int:
        """Size of the file in bytes, everything logged included: what a checkpoint keeps."""
        self.flush()
        return self._file.tell()

    def flush(self) -> None:
        """Hand what is written to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Wait until what is written is on the disk: it outlives the machine."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing can be logged any more."""
        self._file.close()


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """The frames and the values of each name in a ``metrics.csv``, in the order written.

    A last row that was cut short, because the process was killed, is left out with a warning.

    Raises:
        ValueError: the file isn't one of :class:`CSVLogger`, or a row before the last is damaged.
    """
    header, *rows = Path(path).read_bytes().split(b"\n")
    if header.strip() != HEADER.strip():
        raise ValueError(f"{path} must begin with {HEADER.decode().strip()!r}, got {header[:80]!r}.")
    # Only a line break ends a row: the "12" that is left of "1200.5" looks whole.
    torn = len(rows) + 2 if rows and rows.pop() else None
    metrics: dict[str, tuple[list[int], list[float]]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            at, _, name, text = next(csv.reader([row.decode()]))
            frames, value = int(at), float(text)
        except (ValueError, csv.Error):
            if torn or number <= len(rows):
                raise ValueError(f"{path}, line {number}: expected frames,seconds,name,value, got {row!r}.") from None
            torn = number
            break
        series = metrics.setdefault(name, ([], []))
        series[0].append(frames)
        series[1].append(value)
    if torn:
        warnings.warn(f"{path}, line {torn}: the last row is cut short and left out.", stacklevel=2)
    return metrics


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


class BackgroundLogger:
    """Writes to a tracker from a thread, so that nothing it does stops or slows the run.

    An exception of the tracker is told once, and the logger is off from then on. Where the queue is full, values are dropped,
    counted, and told at the end.

    Args:
        tracker (Tracker or None): ``None`` logs nothing.

    Keyword Args:
        warn (callable): gets each message for the user, in the thread of the run. Defaults to :func:`warnings.warn`.
        size (int): calls of :meth:`log` that can wait. Defaults to 4096.
    """

    def __init__(self, tracker: Tracker | None = None, *, warn: Callable[[str], None] = _warn, size: int = 4096):
        self.name, self.place = ("", "") if tracker is None else (tracker.name, tracker.place)
        self._tracker, self._warn, self._dropped = tracker, warn, 0
        self._error: Exception | None = None
        self._queue: Queue[tuple[int, float, dict[str, float]] | None] = Queue(size)
        if tracker is not None:
            self._thread = threading.Thread(target=self._work, args=(tracker,), name="logger", daemon=True)
            self._thread.start()

    def log(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Queue the values, and return at once."""
        if self._is_off():
            return
        try:
            self._queue.put_nowait((frames, seconds, {name: float(value) for name, value in metrics.items()}))
        except Full:
            self._dropped += len(metrics)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Wait, ``timeout`` seconds at most, until everything is written; say what is not."""
        if self._is_off():
            return
        deadline = time.monotonic() + timeout
        with suppress(Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._is_off():
            return
        self._tracker = None
        if self._thread.is_alive():
            self._warn(f"{self.name}: not done within {timeout:.0f} s, the last values may be missing; metrics.csv has all.")
        if self._dropped:
            self._warn(f"{self.name}: too slow, {self._dropped} values were left out; metrics.csv has all.")

    def _is_off(self) -> bool:
        """Whether nothing is written any more; tells the error that is the reason, once."""
        if self._tracker is not None and self._error is not None:
            self._tracker = None
            self._warn(f"{self.name}: failed, and is off from now on ({reason(self._error)}); metrics.csv has all.")
        return self._tracker is None

    def _work(self, tracker: Tracker) -> None:
        try:
            for values in iter(self._queue.get, None):
                tracker.write(*values)
            tracker.close()
        except Exception as error:
            self._error = error
            with suppress(Exception):
                tracker.close()


def check_logger(kind: str) -> None:
    """Raise a ``ValueError`` if ``kind`` is no logger, or one whose package is not installed. Cheap: for before any work."""
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise ValueError(f"logger must be one of {', '.join(KINDS)}, got {kind!r}{f'; {close[0]}?' if close else ''}.")
    spec = find_spec(kind)
    # A folder named wandb, which wandb leaves behind, is a package without an origin.
    if kind != "csv" and (spec is None or spec.origin is None):
        raise ValueError(f"logger={kind} needs the package {kind}: pip install {kind}, or choose logger=csv.")


def make_logger(
    kind: str,
    folder: RunFolder,
    config: Mapping[str, Any] | None = None,
    *,
    frames: int = 0,
    mode: str = "offline",
    warn: Callable[[str], None] = _warn,
    **options: Any,
) -> BackgroundLogger:
    """The logger that follows along beside ``metrics.csv``. Takes 20 s at most, whatever the network and the disk do.

    Args:
        kind (str): ``"csv"`` for none, ``"tensorboard"`` or ``"wandb"``.
        folder (RunFolder): where it writes; a resumed run goes on in the same place, and in the same run of wandb.
        config (Mapping or None): the nested configuration, shown beside the values.

    Keyword Args:
        frames (int): what a resumed run starts from. Defaults to 0.
        mode (str): of wandb: ``"offline"`` (default), ``"online"``, which falls back to offline with a warning if the server
            can't be reached, or ``"disabled"``.
        warn (callable): see :class:`BackgroundLogger`.
        options: of :func:`wandb.init`: ``project``, ``entity``, ``group``, ``name``, ``tags``, ...

    Raises:
        ValueError: see :func:`check_logger`. Any other failure is told through ``warn``, and the logger is off.
    """
    check_logger(kind)
    if kind == "csv" or (kind == "wandb" and mode == "disabled"):
        return BackgroundLogger()
    try:
        if kind == "tensorboard":
            tracker = start_tensorboard(folder, config or {}, frames)
        else:
            tracker = start_wandb(folder, config or {}, mode, warn, options)
    except Exception as error:
        warn(f"{kind}: could not be started, and is off ({reason(error)}); metrics.csv has all values.")
        return BackgroundLogger()
    return BackgroundLogger(tracker, warn=warn)
