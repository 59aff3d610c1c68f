"""What a person sees of a run: a header, the progress, a line per evaluation, and a summary.

It must never be the reason that a run ends: a terminal that has gone away, or a full disk under a log file, is ignored.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

import numpy as np
from tqdm.auto import tqdm

# Seconds between two displays, on a terminal and in a log file, and what the newest of them weighs in the rate: it is that of
# the last seconds, not of the whole run, which begins with random frames and is much faster there.
BAR, LINES = (0.1, 0.02), (60.0, 1.0)
NOTEBOOK = any(each.__module__ == "tqdm.notebook" for each in tqdm.__mro__)  # whose bar is no text


class _Progress(tqdm):
    """A bar on a terminal or in a notebook; in a log file, a line each time. It ignores a file that can't be written."""

    def display(self, msg: str | None = None, pos: int | None = None, **options: Any) -> None:
        with suppress(OSError):
            if NOTEBOOK or self.fp.isatty():
                super().display(msg, pos, **options)
            elif msg is None:
                print(self, file=self.fp, flush=True)


class Terminal:
    """Everything that a run prints; close it at the end.

    On a terminal or in a notebook there is a progress bar, refreshed ten times a second at most; in a log file a line a
    minute instead.

    Args:
        total_frames (int): of the run.
        enabled (bool): show the progress; everything else is printed in any case. Defaults to ``True``.
        file (text file or None): where to print. Defaults to ``sys.stderr``.
    """

    def __init__(self, total_frames: int, *, enabled: bool = True, file: TextIO | None = None):
        self.total_frames, self.enabled = total_frames, enabled
        self._file = file or sys.stderr or io.StringIO()  # a process may be started without one
        self._start = time.monotonic()
        self._bar: _Progress | None = None

    def block(self, fields: Mapping[str, object], title: str = "") -> None:
        """Two aligned columns: the header, or the summary, in place of the progress bar."""
        self.close()
        if title:
            self.line(title)
        width = max(map(len, fields), default=0)
        room = max(20, shutil.get_terminal_size().columns - width - 4)
        for name, value in fields.items():
            first, *more = textwrap.wrap(str(value), room, break_long_words=False, break_on_hyphens=False) or [""]
            self.line(f"  {name:<{width}}  {first}".rstrip())
            for text in more:
                self.line(" " * (width + 4) + text)

    def line(self, text: str = "") -> None:
        """A line, above the progress bar."""
        with suppress(OSError):
            if self._bar is None or not self._file.isatty():
                print(text, file=self._file, flush=True)
            else:
                self._bar.write(text, file=self._file)

    def update(self, frames: int, updates: int, episode_return: float | None = None, eval_return: float | None = None) -> None:
        """Show the progress since the start of the run, and the newest returns, where there are any. Cheap: for each frame."""
        if not self.enabled:
            return
        if self._bar is None:
            seconds, smoothing = BAR if NOTEBOOK or self._file.isatty() else LINES
            shown: dict[str, Any] = {"total": self.total_frames, "initial": frames, "unit": " frames", "dynamic_ncols": True}
            pace = {"mininterval": seconds, "miniters": 1, "delay": seconds, "smoothing": smoothing}
            self._bar = _Progress(**shown, **pace, file=self._file, leave=False)
        returns = {"episode": episode_return, "eval": eval_return}
        texts = {name: f"{value:.0f}" for name, value in returns.items() if value is not None}
        self._bar.set_postfix({**texts, "updates": f"{updates:,}"}, refresh=False)
        with suppress(OSError):
            self._bar.update(frames - self._bar.n)

    def evaluation(self, frames: int, metrics: Mapping[str, float], seconds: float | None = None) -> None:
        """A line with the mean return, its standard deviation over the subnets, and the length, if there is one.

        ``seconds`` are those since the start of the run. ``None`` counts from the start of this process.
        """
        seconds = time.monotonic() - self._start if seconds is None else seconds
        subnets = [value for name, value in metrics.items() if name.startswith("eval/return_subnet_")]
        with np.errstate(invalid="ignore"):  # of returns that are not finite
            spread = f" ± {np.std(subnets):<7.1f}" if len(subnets) > 1 else ""
        text = f"{frames:>11,} frames   return {metrics['eval/return']:>9.1f}{spread}"
        if "eval/length" in metrics:
            text += f"   length {metrics['eval/length']:>6.1f}"
        prefix = "eval/return_"
        tasks = {} if subnets else {name.removeprefix(prefix): v for name, v in metrics.items() if name.startswith(prefix)}
        each = ", ".join(f"{task} {value:.1f}" for task, value in tasks.items())
        self.line(f"{text}   {seconds / 60:>6.1f} min{f'   ({each})' if each else ''}")

    def close(self) -> None:
        """Take the progress bar away."""
        with suppress(OSError):
            if self._bar is not None:
                self._bar.close()
        self._bar = None


def flush() -> None:
    """Write out what was printed, at a program's end, and drop what nobody reads: Python would end with an error of its own."""
    for file in filter(None, (sys.stdout, sys.stderr)):
        try:
            file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def count(number: float) -> str:
    """A number in at most five characters: 950, 1.5K, 300K, 1M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}" if abs(number) < 10 else f"{number:.0f}"


def duration(seconds: float) -> str:
    """A time as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shares(seconds: Mapping[str, float]) -> str:
    """Where the time went, the most first: ``update 81%, collect 12%``."""
    total = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * value / total:.0f}%" for name, value in ordered)
