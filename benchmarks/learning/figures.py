"""The figures of the report, from runs and reference curves; nothing global of matplotlib is used."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments import Variant
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox
from records import Record
from scores import Interval, common_curve, mean_interval

from omnet_torchrl.training.record.terminal import count

Runs = Mapping[str, Mapping[str, Sequence[Record]]]  # variant's name, task: a run for each seed
References = Mapping[str, Mapping[str, Sequence[tuple[Sequence[int], Sequence[float]]]]]  # label, task: curves
COLOURS = (
    *("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"),
    *("#393b79", "#637939"),
)
PLACES = ((8, 5), (8, -6), (8, 12), (8, -13), (-8, 5), (-8, -6), (-8, 12), (-8, -13), (0, 18), (0, -18))  # of a name, in points
SEED = {"linewidth": 0.7, "alpha": 0.55}  # of the line of one seed
AXES = {"frames": "frames", "hours": "wall-clock hours", "flops": "training PFLOPs (exact count)"}


def colours(variants: Sequence[Variant]) -> dict[str, str]:
    """A colour for each row, the same in every panel; OMNet's is red."""
    first = sorted(variants, key=lambda variant: variant.name != "omnet")
    return {variant.name: COLOURS[i % len(COLOURS)] for i, variant in enumerate(first)}


def curves(
    path: Path,
    title: str,
    variants: Sequence[Variant],
    tasks: Sequence[str],
    runs: Runs,
    end: int,
    *,
    axes: Sequence[str] = ("frames", "hours", "flops"),
    metric: str = "eval/return",
    label: str = "evaluation return",
    symlog: float | None = None,
    references: References | None = None,
) -> Path:
    """A metric of each row: a column per task, and below each other against frames, wall-clock and FLOPs.

    Thick lines are means over the seeds that have all frames, or, where none has, up to the last frame that every run has; thin
    ones are the seeds; shaded, from three seeds on, is Student's 95 % interval, cut where it leaves the panel. A cross is the
    last finite value of a run that has diverged. Reference curves are dashed, means and seeds, against frames alone. Where
    values go beyond ten times ``symlog``, those of the panel beyond ``symlog`` are on a logarithmic scale.
    """
    figure = Figure(figsize=(4.2 * len(tasks) + 0.4, 3.1 * len(axes) + 1.2), dpi=120, layout="constrained")
    grid = figure.subplots(len(axes), len(tasks), squeeze=False)
    colour = colours(variants)
    for row, axis in zip(grid, axes, strict=True):
        for panel, task in zip(row, tasks, strict=True):
            for variant in variants:
                records = runs.get(variant.name, {}).get(task, [])
                _line(panel, records, metric, axis, end, colour[variant.name], f"{variant.label} ({{}})")
            if axis == "frames":
                _reference(panel, references or {}, task, end)
                panel.set_xlim(0, end)
                panel.xaxis.set_major_formatter(FuncFormatter(lambda frames, _: count(frames)))
                panel.set_title(textwrap.fill(task.replace("+", " + "), 38))
            panel.set_xlabel(AXES[axis])
            largest = max((np.abs(line.get_ydata()).max() for line in panel.lines), default=0.0)
            if symlog is not None and largest > 10 * symlog:
                panel.set_yscale("symlog", linthresh=symlog)
            _dress(panel)
            _limit(panel)
            if metric.startswith("masks/overlap"):  # a share
                panel.set_ylim(0, 1.02)
        row[0].set_ylabel(label)
    _legend(figure, grid)
    figure.suptitle(textwrap.fill(title, 44 * len(tasks)))
    return _save(figure, path)


