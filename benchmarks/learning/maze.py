"""The files and the pictures of the 2D maze: where agents have been, and which ways the subnetworks of an actor go.

Figures 5a, 6 and 7 of the paper (https://arxiv.org/abs/2310.14009), the last two drawn from a CSV file and nothing else. A file
has a record per position. The positions of a way follow each other in order. A way that comes twice, because an experiment was
killed and went on, counts as it stands last.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from omnet_torchrl.envs import ENCLOSURE, GOAL, GOAL_RADIUS, START, Maze2DEnv, Walls
from omnet_torchrl.metrics import coverage, trajectory_diversity, visitation
from omnet_torchrl.training.loop.evaluation import TRAJECTORIES, write_trajectories
from omnet_torchrl.training.record.files import append_positions
from omnet_torchrl.training.record.plots import save

__all__ = ["read_trajectories", "read_visits", "write_trajectories", "write_visits"]  # the files; the rest are pictures
VISITS = ("actor", "seed", "step", "x", "y")


def write_visits(path: str | Path, actor: str, seed: int, positions: Tensor) -> None:
    """Append where an agent came, step by step ``(T, 2)``, to a CSV file.

    Args:
        path (str or Path): of the file.
        actor (str): the line of pictures that it belongs to, e.g. ``"OMNet"``.
        seed (int): of the run.
        positions (Tensor): after each of the first T steps that the policy took; random steps of the start don't belong to it.
    """
    append_positions(Path(path), VISITS, ((actor, seed, t, x, y) for t, (x, y) in enumerate(positions.tolist(), start=1)))


def read_trajectories(path: str | Path) -> dict[int, dict[int, Tensor]]:
    """Seed to updates to the ways ``(N, T + 1, 2)`` of a file of :func:`write_trajectories`.

    Raises:
        ValueError: the file is none, or a record of it is damaged or missing.
    """
    ways: dict[int, dict[int, list[Tensor]]] = {}
    for (seed, updates, _), way in sorted(_read(path, TRAJECTORIES, (int, int, int, int), first=0).items()):
        ways.setdefault(seed, {}).setdefault(updates, []).append(way)
    lengths = {(seed, updates, len(way)) for seed in ways for updates in ways[seed] for way in ways[seed][updates]}
    if len(lengths) != sum(len(of_seed) for of_seed in ways.values()):
        raise ValueError(f"{path} has ways of different lengths for one seed and number of updates: is it cut short?")
    return {seed: {updates: torch.stack(each) for updates, each in of_seed.items()} for seed, of_seed in ways.items()}


def read_visits(path: str | Path) -> dict[str, dict[int, Tensor]]:
    """Actor to seed to positions ``(T, 2)`` of a file of :func:`write_visits`; actors as they come.

    Raises:
        ValueError: the file is none, or a record of it is damaged or missing.
    """
    visits: dict[str, dict[int, Tensor]] = {}
    for (actor, seed), way in _read(path, VISITS, (str, int, int), first=1).items():
        visits.setdefault(actor, {})[seed] = way
    return visits


def coverage_of_visits(visits: Mapping[int, Tensor], steps: int, bins: int = 30, walls: Walls = ENCLOSURE) -> dict[int, float]:
    """Seed to the fraction of the reachable cells that its first ``steps`` steps came to; seeds with fewer are left out."""
    reachable = Maze2DEnv(walls=walls).reachable(bins)
    whole = {seed: position[:steps] for seed, position in visits.items() if len(position) >= steps}
    return {seed: float(coverage(visitation(position, bins), reachable)) for seed, position in whole.items()}


def draw_maze(axes: Axes, walls: Walls = ENCLOSURE) -> None:
    """Draw the map (figure 5a): the square with its walls, the start and the goal, an orange disc."""
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_linewidth(2)
    for first, second in walls:
        axes.plot(*zip(first, second, strict=True), color="black", linewidth=2, solid_capstyle="round", zorder=3)
    axes.add_patch(
        Circle(GOAL, GOAL_RADIUS, facecolor=to_rgba("tab:orange", 0.3), edgecolor="tab:orange", linewidth=1.5, zorder=1)
    )
    axes.plot(*START, marker="o", color="black", markersize=4, linestyle="", zorder=4)


def map_figure(path: str | Path, walls: Walls = ENCLOSURE) -> Path:
    """The map alone, as a PNG."""
    figure = Figure(figsize=(3, 3), dpi=120, layout="constrained")
    draw_maze(figure.add_subplot(), walls)
    return save(figure, Path(path))


def trajectories_figure(source: str | Path, path: str | Path, walls: Walls = ENCLOSURE) -> Path:
    """Figure 7: the ways of all subnetworks, a row of maps per seed and a column per number of updates; as a PNG.

    Args:
        source (str or Path): a file of :func:`write_trajectories`.
        path (str or Path): of the picture.
        walls: of the maze.
    """
    seeds = read_trajectories(source)
    columns = sorted({updates for ways in seeds.values() for updates in ways})
    figure, grid = _maps(len(seeds), len(columns))
    for (seed, ways), row in zip(seeds.items(), grid, strict=True):
        row[0].set_ylabel(f"seed {seed}", fontsize=9)
        for updates, axes in zip(columns, row, strict=True):
            draw_maze(axes, walls)
            if updates in ways:
                _draw_ways(axes, ways[updates])
                axes.set_title(f"{updates:,} updates: {_summary(ways[updates])}", fontsize=8)
            else:
                axes.text(0.5, 0.05, "missing", ha="center", color="0.4", fontsize=8)
    handles, labels = max((axes.get_legend_handles_labels() for row in grid for axes in row), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return save(figure, Path(path))


def visitation_figure(
    source: str | Path,
    path: str | Path,
    steps: Sequence[int] = (100, 500, 1000),
    bins: int = 30,
    walls: Walls = ENCLOSURE,
) -> Path:
    """Figure 6: visit frequencies on a grid, mean over seeds, a row per actor and a column per number of steps; as a PNG.

    A column has one scale, of square roots, which ends at the 98th percentile of the cells visited. The numbers above a map
    are the fraction of the reachable cells that a seed came to: mean, lowest, highest.

    Args:
        source (str or Path): a file of :func:`write_visits`.
        path (str or Path): of the picture.
        steps (sequence of int): how many of the first steps count. Defaults to the paper's 100, 500, 1000.
        bins (int): cells along x and along y. Defaults to 30.
        walls: of the maze.
    """
    visits = read_visits(source)
    figure, grid = _maps(len(visits), len(steps))
    for column, count in zip(grid.T, steps, strict=True):
        maps = {actor: _frequency(seeds, count, bins) for actor, seeds in visits.items()}
        # The start, where every episode begins, would leave nothing to see of the rest.
        shown = np.concatenate([frequency[frequency > 0] for frequency in maps.values()])
        scale = PowerNorm(0.5, 0, np.quantile(shown, 0.98) if len(shown) else 1)
        for (actor, seeds), axes in zip(visits.items(), column, strict=True):
            draw_maze(axes, walls)
            covered = list(coverage_of_visits(seeds, count, bins, walls).values())
            if not covered:
                axes.text(0.5, 0.05, "missing", ha="center", color="0.4", fontsize=8)
                continue
            axes.imshow(maps[actor], origin="lower", extent=(0, 1, 0, 1), cmap="Reds", norm=scale, zorder=0)
            spread = f"{np.mean(covered):.1%} of the cells ({min(covered):.1%} to {max(covered):.1%})"
            axes.set_title(f"{count:,} steps, {len(covered)} seed{'s' * (len(covered) > 1)}:\n{spread}", fontsize=8)
    for actor, axes in zip(visits, grid[:, 0], strict=True):
        axes.set_ylabel(actor, fontsize=9)
    return save(figure, Path(path))


def _frequency(seeds: Mapping[int, Tensor], steps: int, bins: int) -> np.ndarray:
    """How often the first steps came to each cell, mean over the seeds that have so many; zeros where none has."""
    counts = [visitation(position[:steps], bins) / steps for position in seeds.values() if len(position) >= steps]
    return torch.stack(counts or [torch.zeros(bins, bins)]).mean(0).numpy()


def _maps(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(2.6 * max(columns, 1), 2.7 * max(rows, 1) + 0.3), dpi=120, layout="constrained")
    return figure, figure.subplots(max(rows, 1), max(columns, 1), squeeze=False)


def _draw_ways(axes: Axes, ways: Tensor) -> None:
    for subnet, way in enumerate(ways.numpy()):
        colour = f"C{subnet % 10}"
        axes.plot(*way.T, ".-", label=f"subnet {subnet}", color=colour, linewidth=1, markersize=2.5)
        axes.plot(*way[-1], "x", color=colour, markersize=5, zorder=5)


def _summary(ways: Tensor) -> str:
    there = int(((ways[:, -1] - torch.tensor(GOAL)).norm(dim=-1) < GOAL_RADIUS).sum())
    return f"{there} of {len(ways)} there,\ndiversity {float(trajectory_diversity(ways)):.3f}"


def _read(path: str | Path, header: Sequence[str], types: Sequence[type], first: int) -> dict[tuple[Any, ...], Tensor]:
    """What stands before ``step`` in a record, to the positions ``(T, 2)`` of its steps, which count from ``first``."""
    series: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    with Path(path).open(newline="") as file:
        rows = csv.reader(file)
        found = next(rows, [])
        if found != list(header):
            raise ValueError(f"{path} must begin with {','.join(header)!r}, got {','.join(found)!r}.")
        for row in rows:
            try:
                *key, step, x, y = (read(text) for read, text in zip((*types, float, float), row, strict=True))
            except ValueError:
                raise ValueError(f"{path}, line {rows.line_num}: expected {','.join(header)}, got {','.join(row)!r}.") from None
            if step == first:
                series[tuple(key)] = []
            before = series.get(tuple(key), [])
            if step != first + len(before):
                raise ValueError(f"{path}, line {rows.line_num}: expected step {first + len(before)} of {key}, got {step}.")
            before.append((x, y))
    return {key: torch.tensor(points) for key, points in series.items()}
