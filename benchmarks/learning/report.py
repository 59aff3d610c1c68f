"""Draw the paper's figures, and write a report, from the raw data of runs alone.

    python benchmarks/learning/report.py all                     # every figure that there are runs for, without training
    python benchmarks/learning/report.py fig2a --frames 30000    # at a smaller budget
    python benchmarks/learning/report.py fig2a --reference published_curves.csv --methods REDQ_utd20 \
        --protocol "REDQ_utd20=published, lr 1e-3, one evaluation episode"

Runs are found by their ``metrics.csv``, wherever they are beneath ``--results``, and told apart by their options. What is
missing is said. A reference is any CSV with the columns ``method,env,seed,env_step,return``; it is drawn dashed and never mixed
with the runs, whose protocol differs.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median_high
from typing import NamedTuple

import figures
import maze_pictures
import tables
from csv_files import finite, read_rows
from experiments import EXPERIMENTS, Experiment, known
from maze import map_figure
from records import SIZES, Record, assign, find
from settings import settings

from omnet_torchrl.training.options import ROWS

RESULTS = Path(__file__).resolve().parent / "results"
OWN_FIGURES = ("fig3", "fig5", "fig6", "fig7", "fig8")  # without the value bias
MASKS = {"overlap": "overlap with the masks before", "overlap_subnets": "overlap of the subnets' masks"}  # of those that change
OVERESTIMATING = ("sin_sac", "sin_droq", "sac_20")  # figure 4a


class Part(NamedTuple):
    """A section of a report: an experiment, where its runs are beneath ``--results`` and its pictures beneath ``--output``."""

    name: str
    runs: str = ""
    output: str = ""
    frames: int | None = None


# What `all` draws beside every experiment.
ALSO = (Part("fig5", output="maze_7000", frames=7_000), Part("fig2a", "hopper_60k", "hopper_60k"))


def read_reference(path: Path, methods: Sequence[str] | None, protocols: dict[str, str]) -> dict:
    """Published curves: label to task to a list of curves; a damaged row is named in a warning, and left out.

    Raises:
        ValueError: a file without the columns; an unknown method, which lists the known ones.
    """
    curves: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: ([], []))))
    columns = {"method": str, "env": str, "seed": str, "env_step": int, "return": finite}
    try:
        rows = read_rows(path, columns)
    except ValueError as error:
        raise ValueError(f"{path} is no table of published curves: {error}") from error
    for row in rows:
        frames, returns = curves[row["method"]][row["env"]][row["seed"]]
        frames.append(row["env_step"])
        returns.append(row["return"])
    chosen = known(methods or list(curves), list(curves), "method")
    known(protocols, list(curves), "method")
    label = {method: f"{method} ({protocols.get(method, 'published, its own protocol')})" for method in chosen}
    return {label[method]: {env: list(seeds.values()) for env, seeds in curves[method].items()} for method in chosen}


def group(experiment: Experiment, found: dict[Path, Record]) -> dict[str, dict[str, list[Record]]]:
    """Variant's name and task to the runs that there are."""
    runs: dict = defaultdict(lambda: defaultdict(list))
    for cell in experiment.cells(sorted({record.config.seed for record in found.values()})):
        if cell.path in found:
            runs[cell.variant.name][cell.task].append(found[cell.path])
    return runs


def budget(experiment: Experiment, runs: dict, frames: int | None) -> int:
    """The frames that are reported: those asked for, or as many as half of the runs of its own seeds have."""
    reached = [
        (record.config.seed, record.frames) for tasks in runs.values() for records in tasks.values() for record in records
    ]
    own = [number for seed, number in reached if seed < experiment.seeds]
    return frames or min(experiment.frames, median_high(own or [number for _, number in reached]))


def counted(experiment: Experiment, runs: dict, end: int) -> dict[str, dict[str, list[Record]]]:
    """The runs without those of further seeds that lack the frames."""
    kept: dict = defaultdict(lambda: defaultdict(list))
    for row, tasks in runs.items():
        for task, records in tasks.items():
            if own := [r for r in records if r.config.seed < experiment.seeds or math.isfinite(r.score(end))]:
                kept[row][task] = own
    return kept


def draw(name: str, experiment: Experiment, runs: dict, end: int, folder: Path, references: dict | None) -> list[Path]:
    """The pictures of an experiment."""
    suffix = "_reference" if references else ""
    path, title = folder / f"{name}{suffix}.png", f"{experiment.title} ({end:,} frames)"
    tasks = [task for task in experiment.tasks if any(runs[row].get(task) for row in runs)]
    variants = [variant for variant in experiment.variants if variant.name in runs]
    if name == "fig3":
        said, points = tables.points(variants, runs, end)
        dots = [variant.label for variant in variants if variant.name.startswith("droq-")]
        return [figures.scatter(path, f"{title}: {said}", points, dots)] if points else []
    if name == "fig4":
        panels = [[v for v in variants if (v.name in OVERESTIMATING) == first] for first in (True, False)]
        return [figures.bias(path, title, panels, task, runs, end) for task in tasks]
    if name in ("fig6", "fig7"):
        return maze_pictures.draw(name, path, variants, runs)
    if name == "fig5":
        return [figures.curves(path, title, variants, tasks, runs, end, axes=("frames",), references=references)]
    if name == "fig8":
        lines = tables.by_option(variants, runs, end, "observation_offset", 0.0)
        return [figures.against(path, title, lines, "scale of the noise", "evaluation return")]
    if name in ("fig9a", "fig9b"):
        said, lines = tables.score_curves(variants, runs, end)
        drawn = [figures.normalised(path, f"{title}: {said}", lines, end)] if lines else []
    else:
        counted = all(task in SIZES and ROWS[variant.algorithm].loss == "sac" for task in tasks for variant in variants)
        axes = ("frames", "hours", "flops") if counted else ("frames", "hours")
        drawn = [figures.curves(path, title, variants, tasks, runs, end, axes=axes, references=references)]
    for metric, label in MASKS.items():
        if any(f"masks/{metric}" in record.metrics for of_row in runs.values() for each in of_row.values() for record in each):
            options = {"axes": ("frames",), "metric": f"masks/{metric}", "label": label}
            drawn.append(figures.curves(folder / f"{name}_{metric}.png", title, variants, tasks, runs, end, **options))
    if with_bias(name, runs):
        options = {"axes": ("frames",), "metric": "bias/mean", "label": "value bias", "symlog": 100}
        drawn.append(
            figures.curves(folder / f"{name}_bias.png", f"Value bias ({end:,} frames)", variants, tasks, runs, end, **options)
        )
    return drawn


