"""Everything that is told of a run while it goes on: to ``metrics.csv``, a tracker, the picture and the terminal."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.training.record.metrics import CSVLogger
from omnet_torchrl.training.record.plots import learning_curve
from omnet_torchrl.training.record.terminal import Terminal
from omnet_torchrl.training.record.trackers import BackgroundLogger, make_logger

PICTURE = 60.0  # seconds between two pictures: to draw one takes most of a second; the last one is drawn at the end


class Reporter:
    """What a :class:`~omnet_torchrl.training.Trainer` reports to; :meth:`begin` comes before the first report."""

    def __init__(self, folder: RunFolder, terminal: Terminal):
        self.folder, self.terminal = folder, terminal
        self._csv: CSVLogger | None = None
        self._logger, self._shown = BackgroundLogger(), False
        self._drawn, self._outdated = time.monotonic(), False

    def begin(self, kind: str, config: Mapping[str, Any], frames: int, **options: Any) -> None:
        """Open ``metrics.csv``, unless :meth:`restore` did, and start the tracker; see :func:`make_logger`."""
        if self._csv is None:
            path = self.folder.metrics_path
            if os.path.lexists(path):  # a link to nothing too
                names = (path.with_name(f"{path.name}.old{number or ''}") for number in itertools.count())
                kept = path.rename(next(name for name in names if not os.path.lexists(name)))
                self.say(f"what {path.name} had is in {kept.name}")
            self._csv = CSVLogger(path)
        self._logger = make_logger(kind, self.folder, config, frames=frames, warn=self.say, **options)

    def log(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Write metrics to ``metrics.csv`` and the tracker."""
        assert self._csv is not None
        self._csv.log(frames, seconds, metrics)
        self._logger.log(frames, seconds, metrics)
        if self._logger.place and not self._shown:
            self._shown = True
            self.say(f"{self._logger.name}: {self._logger.place}")
        if "eval/return" in metrics:
            self.terminal.evaluation(frames, metrics, seconds)
            self._outdated = True
            if time.monotonic() > self._drawn + PICTURE:
                self._draw()

    def _draw(self) -> None:
        try:
            learning_curve(self.folder.path)
        except Exception as error:  # a picture never ends a run
            self.say(f"warning: {self.folder.curve_path.name} could not be drawn: {error}")
        self._drawn, self._outdated = time.monotonic(), False

    def progress(self, frames: int, updates: int, metrics: Mapping[str, float]) -> None:
        """Move the progress bar; after each frame."""
        self.terminal.update(frames, updates, metrics.get("train/episode_return"), metrics.get("eval/return"))

    def say(self, text: str) -> None:
        """A line on the terminal."""
        self.terminal.line(text)

    def position(self) -> dict[str, Any]:
        """The fingerprint of ``metrics.csv``, on the disk.

        Raises:
            FileNotFoundError: it is not in the run's folder any more: nothing else that is written there would be found.
        """
        assert self._csv is not None
        if not self.folder.metrics_path.exists():
            raise FileNotFoundError(f"{self.folder.metrics_path} is gone: was it moved?")
        self._csv.sync()
        return self._csv.position

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on with ``metrics.csv`` from ``position``."""
        self._csv = CSVLogger(self.folder.metrics_path, position)

    def close_csv(self) -> bool:
        """Close ``metrics.csv``; whether it could be, which a full disk prevents."""
        try:
            if self._csv is not None:
                self._csv.close()
        except OSError as error:
            self.say(f"warning: {self.folder.metrics_path.name} could not be closed: {error}")
            return False
        return True

    def close(self) -> None:
        """Draw the last picture and close the tracker, which may take a while."""
        if self._outdated:
            self._draw()
        self._logger.close()

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Within, warnings are lines on the terminal."""
        before, warnings.showwarning = warnings.showwarning, lambda message, *_, **__: self.say(f"warning: {message}")
        try:
            yield
        finally:
            warnings.showwarning = before
