"""What a person sees of a run: what is about to happen, a progress bar, a line per evaluation, and a summary.

It must never be the reason that a run ends: a terminal that has gone away, or a full disk under a log file, is ignored.
"""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

import numpy as np
from tqdm import tqdm

BAR_SECONDS, LINE_SECONDS, WINDOW_SECONDS = 0.1, 60.0, 10.0


class Terminal:
    """Everything that a run prints; close it at the end (it is a context manager).

    On a terminal there is a progress bar, refreshed ten times a second at most; in a log file a line a minute instead.

    Args:
        total_frames (int): of the run.
        initial_frames (int): what a resumed run starts from. Defaults to 0.

    Keyword Args:
        enabled (bool): show the progress; everything else is printed in any case. Defaults to ``True``.
        file (text file or None): where to print. Defaults to ``sys.stderr``.
    """

    def __init__(self, total_frames: int, initial_frames: int = 0, *, enabled: bool = True, file: TextIO | None = None):
        self.total_frames, self.frames, self.updates = total_frames, initial_frames, 0
        self._file = sys.stderr if file is None else file
        self._start = time.monotonic()
        self._returns: dict[str, float | None] = {"episode": None, "eval": None}
        # Rates are of the last seconds, not of the whole run: it begins with random frames, which are much faster.
        self._window: deque[tuple[float, int, int]] = deque()
        self._bar: tqdm | None = None
        self._on_terminal = self._file.isatty()
        self._pause = (BAR_SECONDS if self._on_terminal else LINE_SECONDS) if enabled else math.inf
        self._next = self._start + (0.0 if self._on_terminal and enabled else self._pause)

    def header(self, rows: Mapping[str, object], title: str = "") -> None:
        """What is about to run: two aligned columns."""
        self._block(rows, title)

    def summary(self, rows: Mapping[str, object], title: str = "") -> None:
        """What was run: two aligned columns, in place of the progress bar."""
        self.close()
        self._block(rows, title)

    def line(self, text: str = "") -> None:
        """A line, above the progress bar."""
        with suppress(OSError):
            if self._bar is None:
                print(text, file=self._file, flush=True)
            else:
                self._bar.write(text, file=self._file)

    def update(self, frames: int, updates: int, episode_return: float | None = None, eval_return: float | None = None) -> None:
        """Show the progress. Cheap: for each frame.

        Args:
            frames (int): since the start of the run.
            updates (int): since then.
            episode_return, eval_return (float or None): the newest ones. ``None`` keeps the last.
        """
        self.frames, self.updates = frames, updates
        if episode_return is not None:
            self._returns["episode"] = episode_return
        if eval_return is not None:
            self._returns["eval"] = eval_return
        now = time.monotonic()
        if not self._window:
            self._window.append((now, frames, updates))
        if now >= self._next:
            self._next = now + self._pause
            self._refresh(now)

    def evaluation(self, frames: int, metrics: Mapping[str, float], seconds: float | None = None) -> None:
        """A line with the mean return, its standard deviation over the subnets, and the length.

        Args:
            frames (int): since the start of the run.
            metrics (Mapping): ``eval/return`` and, if there, ``eval/length`` and ``eval/return_subnet_k``.
            seconds (float or None): since then. ``None`` counts from the start of this process.
        """
        seconds = time.monotonic() - self._start if seconds is None else seconds
        subnets = [value for name, value in metrics.items() if name.startswith("eval/return_subnet_")]
        with np.errstate(invalid="ignore"):  # of returns that are not finite
            spread = f" ± {np.std(subnets):<7.1f}" if len(subnets) > 1 else ""
        text = f"{frames:>11,} frames   return {metrics['eval/return']:>9.1f}{spread}"
        if "eval/length" in metrics:
            text += f"   length {metrics['eval/length']:>6.1f}"
        self.line(f"{text}   {seconds / 60:>6.1f} min")
        self._returns["eval"] = metrics["eval/return"]

    def close(self) -> None:
        """Take the progress bar away."""
        self._next = math.inf
        with suppress(OSError):
            if self._bar is not None:
                self._bar.close()
        self._bar = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _refresh(self, now: float) -> None:
        self._window.append((now, self.frames, self.updates))
        while len(self._window) > 2 and self._window[1][0] <= now - WINDOW_SECONDS:
            self._window.popleft()
        before, frames, updates = self._window[0]
        seconds = max(now - before, 1e-9)
        narrow = self._on_terminal and shutil.get_terminal_size().columns < 110
        text = self._progress((self.frames - frames) / seconds, (self.updates - updates) / seconds, narrow)
        if not self._on_terminal:
            self.line(f"{100 * self.frames / self.total_frames:3.0f}%  {text}")
            return
        with suppress(OSError):
            if self._bar is None:
                bar_format = "{percentage:3.0f}%|{bar}| {desc}"
                self._bar = tqdm(
                    total=self.total_frames, file=self._file, bar_format=bar_format, dynamic_ncols=True, leave=False
                )
            self._bar.n = self.frames
            self._bar.set_description_str(text, refresh=False)
            self._bar.refresh(nolock=True)  # the lock would stay held if the terminal has gone away

    def _progress(self, frame_rate: float, update_rate: float, narrow: bool) -> str:
        rates, episode = ("{} f/s, {} u/s", "ep") if narrow else ("{} frames/s, {} updates/s", "episode")
        left = duration((self.total_frames - self.frames) / frame_rate) if frame_rate else "?"
        parts = [
            f"{self.frames:,}/{count(self.total_frames)}",
            f"{left} left",
            rates.format(count(frame_rate), count(update_rate)),
        ]
        for name, value in zip((episode, "eval"), self._returns.values(), strict=True):
            if value is not None:
                parts.append(f"{name} {value:.0f}")
        return ", ".join(parts)

    def _block(self, rows: Mapping[str, object], title: str) -> None:
        if title:
            self.line(title)
        width = max(map(len, rows), default=0)
        room = max(20, shutil.get_terminal_size().columns - width - 4)
        for name, value in rows.items():
            first, *more = textwrap.wrap(str(value), room, break_long_words=False, break_on_hyphens=False) or [""]
            self.line(f"  {name:<{width}}  {first}".rstrip())
            for text in more:
                self.line(" " * (width + 4) + text)


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