def with_bias(name: str, runs: dict) -> bool:
    """Whether an experiment's report has the value bias."""
    records = (record for of_row in runs.values() for records in of_row.values() for record in records)
    return name == "fig4" or (name not in OWN_FIGURES and any("bias/mean" in record.metrics for record in records))


def section(part: Part, found: dict[Path, Record], output: Path, references: dict | None) -> str:
    """The report of an experiment, and its pictures on the way; empty where there is no run of it, or none with the frames."""
    name, experiment = part.name, EXPERIMENTS[part.name]
    runs = group(experiment, found)
    reached = (record.frames for of_row in runs.values() for records in of_row.values() for record in records)
    if not runs or (part in ALSO and max(reached) < (part.frames or 0)):
        return ""
    end = budget(experiment, runs, part.frames)
    if not (runs := counted(experiment, runs, end)):
        return ""
    pictures = draw(name, experiment, runs, end, output / part.output, references)
    if name == "fig5" and not part.output:
        pictures.insert(0, map_figure(output / "fig5_map.png"))
    lines = [f"## {name}{f' ({part.output})' * bool(part.output)}: {experiment.title}", ""]
    lines += [f"![{name}]({picture.relative_to(output).as_posix()})" for picture in pictures]
    lines += ["", tables.returns(experiment.variants, experiment.tasks, runs, end)]
    if references:
        lines += ["", tables.references(references, experiment.tasks, end)]
    lines += ["", tables.aggregate(experiment.variants, runs, end)]
    if experiment.variants[0].name in ("omnet", "dapd"):
        lines += ["", tables.differences(experiment.variants, experiment.tasks, runs, end)]
    if name == "fig6":
        lines += ["", maze_pictures.coverage(experiment.variants, runs)]
    if name in ("table1", "fig10", "fig11"):
        lines += ["", tables.best_dropout(experiment.variants, experiment.tasks, runs, end)]
    if with_bias(name, runs):
        lines += ["", tables.bias(experiment.variants, experiment.tasks, runs, end)]
    lines += ["", tables.missing(experiment, runs, end, with_bias(name, runs)), ""]
    return "\n".join(lines)


def _beneath(records: Sequence[Record], roots: Sequence[Path], folder: str) -> list[Record]:
    return [record for record in records if any(record.path.is_relative_to(root / folder) for root in roots)]


def write(args: argparse.Namespace) -> Path:
    """The report ``report.md`` and its pictures."""
    names = list(EXPERIMENTS) if "all" in args.experiments else args.experiments
    known(names, [*EXPERIMENTS, "all"], "experiment")
    for text in args.protocol:
        if "=" not in text:
            raise ValueError(f"--protocol must be METHOD=text, got {text!r}.")
    protocols = dict(text.split("=", 1) for text in args.protocol)
    references = read_reference(args.reference, args.methods, protocols) if args.reference else None
    records = find(args.results)
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = sorted({record.config.seed for record in records})
    cells = {cell.path: cell for name in names for cell in EXPERIMENTS[name].cells(seeds)}
    parts = [Part(name, frames=args.frames) for name in names]
    parts += ALSO if "all" in args.experiments and not (references or args.frames) else ()
    found = {
        folder: assign(_beneath(records, args.results, folder), list(cells.values())) for folder in {p.runs for p in parts}
    }
    sections = {part: section(part, found[part.runs], args.output, references) for part in parts}
    empty = [part.name for part, text in sections.items() if not text and part not in ALSO]
    rates = next((root / "rates.csv" for root in args.results if (root / "rates.csv").exists()), None)
    head = [
        "# Results",
        "",
        tables.PROTOCOL.format(command=" ".join(["python", "benchmarks/learning/report.py", *args.experiments])),
    ]
    head += ["", "Without a run so far: " + (", ".join(empty) or "none") + "."]
    if references:
        head += [
            "",
            f"Dashed: {', '.join(references)}; from {args.reference.name}. Their protocol differs from the runs' here.",
        ]
    text = "\n".join([*head, "", *filter(None, sections.values()), tables.flops(rates), settings(), ""])
    path = args.output / "report.md"
    path.write_text(text)
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", help=f"{', '.join(EXPERIMENTS)} or all")
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS], help="folders with runs (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of report.md and the pictures (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, help="of each run (default: what half of the runs have)")
    parser.add_argument("--reference", type=Path, help="a CSV of published curves, to be drawn dashed")
    parser.add_argument("--methods", nargs="+", help="of the reference (default: all)")
    parser.add_argument("--protocol", action="append", default=[], help="METHOD=text, how a reference was measured")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and write."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    print(write(parse(arguments)))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
