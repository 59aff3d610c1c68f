"""Figures 6 and 7: gathers the raw data of runs in the maze, and draws them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from experiments import Variant
from maze import (
    coverage_of_visits,
    read_trajectories,
    read_visits,
    trajectories_figure,
    visitation_figure,
    write_trajectories,
    write_visits,
)
from records import Record
from scores import Interval, mean_interval

from omnet_torchrl.training.record.checkpoint import Checkpointer

STEPS = (100, 500, 1_000)
Runs = Mapping[str, Mapping[str, Sequence[Record]]]


def draw(name: str, path: Path, variants: Sequence[Variant], runs: Runs) -> list[Path]:
    """The picture of ``fig6`` or ``fig7``; none where no run has the data."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.csv"
        (gather_visits if name == "fig6" else gather_trajectories)(source, variants, runs)
        if not source.exists():
            return []
        return [(visitation_figure if name == "fig6" else trajectories_figure)(source, path)]


def coverage(variants: Sequence[Variant], runs: Runs) -> str:
    """The fraction of the reachable cells that were visited, mean over seeds, as a Markdown table."""
    lines = [f"| coverage after steps | {' | '.join(f'{steps:,}' for steps in STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.csv"
        gather_visits(source, variants, runs)
        visits = read_visits(source) if source.exists() else {}
    for actor, seeds in visits.items():
        cells = []
        for steps in STEPS:
            covered = list(coverage_of_visits(seeds, steps).values())
            cells.append(f"{_percent(mean_interval(covered))} (n={len(covered)})" if covered else "missing")
        lines.append(f"| {actor} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(interval: Interval) -> str:
    value, low, high = (f"{number:.1%}" for number in interval)
    return value if low == "nan%" else f"{value} [{low}, {high}]"


def gather_visits(target: Path, variants: Sequence[Variant], runs: Runs) -> None:
    """One file of all runs' ``visits.csv``; one that is missing is made from the replay buffer in the run's checkpoint."""
    for variant in variants:
        for record in runs.get(variant.name, {}).get("Maze2D", []):
            try:
                own = _visits(record, variant)
                seeds = {seed: way for ways in read_visits(own).values() for seed, way in ways.items()}
            except (OSError, ValueError) as error:
                warnings.warn(f"{record.path} is left out of figure 6: {error}", stacklevel=2)
                continue
            for seed, way in seeds.items():
                write_visits(target, variant.label, seed, way)


def _visits(record: Record, variant: Variant) -> Path:
    """The run's ``visits.csv``, made where it is missing."""
    own = record.path / "visits.csv"
    if not own.exists():
        temporary = own.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        write_visits(temporary, variant.label, record.config.seed, _positions(record))
        temporary.replace(own)
    return own


def _positions(record: Record) -> torch.Tensor:
    """Where the first steps of the policy led, from the replay buffer of the newest checkpoint."""
    checkpoints = record.path / "checkpoints"
    loaded = Checkpointer(checkpoints).load() if checkpoints.exists() else None
    first = record.config.init_random_frames
    if loaded is None or loaded[0]["frames"] < first + STEPS[-1]:
        raise ValueError(f"it has neither visits.csv nor a checkpoint with {STEPS[-1]} steps of the policy.")
    segments = [torch.load(path, weights_only=True)["data"]["next.observation"] for path in loaded[1]]
    return torch.cat(segments)[first : first + STEPS[-1]]


def gather_trajectories(target: Path, variants: Sequence[Variant], runs: Runs) -> None:
    """One file of the ``trajectories.csv`` of OMNet's runs."""
    for record in runs.get("omnet", {}).get("Maze2D", []):
        own = record.path / "trajectories.csv"
        try:
            ways_of = read_trajectories(own)
        except (OSError, ValueError) as error:
            warnings.warn(f"{record.path} is left out of figure 7: {error}", stacklevel=2)
            continue
        for seed, updates in ways_of.items():
            for number, ways in updates.items():
                write_trajectories(target, seed, number, ways)
