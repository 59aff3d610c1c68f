"""The runs that there are: found by their ``metrics.csv``, told apart by their options, read from raw data alone."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from experiments import Cell, Variant
from scores import final_score

from omnet_torchrl.training.build import training_flops
from omnet_torchrl.training.options import TrainConfig, differences, load_config, to_config
from omnet_torchrl.training.options.rows import dropout
from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.training.record.metrics import read_metrics

SIZES = {
    **{"Hopper-v4": (11, 3), "Walker2d-v4": (17, 6), "Ant-v4": (27, 8), "Humanoid-v4": (376, 17)},
    **{"InvertedDoublePendulum-v4": (11, 1), "Maze2D": (2, 2), "HalfCheetah-v4": (17, 6)},
    "HalfCheetah/forward+backward+velocity_0.5+velocity_2": (17, 6),
}
Series = tuple[np.ndarray, np.ndarray]


@dataclass
class Record:
    """One run.

    Attributes:
        path (Path): its folder.
        config (TrainConfig): its options.
        status (str): finished, running, interrupted, diverged or failed.
        metrics (dict): name to frames and values.
    """

    path: Path
    config: TrainConfig
    status: str
    metrics: dict[str, tuple[list[int], list[float]]]

    @property
    def frames(self) -> int:
        """Of the last evaluation with a finite return."""
        frames, _ = self.curve("eval/return", math.inf)
        return frames[-1] if frames else 0

    @property
    def diverged(self) -> bool:
        """Whether it has stopped as diverged, or would not stop and ends with a return that is not finite."""
        _, returns = self.metrics.get("eval/return", ([], []))
        return self.status == "diverged" or bool(returns and not math.isfinite(returns[-1]))

    def curve(self, name: str, end: float) -> tuple[list[int], list[float]]:
        """The finite values of a metric up to a number of frames."""
        points = zip(*self.metrics.get(name, ([], [])), strict=True)
        within = [(frame, value) for frame, value in points if frame <= end and math.isfinite(value)]
        return [frame for frame, _ in within], [value for _, value in within]

    def score(self, total: int, name: str = "eval/return") -> float:
        """The mean of a metric at the end of ``total`` frames; a run that diverged before keeps its last value; else nan."""
        frames, values = self.curve(name, total)
        if self.diverged and self.frames < total:
            return values[-1] if values else float("nan")
        return final_score(frames, values, total) if self.frames >= total else float("nan")

    def hours(self, frames: np.ndarray) -> np.ndarray:
        """Wall-clock hours at some frames, resumes included, from the logged frames per second."""
        if "time/frames_per_second" not in self.metrics:  # a run that ended before its first update was logged
            return np.full(len(frames), np.nan)
        at, per_second = (np.asarray(series, dtype=float) for series in self.metrics["time/frames_per_second"])
        return np.interp(frames, [0, *at], [0, *(at / per_second / 3600)])

    def flops(self, frames: np.ndarray, exact: bool = True) -> np.ndarray:
        """Training FLOPs at some frames."""
        each = training_flops(self.config, *SIZES[self.config.env], exact=exact) * self.config.utd_ratio
        return each * np.maximum(0, np.asarray(frames) - self.config.init_random_frames)


def find(roots: Iterable[Path]) -> list[Record]:
    """All runs beneath some folders; one that can't be read is named in a warning, and left out."""
    records = []
    for root in roots:
        for path in sorted(Path(root).rglob("metrics.csv")):
            try:
                folder = RunFolder.open(path.parent)
                metrics = read_metrics(path)
                if not metrics.get("eval/return", ([], []))[0]:
                    raise ValueError("it has no evaluation yet")
                records.append(Record(path.parent, load_config(folder.config_path), folder.info["status"], metrics))
            except (OSError, ValueError) as error:
                warnings.warn(f"{path} is skipped: {error}", stacklevel=2)
    return records


def assign(records: Sequence[Record], cells: Sequence[Cell]) -> dict[Path, Record]:
    """Cell's path to the run that is this cell: the same options but for those that a resumed run may change.

    Where several are, the one in the cell's own folder, else the longest; the others are named in a warning.
    """
    by_task: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.config.env, record.config.seed].append(record)
    found = {}
    for cell in cells:
        same = [record for record in by_task[cell.task, cell.seed] if _is(record, cell.variant, cell.task)]
        same.sort(key=lambda record: (record.path.parts[-len(cell.path.parts) :] == cell.path.parts, record.frames))
        for other in same[:-1]:
            warnings.warn(f"{other.path} is left out: {same[-1].path} is the same cell", stacklevel=2)
        if same:
            found[cell.path] = same[-1]
    return found


def _is(record: Record, variant: Variant, task: str) -> bool:
    changed = differences(config_of(variant, task), _with_dropout(record.config))
    return not set(changed) - {"seed", "total_frames", "network.structure_run"}  # a path, which differs from place to place


@cache
def config_of(variant: Variant, task: str) -> TrainConfig:
    """The options of a row on a task, with the default number of frames and seed, and the dropout that ``null`` means."""
    return _with_dropout(to_config({**variant.nested(), "env": task}))


def _with_dropout(config: TrainConfig) -> TrainConfig:
    return replace(config, network=replace(config.network, dropout=dropout(config)))
