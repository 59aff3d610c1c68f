r"""Run the cells of the paper's experiments that are missing; whatever interrupts it, the same command goes on.

    python benchmarks/learning/run.py fig2a fig2b --jobs 2                 # all of figure 2, two runs at a time
    python benchmarks/learning/run.py fig2a --frames 30000 --seeds 2       # a smaller budget; more frames later go on
    python benchmarks/learning/run.py fig2a --tasks Hopper-v4 --rows omnet redq
    python benchmarks/learning/run.py fig2a fig2b --dry-run                # how long it would take here, from measured rates
    python benchmarks/learning/run.py fig2a --commands                     # the commands of the missing cells, one per line

A cell is a run of an example (omnet_sac.py, omnet_td3.py or minatar_dqn.py) in ``<folder>/<task>/<row>/seed<k>``, with
checkpoints, resumed where it stopped. It is locked while it runs (``flock``, which ends with the last process that holds it):
several runners on one folder, on one machine or on several with a common file system, share the cells out. On a cluster, start
one runner per node; or let Hydra do it, with
``pip install hydra-submitit-launcher`` (or hydra-joblib-launcher) and

    python examples/omnet_sac.py -m hydra/launcher=submitit_slurm eval.bias_episodes=10 algorithm=omnet,redq \
        env=Hopper-v4,Ant-v4 'seed=range(10)'

Diverged runs are done: they stay as they are. Needs Linux.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import rates
import torch
from experiments import EXPERIMENTS, Cell, select

from omnet_torchrl.training.options import ROWS

RESULTS = Path(__file__).resolve().parent / "results"
WAIT_S = 1.0  # between two looks at a run that another cell needs
# What every cell measures beside its returns, and how.
WATCHED = ("eval.bias_episodes=10", "progress=false")


def state(folder: Path) -> dict[str, Any]:
    """What run.json says of a cell; empty where there is none, or none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / "run.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def frames_of(folder: Path) -> int:
    """How far a run has come; one that was killed goes on from its newest checkpoint."""
    saved = [int(path.stem.rpartition("_")[2]) for path in (folder / "checkpoints").glob("checkpoint_*.json")]
    return max([*saved, state(folder).get("frames", 0)])


def is_done(cell: Cell, root: Path) -> bool:
    """Whether a cell has its frames and their last evaluation, or has diverged on the way."""
    info = state(root / cell.path)
    status, frames = info.get("status"), info.get("frames", 0)
    return status == "diverged" or frames > cell.frames or (frames == cell.frames and status not in ("failed", "interrupted"))


def source(cell: Cell, root: Path) -> Path | None:
    """The folder of the run that a cell takes its structure from."""
    options = dict(each.split("=", 1) for each in cell.variant.overrides(cell.task, cell.seed, cell.frames, root))
    return Path(options["network.structure_run"]) if "network.structure_run" in options else None


def command(cell: Cell, root: Path, *options: str) -> list[str]:
    """What starts a cell, or goes on with it."""
    folder = root / cell.path
    info = state(folder)
    if not info:
        watched = WATCHED if ROWS[cell.variant.algorithm].loss == "sac" else ("progress=false",)
        arguments = [*watched, *cell.variant.overrides(cell.task, cell.seed, cell.frames, root), f"folder={folder}"]
    else:
        # A run that was begun with more frames keeps them: it may only become longer.
        arguments = [f"resume={folder}", f"total_frames={max(cell.frames, _total_frames(folder))}"]
    return [sys.executable, str(cell.variant.example), *arguments, *options]


def _total_frames(folder: Path) -> int:
    with suppress(OSError):
        for line in (folder / "config.yaml").read_text().splitlines():
            if line.startswith("total_frames:"):
                return int(line.split(":")[1])
    return 0


def lock(cell: Cell, root: Path) -> IO[str] | None:
    """Hold a cell until the file is closed here and in every process that inherited it; ``None`` where somebody else does."""
    path = (root / cell.path).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


