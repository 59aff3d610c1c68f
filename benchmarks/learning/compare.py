"""Evaluation returns of runs, beside published curves at the same frames.

    python benchmarks/learning/compare.py RUN_FOLDER ... --reference published_curves.csv --output curves.png

The reference is any CSV with the columns ``method,env,seed,env_step,return``; it is drawn dashed and never mixed with the runs,
whose protocol differs. Prints a table of both.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from omnet_torchrl.training.config import load_config
from omnet_torchrl.training.logging import read_metrics

Curve = tuple[list[int], list[float]]


def read_reference(path: Path, method: str, env: str) -> dict[str, Curve]:
    """Seed to its curve."""
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    with path.open() as file:
        for row in csv.DictReader(file):
            if (row["method"], row["env"]) == (method, env):
                curves[row["seed"]][0].append(int(row["env_step"]))
                curves[row["seed"]][1].append(float(row["return"]))
    if not curves:
        raise SystemExit(f"error: {path} has no {method} on {env}.")
    return dict(curves)


def draw(runs: dict[str, Curve], reference: dict[str, Curve], label: str, title: str, path: Path) -> None:
    """The picture, up to the last frame of the runs."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    end = max(frames[-1] for frames, _ in runs.values())
    for i, (frames, returns) in enumerate(reference.values()):
        axes.plot(frames, returns, color="0.6", linestyle="--", linewidth=0.8, label=label if i == 0 else None)
    for name, (frames, returns) in runs.items():
        axes.plot(frames, returns, linewidth=2, label=name)
    top = max(max(returns) for frames, returns in [*runs.values(), *reference.values()] if frames[0] <= end)
    axes.set(xlim=(0, end), ylim=(0, 1.05 * top), xlabel="frames", ylabel="evaluation return", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def table(runs: dict[str, Curve], reference: dict[str, Curve], method: str) -> str:
    """Markdown: at each evaluation of the reference, the runs' newest and the reference's lowest, median, highest."""
    lines = [f"| frames | {' | '.join(runs)} | {method}: lowest, median, highest |", "|---" * (len(runs) + 2) + "|"]
    end = max(frames[-1] for frames, _ in runs.values())
    for frames in sorted({frame for curve, _ in reference.values() for frame in curve if 1 < frame <= 1.15 * end}):
        published = [returns[curve.index(frames)] for curve, returns in reference.values() if frames in curve]
        ours = [[value for frame, value in zip(*curve, strict=True) if frame <= frames] for curve in runs.values()]
        cells = [f"{values[-1]:.0f}" if values else "-" for values in ours]
        spread = f"{min(published):.0f}, {np.median(published):.0f}, {max(published):.0f} ({len(published)} seeds)"
        lines.append(f"| {frames:,} | {' | '.join(cells)} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with config.yaml and metrics.csv, all of one environment")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--method", default="REDQ_utd20")
    parser.add_argument("--label", default=None, help="of the reference, with its protocol")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    envs = sorted({load_config(run / "config.yaml").env for run in arguments.runs})
    if len(envs) > 1:
        parser.error(f"the runs must be of one environment, got {', '.join(envs)}.")
    env = envs[0]
    runs = {f"OMNet, {run.name}": read_metrics(run / "metrics.csv")["eval/return"] for run in arguments.runs}
    reference = read_reference(arguments.reference, arguments.method, env)
    draw(runs, reference, arguments.label or f"{arguments.method}, published", env, arguments.output)
    print(table(runs, reference, arguments.method))


if __name__ == "__main__":
    main()
