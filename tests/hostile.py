"""Damages the files of a run, or kills it, and lets it go on: nothing may be different without a word.

    python tests/hostile.py --seed 0 --damages 500 --kills 50
    python tests/hostile.py --damages 60 --only metrics.csv --without-hash metrics   # its own check: finds silent differences

Each damage is done to a copy of a run that was killed, which is then resumed as a user does it, under PYTHONWARNINGS=ignore.
Either the resume is refused in one line, or it goes on; then its records, its last state and its transitions are those of a
run that was never stopped, bit for bit, or a line has said what is not; and a policy that can be loaded is the run's. The
processes are forks of this one: torch is imported once.

The exit code is 0 if there was no silent difference, traceback or hang, and nothing in a file was executed.
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import json
import logging
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium  # noqa: F401  # before the forks
import torch
from test_resume import EXAMPLE, differing, leaves, result, run_rows

from omnet_torchrl.training import Run, Trainer, build, command_line, load_policy  # noqa: F401
from omnet_torchrl.training.loop import evaluation, resumption, trainer  # noqa: F401
from omnet_torchrl.training.options import load_config, save_config
from omnet_torchrl.training.record import checkpoint, files, metrics, plots, reporter  # noqa: F401
from omnet_torchrl.training.record import folder as folder_module

BAD = ("SILENT", "TRACEBACK", "HANG", "EXECUTED")
OUTCOMES = ("equal", "fell back", "said", "refused", *BAD)
TINY = [
    *("env=InvertedPendulum-v4", "compile=false", "num_threads=1", "device=cpu", "progress=false", "folder=run"),
    *("network.num_cells=[8,8]", "optim.batch_size=8", "total_frames=60", "init_random_frames=20", "utd_ratio=1"),
    *("policy_update_delay=2", "log_interval=10", "eval.interval=30", "eval.episodes=2", "checkpoint.interval=8"),
]
RUNS = {  # that are damaged
    "omnet, 1 environment": [],
    "droq, 2 environments": ["algorithm=droq", "num_envs=2"],
    "omnet, a buffer that goes round": ["buffer_size=25"],
    "omnet, no checkpoint yet": ["checkpoint.interval=50"],
}
ROWS = {  # that are killed
    **{name: [f"algorithm={name}"] for name in ("omnet", "redq", "droq")},
    "sr_sac": ["algorithm=sr_sac", "reset_interval=30"],
    "unit masks": ["network.masks=unit"],
    "redrawn masks": ["algorithm=omnet_infinity"],
}


# Processes.


def fork(folder: Path, arguments: Sequence[str], before: Callable[[], object] = lambda: None) -> int:
    """The main job in a process of its own, after ``before()``; gives its number. It prints to ``folder/output.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(folder)
        warnings.simplefilter("ignore")
        # No power is taken away, and pictures are not looked at: waiting for either would only take time.
        os.fsync, reporter.learning_curve = lambda number: None, lambda path: path
        before()
        sys.argv = [str(EXAMPLE), *arguments]
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        code = 0
    except SystemExit as end:  # as Python does it
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(number: int, seconds: float) -> int | None:
    """The exit code of a process; ``None`` if it had to be killed after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return None


def killed_at(frame: int) -> Callable[[], None]:
    """``kill -9`` after a frame."""
    progress = reporter.Reporter.progress

    def call(self: Any, frames: int, *rest: Any) -> None:
        progress(self, frames, *rest)
        if frames >= frame:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: setattr(reporter.Reporter, "progress", call)


def outcome_of(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves of its training."""
    found = {key: value for key, value in result(folder / "run" / "checkpoints").items() if not key.startswith("/log")}
    return {**found, "records": run_rows(folder)}


# Damages. Each takes random numbers, the file, and another file of the same kind.


