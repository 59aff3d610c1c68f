"""The picture of a run, drawn from its ``metrics.csv`` and nothing else.

``python -m omnet_torchrl.training.record.plots RUN_FOLDER`` draws it again. Nothing global of matplotlib is used or changed: a
picture can be drawn in the middle of a run, in any thread, without a display.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.training.record.metrics import read_metrics
from omnet_torchrl.training.record.terminal import count

# The small pictures: title, metric (with a *, all that begin so), colour, whether on a logarithmic scale. Those without values
# are left out.
PANELS = (
    ("critic loss", "train/loss_qvalue", "tab:red", True),
    ("Q value, mean of the batch", "train/qvalue", "tab:blue", False),
    ("temperature", "train/alpha", "tab:orange", True),
    ("entropy of the policy, nats", "train/entropy", "tab:green", False),
    ("disagreement of the subnets on Q", "subnets/q_std", "tab:purple", False),
    ("distance of their actions", "subnets/action_distance", "tab:brown", False),
    ("overlap of the masks with those before", "masks/overlap", "tab:cyan", False),
    ("overlap of the subnets' masks", "masks/overlap_subnets", "tab:pink", False),
    ("density of each layer", "masks/density_*", None, True),
)


def learning_curve(source: RunFolder | str | Path, path: str | Path | None = None, title: str | None = None) -> Path:
    """Draw the returns against the frames, and how losses and statistics went, as a PNG.

    The line is the mean return of an evaluation, the faint ones that of each subnet or, in their own colours, of each task, the
    dots are training episodes.

    Args:
        source (RunFolder, str or Path): a run's folder or a ``metrics.csv``.
        path (str, Path or None): of the picture. ``None`` (default): ``learning_curve.png`` beside the ``metrics.csv``.
        title (str or None): ``None`` (default): the environment and the seed, as ``run.json`` has them.

    Returns:
        Path: of the picture.
    """
    source = Path(source.path if isinstance(source, RunFolder) else source)
    metrics_path = source / "metrics.csv" if source.is_dir() else source
    metrics = {}
    for name, series in read_metrics(metrics_path).items():
        frames, values = map(np.asarray, series)
        if np.isfinite(values).any():
            metrics[name] = frames[np.isfinite(values)], values[np.isfinite(values)]
    panels = [(panel, lines) for panel in PANELS if (lines := fnmatch.filter(metrics, panel[1]))]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(9, 4.2 + 1.9 * rows), dpi=120, layout="constrained")
    figure.suptitle(_title(metrics_path.parent) if title is None else title, fontsize=12)
    grid = figure.add_gridspec(1 + rows, 3, height_ratios=[2.2] + [1] * rows)
    _draw_returns(figure.add_subplot(grid[0, :]), metrics)
    for i, (panel, lines) in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1 + i // 3, i % 3]), panel, {line: metrics[line] for line in lines})
    end = max((frames[-1] for frames, _ in metrics.values()), default=1)
    for axes in figure.axes:
        axes.set_xlim(0, end)
        axes.set_xlabel("frames", fontsize=9)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda frames, _: count(frames)))
        axes.xaxis.set_major_locator(MaxNLocator(8 if axes is figure.axes[0] else 4, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, metrics_path.with_name("learning_curve.png") if path is None else Path(path))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; whoever looks at it meanwhile sees a whole picture, the old one or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    return temporary.replace(path)


def _title(folder: Path) -> str:
    try:
        info = RunFolder.open(folder).info
    except ValueError:
        info = {}
    parts = [text.format(info[name]) for name, text in (("env", "{}"), ("seed", "seed {}")) if name in info]
    return ", ".join(parts) or folder.resolve().name


def _draw_returns(axes: Axes, metrics: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    if "train/episode_return" in metrics:
        axes.plot(*metrics["train/episode_return"], ".", color="0.6", alpha=0.5, markersize=2.5, label="training episode")
    subnets = [series for name, series in sorted(metrics.items()) if name.startswith("eval/return_subnet_")]
    for i, series in enumerate(subnets):
        axes.plot(*series, color="tab:blue", alpha=0.25, linewidth=0.9, label=None if i else "evaluation of each subnet")
    prefix = "eval/return_"
    tasks = [name for name in metrics if name.startswith(prefix)] if not subnets else []
    for i, name in enumerate(tasks, 1):  # the first colour is the mean's
        axes.plot(*metrics[name], ".-", color=f"C{i}", linewidth=1.2, label=name.removeprefix(prefix))
    if "eval/return" in metrics:
        axes.plot(
            *metrics["eval/return"], "o-", color="tab:blue", zorder=1, linewidth=2, markersize=3, label="evaluation, mean"
        )
    else:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", va="center", color="0.4")
    if axes.lines:
        axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_ylabel("return of an episode, undiscounted", fontsize=9)


def _draw_panel(axes: Axes, panel: tuple[str, str, str | None, bool], lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    label, name, colour, log = panel
    for line, (frames, values) in lines.items():
        of = line.removeprefix(name[:-1]).replace("_", " ") if len(lines) > 1 else None
        axes.plot(frames, values, color=colour, linewidth=0.8, marker="." if len(frames) < 30 else "", label=of)
    if len(lines) > 1:
        axes.legend(fontsize=6, frameon=False, ncols=2)
    axes.set_title(label, fontsize=9)
    every = np.concatenate([values for _, values in lines.values()])
    # Below a decade, a logarithmic axis has hardly a round number to show.
    if log and every.min() > 0 and every.max() > 10 * every.min():
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))


def main() -> None:
    """``python -m omnet_torchrl.training.record.plots RUN_FOLDER``."""
    parser = argparse.ArgumentParser(description="Draw a run's learning curve.")
    parser.add_argument("folder", help="a run's folder, or a metrics.csv")
    parser.add_argument("--path", help="of the picture; learning_curve.png beside the metrics.csv if not given")
    parser.add_argument("--title", help="environment and seed if not given")
    arguments = parser.parse_args()
    try:
        print(learning_curve(arguments.folder, arguments.path, arguments.title))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