class Runner:
    """Runs cells, ``jobs`` at a time, each in a process of its own with its share of the cores.

    Args:
        root (Path): where the cells' folders are.
        jobs (int): cells at a time.
        device (str): cpu, cuda or auto; with several GPUs, they take turns.
        options (sequence of str): further arguments of the example.
    """

    def __init__(self, root: Path, jobs: int, device: str = "auto", options: Sequence[str] = ()):
        self.root, self.jobs, self.options = root, jobs, list(options)
        self.threads, self.devices = threads_each(jobs), devices(device)
        self.outcomes: Counter[str] = Counter()
        self._processes: set[subprocess.Popen] = set()
        self._left: set[Path] = set()  # the folders of the cells that are still to end
        self._stop, self._print = threading.Event(), threading.Lock()

    def run(self, cells: Sequence[Cell]) -> Counter[str]:
        """Run what is missing of ``cells``; how many had which outcome."""
        waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        for cell in cells:
            waiting.put(cell)
        self._left = {self.root / cell.path for cell in cells}
        workers = [threading.Thread(target=self._work, args=(waiting, slot)) for slot in range(self.jobs)]
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)  # in between, signals are handled
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcomes

    def stop(self, *_: object) -> None:
        """Start no further cell, and let those that run save and end."""
        self._stop.set()
        self.say("stopping: the runs are saved first")
        for process in list(self._processes):
            process.send_signal(signal.SIGINT)

    def say(self, text: str) -> None:
        """A line for a person, who may have gone away."""
        with self._print, suppress(OSError):
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def _work(self, waiting: queue.SimpleQueue[Cell], slot: int) -> None:
        while not self._stop.is_set():
            try:
                cell = waiting.get_nowait()
            except queue.Empty:
                return
            needed = source(cell, self.root)
            if needed is not None and state(needed).get("status") != "finished":
                if needed in self._left:
                    waiting.put(cell)
                    self._stop.wait(WAIT_S)
                    continue
                outcome = f"left for later ({needed} has not finished)"
            else:
                outcome = self._cell(cell, slot)
            self._left.discard(self.root / cell.path)
            self.outcomes[outcome] += 1
            if outcome != "done before":
                self.say(f"{cell.path}: {outcome}")

    def _cell(self, cell: Cell, slot: int) -> str:
        held = lock(cell, self.root)
        if held is None:
            return "left to another runner"
        with held:
            if is_done(cell, self.root):
                return "done before"
            folder = self.root / cell.path
            if folder.exists() and not state(folder):
                if (folder / "metrics.csv").exists():
                    return f"failed (there is no run.json that can be read in {folder}: move it away)"
                shutil.rmtree(folder)  # killed while it was made
            if state(folder).get("status") == "finished" and not any(folder.glob("checkpoints/checkpoint_*.json")):
                return "failed (its checkpoints are gone: it can't be made longer; begin it in another --folder)"
            device = self.devices[slot % len(self.devices)]
            options = (f"num_threads={self.threads}", f"device={device}", *self.options)
            log = folder.with_suffix(".log")
            with log.open("a") as output:
                code = self._process(command(cell, self.root, *options), output, held)
            info = state(folder)
            if code and info.get("status") not in ("interrupted", "diverged") and not self._stop.is_set():
                return f"failed (exit status {code}, see {log})"
            return f"{info.get('status', 'no run.json')} at {info.get('frames', 0):,} frames"

    def _process(self, arguments: list[str], output: IO[str], held: IO[str]) -> int:
        # A group of its own: Ctrl-C reaches this process alone, which tells each run once. The lock is inherited: a run that
        # outlives its runner keeps its cell.
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(arguments, env=environment, start_new_session=True, pass_fds=(held.fileno(),), **streams)
        self._processes.add(process)
        if self._stop.is_set():  # stopped between the question and the start
            process.send_signal(signal.SIGINT)
        code = process.wait()
        self._processes.discard(process)
        return code


def threads_each(jobs: int) -> int:
    """The share of each of so many jobs in the cores of this process."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def devices(name: str) -> list[str]:
    """The devices that jobs take in turns."""
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return ["cpu"]
    return [f"cuda:{i}" for i in range(count)] if name in ("auto", "cuda") and count else [name]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", help=f"{', '.join(EXPERIMENTS)} or all")
    parser.add_argument("--rows", nargs="+", help="only these rows (folders' names)")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--seeds", type=int, help="this many seeds, also more than its own (default: each experiment's)")
    parser.add_argument("--frames", type=int, help="frames of each run (default: each experiment's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index> (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the results (default: %(default)s)")
    parser.add_argument("--option", action="append", default=[], help="a further option of every run, name=value")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say what is missing and how long it would take here")
    what.add_argument("--commands", action="store_true", help="print the commands of the missing cells, for another scheduler")
    parser.add_argument("--no-measure", action="store_true", help="a dry run uses the rates that are known, and measures none")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, or say what would run."""
    args = parse(arguments)
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}.")
    seeds = None if args.seeds is None else range(args.seeds)
    root = args.folder.resolve()
    cells = select(args.experiments, args.rows, args.tasks, seeds, args.frames)
    missing = [cell for cell in cells if not is_done(cell, root)]
    if args.commands:
        for cell in missing:
            print(shlex.join(command(cell, root, *args.option)))
        return
    threads, device = threads_each(args.jobs), devices(args.device)[0]
    print(f"{len(cells)} cells, {len(missing)} missing; {args.jobs} at a time, each with {threads} thread(s) on {device}")
    if args.dry_run:
        known = rates.Rates(root / "rates.csv", device, threads)
        measure = None if args.no_measure else partial(rates.measure, root=root)
        print(rates.forecast(missing, lambda cell: frames_of(root / cell.path), known, args.jobs, measure))
        return
    outcomes = Runner(root, args.jobs, args.device, args.option).run(missing)
    print(", ".join(f"{count} {outcome}" for outcome, count in Counter(_short(outcomes)).items()) or "nothing to do")
    if any("failed" in outcome for outcome in outcomes):
        sys.exit(1)


def _short(outcomes: Counter[str]) -> Counter[str]:
    """Outcomes without their numbers."""
    short: Counter[str] = Counter()
    for outcome, count in outcomes.items():
        short[outcome.split(" at ")[0].split(" (")[0]] += count
    return short


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