def flip(moments: random.Random, path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    path.write_bytes(content)


def flip_a_digit(moments: random.Random, path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    place = moments.choice([i for i, byte in enumerate(content) if 48 <= byte < 58])
    content[place] = 48 + (content[place] - 48 + moments.randrange(1, 10)) % 10
    path.write_bytes(content)


def cut(moments: random.Random, path: Path, other: Path) -> None:
    os.truncate(path, moments.randrange(path.stat().st_size))


def replaced(make: Callable[[random.Random, Path, Path], bytes | None]) -> Callable[[random.Random, Path, Path], None]:
    """A damage that puts other content, or nothing, in the place of the file."""

    def damage(moments: random.Random, path: Path, other: Path) -> None:
        content = make(moments, path, other)
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return damage


def made(make: Callable[[Path], object]) -> Callable[[random.Random, Path, Path], None]:
    """A damage that puts something that is no file in the place of the file."""

    def damage(moments: random.Random, path: Path, other: Path) -> None:
        path.unlink()
        make(path)

    return damage


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def payload(moments: random.Random, path: Path, other: Path) -> bytes:
    mark, memory = Payload(path.parents[2 if path.suffix == ".pt" else 1] / "executed"), io.BytesIO()
    if moments.random() < 0.5:
        return pickle.dumps(mark, protocol=2)
    torch.save({"start": 0, "data": mark, "frames": mark}, memory)
    return memory.getvalue()


ANY = {
    **{"a bit": flip, "a digit": flip_a_digit, "cut": cut},
    "deleted": replaced(lambda *_: None),
    "emptied": replaced(lambda *_: b""),
    "doubled": replaced(lambda moments, path, other: 2 * path.read_bytes()),
    "another's": replaced(lambda moments, path, other: other.read_bytes()),
    "no UTF-8": replaced(lambda moments, path, other: b"\xff\xfe" + path.read_bytes()),
    "a payload": replaced(payload),
    "a folder": made(Path.mkdir),
    "a pipe": made(os.mkfifo),
    "a link to nothing": made(lambda path: path.symlink_to("nowhere")),
    "a link to itself": made(lambda path: path.symlink_to(path.name)),
    "a device": made(lambda path: path.symlink_to("/dev/zero")),
}


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, with a hash that fits."""
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps({**manifest, "sha256": checkpoint.seal(manifest)}))


def other_list(moments: random.Random, path: Path, other: Path) -> None:
    """Segments that are left out, doubled or in another order."""

    def change(manifest: dict[str, Any]) -> None:
        segments, place = manifest["replay"], moments.randrange(len(manifest["replay"]))
        kind = moments.choice(["drop", "double", "turn", "empty"])
        if kind == "turn" and len(segments) > 1:
            segments.reverse()
        elif kind == "double":
            segments.insert(place, segments[place])
        else:
            del segments[place if kind == "drop" else 0 : place + 1 if kind == "drop" else None]

    reseal(path, change)


def copied(moments: random.Random, path: Path, other: Path) -> None:
    shutil.copy(path, path.with_name(f"checkpoint_{moments.randrange(1000):09d}.json"))


def vouched(moments: random.Random, path: Path, other: Path) -> None:
    """A file of other content, with manifests that vouch for it."""
    if moments.random() < 0.3:
        content = payload(moments, path, other)
    else:
        state = torch.load(path, weights_only=True)
        name = moments.choice(sorted(state))
        if moments.random() < 0.5:
            state[name] = "text"
        else:
            del state[name]
        memory = io.BytesIO()
        torch.save(state, memory)
        content = memory.getvalue()
    path.write_bytes(content)

    def vouch(manifest: dict[str, Any]) -> None:
        for entry in (manifest["state"], *manifest["replay"]):
            if entry["file"] == path.name:
                entry.update(files.fingerprint(content))

    for manifest in path.parent.glob("checkpoint_*.json"):
        reseal(manifest, vouch)


def other_option(moments: random.Random, path: Path, other: Path) -> None:
    """An option edited by hand, to a value that it may have."""
    config = load_config(path)
    edits: dict[str, Callable[[], None]] = {
        "seed": lambda: setattr(config, "seed", config.seed + 1),
        "tau": lambda: setattr(config.optim, "tau", 0.05),
        "utd_ratio": lambda: setattr(config, "utd_ratio", 2.0),
        "batch_size": lambda: setattr(config.optim, "batch_size", 4),
        "targets": lambda: setattr(config.loss, "num_target_subnets", 1),
        "policy_update_delay": lambda: setattr(config, "policy_update_delay", 3),
        "buffer_size": lambda: setattr(config, "buffer_size", 24),
        "eval": lambda: setattr(config.eval, "episodes", 3),
        "total_frames": lambda: setattr(config, "total_frames", 64),
        "log_interval": lambda: setattr(config, "log_interval", 7),
    }
    edits[moments.choice(sorted(edits))]()
    save_config(config, path)


def other_type(moments: random.Random, path: Path, other: Path) -> None:
    """A field of run.json that is of another type."""
    info = json.loads(path.read_text())
    info[moments.choice(sorted(info))] = moments.choice([None, 3, "text", [], {}, [3], {"frames": "x"}, True])
    path.write_text(json.dumps(info))


def other_spaces(moments: random.Random, path: Path, other: Path) -> None:
    """A bound of the actions, or the masks of the actor, as load_policy reads them."""
    info = json.loads(path.read_text())
    if moments.random() < 0.5:
        info["spaces"]["high"] = [2 * high for high in info["spaces"]["high"]]
    else:
        info["actor"]["layer_norm"] = not info["actor"]["layer_norm"]
    path.write_text(json.dumps(info))


KINDS: dict[str, tuple[str, Mapping[str, Callable[[random.Random, Path, Path], None]]]] = {
    "manifest": ("checkpoints/checkpoint_*.json", {**ANY, "other segments": other_list, "copied": copied}),
    "state": ("checkpoints/state_*", {**ANY, "vouched for": vouched}),
    "segment": ("checkpoints/replay_*", {**ANY, "vouched for": vouched}),
    "config.yaml": ("config.yaml", {**ANY, "an option": other_option}),
    "run.json": ("run.json", {**ANY, "a type": other_type, "the policy": other_spaces}),
    "metrics.csv": ("metrics.csv", ANY),
}


def leave_out(name: str | None) -> Callable[[], None]:
    """What a process does first so that one hash is not looked at."""
    vouching = {"state": "state_", "segment": "replay_"}.get(name or "")
    read, write, seal = files.read_file, files.fingerprint, files.seal

    def patch() -> None:
        if vouching:
            checkpoint.read_file = lambda path, expected=None: read(path, None if path.name.startswith(vouching) else expected)
        elif name == "manifest":
            checkpoint.seal = lambda manifest: manifest["sha256"] if "sha256" in manifest else seal(manifest)
        elif name == "metrics":
            metrics.fingerprint = lambda content: _Any(write(content))
        elif name == "config":
            for module in (resumption, sys.modules["omnet_torchrl.training.run"]):
                module.differences = module.changes = lambda *_: {}
        elif name == "run":
            folder_module.seal = lambda content: content.get("sha256", seal(content))

    return patch


class _Any(dict):
    """Equal to everything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def classify(code: int | None, folder: Path, expected: Mapping[str, Any]) -> str:
    text = (folder / "output.txt").read_text()
    if (folder / "executed").exists():
        return "EXECUTED"
    if code is None:
        return "HANG"
    if "Traceback" in text or "Error executing" in text:
        return "TRACEBACK"
    if code:
        return "refused" if sum(line.startswith(("error: ", "failed: ")) for line in text.splitlines()) == 1 else "SILENT"
    try:
        found = outcome_of(folder)
    except (checkpoint.CheckpointError, ValueError, KeyError):  # what it saves, or its records, can't be read
        return "SILENT"
    if differing(found, expected):
        return "said" if "warning: " in text or "with other options" in text else "SILENT"
    return "fell back" if "passed over" in text else "equal"


def policy_of(folder: Path) -> str | None:
    """What a run's policy is made of; ``None`` where there is none, and a line says why."""
    try:
        policy = load_policy(folder / "run")
    except ValueError:
        return None
    space = policy.spec["action"].space
    return repr((space.low.tolist(), space.high.tolist(), leaves(dict(policy.state_dict()))))


def damage(
    root: Path, moments: random.Random, count: int, only: str, without: str | None, seconds: float
) -> collections.Counter:
    """Damage copies of killed runs, and resume them; the outcomes by kind of file and damage."""
    wholes, others, policies = {}, {}, {}
    leave_out(without if without == "run" else None)()
    for i, (name, options) in enumerate(RUNS.items()):
        wait(fork(root / f"whole{i}", [*TINY, *options]), 600)
        wholes[name] = outcome_of(root / f"whole{i}")
        wait(fork(root / f"killed{i}", [*TINY, *options], killed_at(43)), 600)
        wait(fork(root / f"other{i}", [*TINY, *options, "seed=1"], killed_at(43)), 600)
        others[name] = (root / f"killed{i}", root / f"other{i}")
        policies[name] = policy_of(root / f"killed{i}")
    pairs = [(kind, each) for kind, (_, damages) in KINDS.items() if only in ("all", kind) for each in damages]
    moments.shuffle(pairs)
    found: collections.Counter = collections.Counter()
    for number, (kind, each) in zip(range(count), itertools.cycle(pairs), strict=False):
        pattern, damages = KINDS[kind]
        name = moments.choice([each for each, (killed, _) in others.items() if any((killed / "run").glob(pattern))])
        folder, (killed, other) = root / f"damaged{number}", others[name]
        shutil.copytree(killed, folder)
        path = moments.choice(sorted((folder / "run").glob(pattern)))
        damages[each](moments, path, moments.choice(sorted((other / "run").glob(pattern))))
        policy = policy_of(folder) if kind == "run.json" else None
        code = wait(fork(folder, ["resume=run"], leave_out(without)), seconds)
        outcome = classify(code, folder, wholes[name])
        if policy not in (None, policies[name]) and outcome not in BAD:
            outcome = "SILENT"
        found[kind, each, outcome] += 1
        if outcome in BAD:
            print(
                f"{outcome}: {name}, {kind}, {each}, {path.name}, exit code {code}\n{(folder / 'output.txt').read_text()}",
                flush=True,
            )
        shutil.rmtree(folder)
    return found


def kill(root: Path, moments: random.Random, count: int, compiled: bool, seconds: float) -> collections.Counter:
    """Kill runs at random moments, two times each, and let them go on to their end; the outcomes by row."""
    found: collections.Counter = collections.Counter()
    cases = list(itertools.product(ROWS.items(), (1, 2)))
    moments.shuffle(cases)
    kills = 0
    for number, ((name, options), num_envs) in enumerate(itertools.cycle(cases)):
        if kills >= count:
            return found
        arguments = [*TINY, *options, f"num_envs={num_envs}", "checkpoint.interval=4", f"compile={str(compiled).lower()}"]
        folder, whole, start = root / f"kill{number}", root / f"unbroken{number}", time.monotonic()
        wait(fork(whole, arguments), seconds)
        duration, expected = time.monotonic() - start, outcome_of(whole)
        for _ in range(min(2, count - kills)):
            process = fork(folder, ["resume=run"] if (folder / "run" / "run.json").exists() else arguments)
            kills += wait(process, duration * moments.uniform(0.1, 1)) is None
        if not (folder / "run" / "run.json").exists():
            shutil.rmtree(folder / "run", ignore_errors=True)
        code = wait(fork(folder, ["resume=run"] if (folder / "run").exists() else arguments), seconds)
        outcome = classify(code, folder, expected)
        found[name, f"{num_envs} environment(s)", outcome] += 1
        if outcome in BAD:
            print(f"{outcome}: {name}, {num_envs} environment(s)\n{(folder / 'output.txt').read_text()}", flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(whole)
    return found


def table(title: str, found: collections.Counter) -> None:
    """A line per kind, and one for all."""
    print(f"\n{title:<34}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    lines = sorted({(kind, each) for kind, each, _ in found})
    for kind, each in lines:
        print(f"{f'{kind}: {each}':<34}" + "".join(f"{found[kind, each, outcome]:>11}" for outcome in OUTCOMES))
    totals = [sum(found[kind, each, outcome] for kind, each in lines) for outcome in OUTCOMES]
    print(f"{'all':<34}" + "".join(f"{total:>11}" for total in totals))


def main(arguments: Sequence[str] | None = None) -> int:
    """Damage and kill; 0 if nothing was bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", choices=("all", *KINDS), default="all", help="files that are damaged")
    parser.add_argument(
        "--without-hash", choices=("manifest", "state", "segment", "config", "run", "metrics"), help="is not looked at"
    )
    parser.add_argument("--compile", action="store_true", help="the runs that are killed")
    parser.add_argument("--seconds", type=float, default=120, help="after which a process hangs")
    args = parser.parse_args(arguments)
    os.environ["PYTHONWARNINGS"] = "ignore"
    torch.set_num_threads(1)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        damaged = damage(root, moments, args.damages, args.only, args.without_hash, args.seconds) if args.damages else None
        killed = kill(root, moments, args.kills, args.compile, args.seconds) if args.kills else None
    killed_runs = f"{args.kills} kills, runs"  # each is killed up to twice
    for title, found in ((f"{args.damages} damages", damaged), (killed_runs, killed)):
        if found is not None:
            table(title, found)
    bad = {outcome: sum(n for key, n in ((damaged or {}) | (killed or {})).items() if key[2] == outcome) for outcome in BAD}
    print("\n{SILENT} silent, {TRACEBACK} tracebacks, {HANG} hangs, {EXECUTED} executed".format_map(bad))
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.exit(main())
