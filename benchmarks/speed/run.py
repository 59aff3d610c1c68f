"""Compare OMNet's block with its floors and its peers, in one run, and write the report.

    python benchmarks/speed/run.py --install-peers .venv-peers   # once: SBX and JAX in an environment of their own
    python benchmarks/speed/run.py --peers .venv-peers           # everything; --quick: fewer rounds; --only hopper: some cases

Each framework has a process of its own; the cases take turns, round by round, and only one computes at a time. What is compared
are ratios within this one run.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import venv
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import torch
from protocol import Worker
from report import CLOSE, FLOORS, write_report

HERE = Path(__file__).parent
REPEAT_S = 0.3  # a turn lasts about so long: the first block after the others finds caches cold and threads asleep


def install_peers(folder: Path) -> None:
    """SBX with JAX, in a virtual environment of their own."""
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "pip", "install", "-r", HERE / "requirements-peers.txt"], check=True)


def busy_s() -> float:
    """CPU seconds of all processes of the machine so far; nan where Linux's accounts are missing."""
    accounts = Path("/proc/stat")
    if not accounts.exists():
        return float("nan")
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, accounts.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(workers: dict[str, Worker], rounds: int, slow_s: float) -> tuple[dict[str, list[list[float]]], float]:
    """Seconds of each case, a list per turn, and the share of the machine's cores that others had meanwhile.

    A case that takes longer than ``slow_s`` has a third of the rounds. Those of ``CLOSE`` and ``FLOORS`` take turns with each
    other, and have as many of them.
    """
    first: dict[str, float] = {}
    for case, worker in workers.items():
        start = time.perf_counter()
        worker.seconds(case)
        first[case] = min(worker.seconds(case) for _ in range(3))
        print(f"{case}: ready in {time.perf_counter() - start:.0f} s, {first[case] * 1e3:.1f} ms", file=sys.stderr, flush=True)
    # Dynamo's guards see state of the whole process: what was built after a case may have it compiled once more.
    for case, worker in workers.items():
        worker.seconds(case)
    times: dict[str, list[list[float]]] = {case: [] for case in workers}
    unique = set(workers.values())
    start, before = time.perf_counter(), busy_s() - sum(worker.busy_s() for worker in unique)
    pairs = [pair for pair in (*CLOSE, *FLOORS) if set(pair) <= set(workers)]
    groups = [*pairs, *((case,) for case in workers if not any(case in pair for pair in pairs))]
    for i in range(rounds):
        for group in groups:
            slowest = max(first[case] for case in group)
            if slowest > slow_s and i % 3:
                continue
            repeats = {case: max(1, min(50, round(REPEAT_S / first[case]))) for case in group}
            turns = 4 if len(group) > 1 else 1
            if group in CLOSE:
                turns, repeats = turns * min(repeats.values()), dict.fromkeys(group, 1)
            for k in range(turns):
                for case in group if k % 2 else reversed(group):
                    times[case].append([workers[case].seconds(case) for _ in range(repeats[case])])
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    foreign = busy_s() - sum(worker.busy_s() for worker in unique) - before
    return times, foreign / (time.perf_counter() - start) / (os.cpu_count() or 1)


def machine(device: str = "cpu") -> dict[str, str]:
    """What it was measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    return {
        **{"cpu": model, "cores": str(os.cpu_count()), **gpu},
        **{"system": platform.platform(), "python": platform.python_version()},
    }


def commit() -> str:
    """Of the repository, ``+`` where files differ from it."""
    asked = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="their virtual environment; without it they are left out")
    parser.add_argument("--install-peers", type=Path, metavar="FOLDER", help="make that environment, and stop")
    parser.add_argument("--rounds", type=int, default=15, help="more of them, narrower intervals")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--only", default="", help="cases whose name holds one of these words, separated by commas")
    parser.add_argument("--device", default="cpu", help="of the torch cases; the peers are on the CPU")
    parser.add_argument("--threads", type=int, help="of torch; the peers take what they find")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if arguments.install_peers:
        install_peers(arguments.install_peers)
        return
    start = time.perf_counter()
    ours = [sys.executable, str(HERE / "worker.py"), "--device", arguments.device]
    commands = [ours + (["--threads", str(arguments.threads)] if arguments.threads else [])]
    if arguments.peers:
        commands.append([str(arguments.peers / "bin" / "python"), str(HERE / "peers.py")])
    words = [word for word in arguments.only.split(",") if word]
    with ExitStack() as stack:
        found = [stack.enter_context(Worker(command)) for command in commands]
        workers = {
            case: worker for worker in found for case in worker.cases if not words or any(word in case for word in words)
        }
        times, others = measure(workers, 3 if arguments.quick else max(1, arguments.rounds), slow_s=0.3)
        versions = {name: value for worker in found for name, value in worker.versions.items()}
    results = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "command": shlex.join(["python", "benchmarks/speed/run.py", *sys.argv[1:]]),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "machine": machine(arguments.device),
        "others": round(others, 3),
        "versions": versions,
        "seconds": {case: [[round(x, 7) for x in turn] for turn in turns] for case, turns in times.items()},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "results.json").write_text(json.dumps(results) + "\n")
    print(write_report(results, arguments.output))


if __name__ == "__main__":
    main()