def bias(path: Path, title: str, panels: Sequence[Sequence[Variant]], task: str, runs: Runs, end: int) -> Path:
    """Value bias against frames, rows that overestimate apart from the others (figure 4)."""
    figure = Figure(figsize=(5 * len(panels), 4), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    colour = colours([variant for variants in panels for variant in variants])
    for i, (panel, variants) in enumerate(zip(grid[0], panels, strict=True)):
        for variant in variants:
            records = runs.get(variant.name, {}).get(task, [])
            _line(panel, records, "bias/mean", "frames", end, colour[variant.name], f"{variant.label} ({{}})")
        panel.axhline(0, color="0.3", linewidth=0.8)
        panel.set(xlabel="frames", xlim=(0, end), title=f"({'abc'[i]}) {task}")
        panel.set_yscale("symlog", linthresh=100) if i == 0 else None
        panel.xaxis.set_major_formatter(FuncFormatter(lambda frames, _: count(frames)))
        _dress(panel)
        if panel.lines[1:]:
            panel.legend(fontsize=8, frameon=False)
    grid[0][0].set_ylabel("value bias, Q - Monte-Carlo return")
    figure.suptitle(title)
    return _save(figure, path)


def scatter(path: Path, title: str, points: Mapping[str, tuple[float, Interval]], dots: Sequence[str] = ()) -> Path:
    """Score with its interval against FLOPs (figure 3): a point per row; ``dots`` are DroQ's dropout rates, green and small."""
    figure = Figure(figsize=(6.4, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (name, (flops, score)) in enumerate(sorted(points.items(), key=lambda item: item[1][0])):
        small = name in dots
        colour = "tab:green" if small else COLOURS[0] if name == "OMNet" else COLOURS[1 + i % 9]
        axes.plot(flops, score.value, "o", color=colour, markersize=5 if small else 9)
        if np.isfinite(score.low):
            axes.vlines(flops, score.low, score.high, color=colour, linewidth=1.2)
    axes.set(xlabel="training FLOPs of an update, relative to REDQ (paper's convention)", ylabel="score")
    axes.set_title(textwrap.fill(title, 84), fontsize=9)
    axes.margins(0.15)
    _dress(axes)
    _name(axes, {name: (flops, score.value) for name, (flops, score) in points.items()}, dots)
    return _save(figure, path)


def normalised(path: Path, title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], end: int) -> Path:
    """Scores over tasks against frames (figure 9): one panel, a line per row, its interval ``(3, F)`` shaded."""
    figure = Figure(figsize=(6.4, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (name, (frames, (mean, low, high))) in enumerate(sorted(lines.items(), key=lambda item: item[0] != "OMNet")):
        axes.plot(frames, mean, color=COLOURS[i % len(COLOURS)], linewidth=1.8, label=name)
        if np.isfinite(low).all():
            axes.fill_between(frames, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.12, linewidth=0)
    axes.set(xlabel="frames", ylabel="score", xlim=(0, end))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda frames, _: count(frames)))
    axes.set_title(textwrap.fill(title, 84), fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    _dress(axes)
    return _save(figure, path)


def against(path: Path, title: str, lines: Mapping[str, Mapping[float, Interval]], x: str, y: str) -> Path:
    """Means with intervals against a number (figure 8)."""
    figure = Figure(figsize=(5.6, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(sorted(lines.items(), key=lambda item: item[0] != "OMNet")):
        at = sorted(values)
        each = np.asarray([values[value] for value in at])
        known = np.isfinite(each[:, 1])
        axes.plot(at, each[:, 0], "o-", color=COLOURS[i], label=name)
        bars = np.abs(each[known, 1:].T - each[known, 0])
        axes.errorbar(np.asarray(at)[known], each[known, 0], bars, color=COLOURS[i], capsize=3, linestyle="")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.title.set_fontsize(10)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)
    _dress(axes)
    return _save(figure, path)


def _line(panel: Axes, records: Sequence[Record], metric: str, axis: str, end: int, colour: str, label: str) -> None:
    records = [record for record in records if record.curve(metric, end)[0]]
    for record in records:
        if record.diverged and record.frames < end:
            frames, values = record.curve(metric, end)
            panel.plot(_place([record], np.asarray(frames[-1:]), axis), values[-1:], "x", color=colour, markersize=8)
    going = [record for record in records if not record.diverged or record.frames >= end] or records
    going = [record for record in going if record.frames >= end] or going
    frames, values = common_curve([record.curve(metric, end) for record in going])
    if not len(frames):
        return
    for record in records if len(records) > 1 else ():
        steps, curve = record.curve(metric, end)
        panel.plot(_place([record], np.asarray(steps), axis), curve, color=colour, **SEED)
    intervals = np.asarray([mean_interval(column) for column in values.T])
    at = _place(going, frames, axis)
    shorter = f"{len(going)} of " * (len(going) < len(records))
    seeds = f"{shorter}{len(records)} seed" + "s" * (len(records) > 1)
    panel.plot(at, intervals[:, 0], color=colour, linewidth=1.8, label=label.format(seeds))
    if len(going) > 2:  # of two it is 13 standard errors wide: their lines say more
        panel.fill_between(at, intervals[:, 1], intervals[:, 2], color=colour, alpha=0.12, linewidth=0)


def _place(records: Sequence[Record], frames: np.ndarray, axis: str) -> np.ndarray:
    if axis == "hours":
        return np.mean([record.hours(frames) for record in records], 0)
    return records[0].flops(frames) / 1e15 if axis == "flops" else frames


def _reference(panel: Axes, references: References, task: str, end: int) -> None:
    for i, (label, tasks) in enumerate(references.items()):
        published = [_until(curve, end) for curve in tasks.get(task, [])]
        frames, values = common_curve(published)
        if not len(frames):
            continue
        grey = f"{0.15 + 0.18 * (i % 4)}"
        for curve in published:
            panel.plot(*curve, "--", color=grey, **SEED)
        panel.plot(frames, values.mean(0), "--", color=grey, linewidth=1.6, label=f"{label}, {len(published)} seeds")


def _until(curve: tuple[Sequence[int], Sequence[float]], end: int) -> tuple[list[int], list[float]]:
    """The points up to ``end``, and the first one after it, to which a line leads out of the panel."""
    frames, values = curve
    last = sum(frame < end for frame in frames) + 1
    return list(frames[:last]), list(values[:last])


def _name(axes: Axes, points: Mapping[str, tuple[float, float]], small: Sequence[str]) -> None:
    """Write beside each point what it is, where no other name or point is, if there is such a place."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # the layout, on which places on the canvas depend
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(list(points.values()))]
    for name, point in sorted(points.items(), key=lambda item: item[0] in small):
        for place in PLACES:
            across = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
            options: dict[str, Any] = {"textcoords": "offset points", "ha": across, "va": "center"}
            text = axes.annotate(name, point, place, fontsize=7 if name in small else 9, **options)
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in taken)
            if free and axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1:
                break
            if place is not PLACES[-1]:
                text.remove()
        taken.append(box)


def _limit(panel: Axes) -> None:
    """Fit the lines: the interval of a few seeds may be many times as wide, and is cut."""
    values = [np.asarray(line.get_ydata(), dtype=float) for line in panel.lines]
    if values:
        scale = panel.yaxis.get_transform()
        low, high = scale.transform([min(0, *(each.min() for each in values)), max(each.max() for each in values)])
        panel.set_ylim(*scale.inverted().transform([low - 0.1 * (high - low), high + 0.4 * (high - low) + 1e-9]))


def _dress(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _legend(figure: Figure, grid: Any) -> None:
    found = {}
    for panel in grid[0]:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        labels = [textwrap.fill(label, 64) for label in found]
        columns = min(4, grid.shape[1])
        figure.legend(found.values(), labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
