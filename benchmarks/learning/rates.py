"""How long cells take here: seconds per frame of each row and task, measured once and kept in ``rates.csv``.

A frame before the first update costs less than one after it; both are measured, in a short run of the example on the share of
the cores that a job gets. Several jobs at once share memory and caches too: measured beside none, what they take is longer. The
load of the machine meanwhile is in the file.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from csv_files import finite, read_rows
from experiments import Cell

from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.record.metrics import read_metrics

NUMBERS = ("random_seconds", "seconds", "update_seconds")
COLUMNS = ("machine", "device", "threads", "row", "task", *NUMBERS, "frames", "date", "load")
INIT, FRAMES = 512, 64  # of a measurement: random frames, then frames with updates; multiples of a row's environments


class Rate(NamedTuple):
    """Seconds per random frame, per frame with updates, and per update in such a frame, everything of it included."""

    random: float
    training: float
    update: float

    def seconds(self, cell: Cell, done: int = 0) -> float:
        """What is left of a cell."""
        init = int(dict(cell.variant.options).get("init_random_frames", TrainConfig.init_random_frames))
        return self.random * max(0, init - done) + self.training * max(0, cell.frames - max(done, init))


class Rates:
    """The rates of this machine that are known.

    Args:
        path (Path): a CSV file with ``COLUMNS``, of any number of machines.
        device (str): cpu or a GPU.
        threads (int): CPU threads of a job.
    """

    def __init__(self, path: Path, device: str, threads: int):
        self.path, self.device, self.threads = path, device, threads
        self.key = (machine(device), str(threads))
        self._known: dict[tuple[str, str], Rate] = {}
        for line in read(path) if path.exists() else ():
            if (line["machine"], line["threads"]) == self.key:
                self._known[line["row"], line["task"]] = Rate(*(line[name] for name in NUMBERS))

    def get(self, cell: Cell) -> Rate | None:
        """Of a cell's row and task; ``None`` where it is not known."""
        return self._known.get((cell.row, cell.task))

    def add(self, cell: Cell, rate: Rate) -> None:
        """Keep a rate, in the file too."""
        self._known[cell.row, cell.task] = rate
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.exists() else b""
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not before:
                writer.writerow(COLUMNS)
            elif not before.endswith(b"\n"):  # a row that was cut short stays alone
                file.write("\n")
            name, threads = self.key
            numbers = (f"{number:.6g}" for number in rate)
            when = datetime.now().astimezone().date().isoformat()
            load = f"{os.getloadavg()[0]:.2f}"  # processes that ran or waited in the last minute, this one among them
            writer.writerow([name, self.device, threads, cell.row, cell.task, *numbers, FRAMES, when, load])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``rates.csv``, of any machine; what is damaged is named in a warning, and left out."""
    try:
        return read_rows(path, {name: finite if name in NUMBERS else str for name in COLUMNS})
    except ValueError as error:
        warnings.warn(f"{path} is skipped: {error}", stacklevel=2)
        return []


def machine(device: str) -> str:
    """The GPU, or the CPU and its cores."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def measure(cell: Cell, device: str, threads: int, root: Path = Path()) -> Rate:
    """Of a short run, compiled as a long one is; ``root`` is where the cells are, one of which it may need."""
    with tempfile.TemporaryDirectory() as folder:
        frames = [f"total_frames={INIT + FRAMES}", f"init_random_frames={INIT}", "eval.interval=1000000", "eval.episodes=1"]
        frames += ["checkpoint.interval=0", "log_interval=20", "progress=false", f"folder={folder}/run"]
        machine_share = [f"device={device}", f"num_threads={threads}"]
        arguments = [*cell.variant.overrides(cell.task, cell.seed, INIT + FRAMES, root), *frames, *machine_share]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(cell.variant.example), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ValueError(f"{cell.path} can't be measured: {done.stderr.strip().splitlines()[-1]}")
        return of_metrics(Path(folder, "run", "metrics.csv"), INIT)


def of_metrics(path: Path, init: int) -> Rate:
    """The rates of a run that has just been through its random frames, from the logged frames and updates per second."""
    metrics = read_metrics(path)
    frames, per_second = metrics["time/frames_per_second"]
    seconds = [frame / rate for frame, rate in zip(frames, per_second, strict=True)]
    updates = [rate * now for rate, now in zip(metrics["time/updates_per_second"][1], seconds, strict=True)]
    training = (seconds[-1] - seconds[0]) / (frames[-1] - frames[0])
    random = max(0.0, seconds[0] - training * (frames[0] - init)) / init
    return Rate(random, training, (seconds[-1] - seconds[0]) / (updates[-1] - updates[0]))


def forecast(
    cells: Sequence[Cell],
    done: Callable[[Cell], int],
    rates: Rates,
    jobs: int,
    measure: Callable[[Cell, str, int], Rate] | None = None,
) -> str:
    """A Markdown table of how long some cells take, ``jobs`` at a time: evaluation, compiling and saving left out.

    Args:
        cells (sequence of Cell): what is missing.
        done (callable): frames that a cell has already.
        rates (Rates): what is known.
        jobs (int): cells at a time.
        measure (callable or None): measures a rate that is not known; ``None``: it is said to be unknown.
    """
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.task, cell.row].append(cell)
    lines = ["| task | row | cells | seconds per frame | ms per update | hours |", "|---|---|---|---|---|---|"]
    total, unknown = 0.0, 0
    for (task, row), group in sorted(groups.items()):
        rate = rates.get(group[0])
        if rate is None and measure is not None:
            print(f"measuring {row} on {task} ...", flush=True)
            rate = measure(group[0], rates.device, rates.threads)
            rates.add(group[0], rate)
        if rate is None:
            unknown += len(group)
            lines.append(f"| {task} | {row} | {len(group)} | not measured | | |")
            continue
        hours = sum(rate.seconds(cell, done(cell)) for cell in group) / 3600
        total += hours
        lines.append(f"| {task} | {row} | {len(group)} | {rate.training:.4f} | {1000 * rate.update:.2f} | {hours:.1f} |")
    missing = f", and {unknown} cells whose rate is not known" if unknown else ""
    lines.append(
        f"\n{total:.1f} hours of runs, {total / jobs:.1f} hours with {jobs} at a time{missing}. Measured on {rates.key[0]}, "
        f"{rates.threads} thread(s) each, beside what else ran there; evaluation, compiling and saving are left out."
    )
    return "\n".join(lines)
