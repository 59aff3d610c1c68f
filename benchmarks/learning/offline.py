"""Offline: pathways beside a shared network and one with several heads, on recorded datasets; runs what is missing, in order.

    python benchmarks/learning/offline.py --commands      # the commands, one per line
    python benchmarks/learning/offline.py                 # in runs/offline: runs, datasets, then the cells
    python benchmarks/learning/offline.py --table         # mean and standard deviation over the seeds that are there

"Efficient Reinforcement Learning by Discovering Neural Pathways" (Arnob et al., 2024) asks it of Meta-World and HalfCheetah:
the return against the number of transitions, on medium-replay, medium, and medium with expert. Where a command is cut off, the
same command begins that step anew; a run goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[2]
TASKS = "HalfCheetah/forward+backward+velocity_0.5+velocity_2"
# A run that is stopped at a fifth is medium; its replay, all that it has seen until then.
RUNS = {"medium": 80_000, "expert": 400_000}
DATASETS = {"replay": "medium", "medium": "medium", "expert": "expert"}  # and the run that each is of
FRAMES = 400_000  # of an episode dataset, those of all tasks
MIXES = (("replay",), ("medium",), ("medium", "expert"))
SIZES = (1_000, 10_000, 50_000)
SEEDS = 3


def commands(folder: Path) -> list[tuple[Path, list[str]]]:
    """What each step makes, which is there when it is done, and its command."""
    python, steps = sys.executable, []
    for name, frames in RUNS.items():
        options = [
            "network.num_subnets=4",
            f"env={TASKS}",
            "utd_ratio=0.25",
            "init_random_frames=20_000",
            f"total_frames={frames}",
        ]
        made = [python, str(ROOT / "examples" / "multitask.py"), *options, "progress=false", f"folder={folder / 'runs' / name}"]
        steps.append((folder / "runs" / name / "run.json", [*made, "resume=auto"]))
    for name, run in DATASETS.items():
        source, target = folder / "runs" / run, folder / "data" / name
        played = [] if name == "replay" else ["--frames", str(FRAMES)]
        command = [python, "-m", "omnet_torchrl.training.datasets", str(source), str(target), *played]
        steps.append((target / "dataset.json", command))
    data = ["+".join(str(folder / "data" / name) for name in mix) for mix in MIXES]
    for seed in range(SEEDS):
        out = folder / f"seed{seed}"
        options = ["--sizes", *map(str, SIZES), "--seed", str(seed), "--out", str(out)]
        steps.append((out / "offline.csv", [python, str(ROOT / "examples" / "offline_tasks.py"), *data, *options]))
    return steps


def is_done(made: Path) -> bool:
    """Whether a step is done: of a run, which has a folder from its start on, whether it has finished."""
    return made.exists() and (made.name != "run.json" or json.loads(made.read_text())["status"] == "finished")


def table(folder: Path) -> str:
    """A row for each dataset, size and method: the mean return of the tasks or, where there is one, success, over seeds."""
    found: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for path in sorted(folder.glob("seed*/offline.csv")):
        with path.open() as file:
            for line in csv.DictReader(file):
                name = "+".join(Path(part).name for part in line["data"].split("+"))
                seeds = found.setdefault((name, line["row"], int(line["transitions"])), {})
                seeds.setdefault(line["seed"], []).append(float(line["success"] or line["return"]))
    lines = [
        "| data | row | transitions of each task | return or success, mean of the tasks | seeds |",
        "|---|---|---|---|---|",
    ]
    for (name, row, size), seeds in found.items():
        means = [fmean(values) for values in seeds.values()]
        digits = 0 if max(map(abs, means)) > 1 else 2
        spread = f" ± {stdev(means):.{digits}f}" if len(means) > 1 else ""
        lines.append(f"| {name} | {row} | {size:,} | {fmean(means):.{digits}f}{spread} | {len(means)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, list or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/offline"))
    parser.add_argument("--commands", action="store_true", help="print the commands that are missing")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    args = parser.parse_args(arguments)
    if args.table:
        print(table(args.folder))
        return
    for made, command in commands(args.folder.resolve()):
        if is_done(made):
            continue
        if args.commands:
            print(shlex.join(command))
        else:
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
