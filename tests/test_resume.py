"""A run that was stopped and goes on equals one that was not, bit for bit; whatever stopped it, whenever."""

import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import pytest
import torch
from conftest import run_script
from test_environments import Counter
from test_training import PENDULUM, Diary, make_trainer
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from omnet_torchrl.training.record import checkpoint
from omnet_torchrl.training.record.checkpoint import Checkpointer, load_replay

EXAMPLE = Path(__file__).parent.parent / "examples" / "omnet_sac.py"
CLOCK = {"elapsed", "times"}  # what the clock says, and nothing else, may differ


def leaves(value, name=""):
    """Name and content of everything in a state; tensors as type and exact numbers."""
    if isinstance(value, dict):
        parts = [leaves(part, f"{name}/{key}") for key, part in value.items() if key not in CLOCK and "time/" not in str(key)]
    elif isinstance(value, list | tuple):
        parts = [leaves(part, f"{name}/{i}") for i, part in enumerate(value)]
    else:
        if isinstance(value, torch.Tensor):
            return {name: (value.dtype, value.shape, value.requires_grad, value.detach().numpy().tobytes())}
        return {name: repr(value)}
    return {key: leaf for part in parts for key, leaf in part.items()}


def result(path):
    """All that is in the newest checkpoint of a folder."""
    state, files = Checkpointer(path).load()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(state["writer"]["_write_count"] or 1))
    with contextlib.suppress(ValueError):  # the buffer had gone round
        load_replay(buffer, files, state["writer"])
        return leaves(state) | leaves(buffer.storage.get(slice(0, len(buffer))).to_dict(), "buffer")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(CAPACITY))
    load_replay(buffer, files, state["writer"])
    return leaves(state) | leaves(buffer.storage.get(slice(0, len(buffer))).to_dict(), "buffer")


def differing(a, b):
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


# In one process: quick, and stopped at any frame wanted.

CAPACITY = 25
# At frame 40 a checkpoint is in the middle of everything: of an episode, of the actor's delay (the newest values of its loss
# are older), and of the log's interval, which has passed while the next update is not due before frame 41.
SCHEDULE = {
    **{"total_frames": 60, "init_random_frames": 21, "utd_ratio": 0.25, "policy_update_delay": 3},
    **{"log_interval": 10, "eval_interval": 30, "checkpoint_interval": 8},
}


class Crash(Exception):
    pass


class Stopping(Diary):
    """A reporter that ends the process, as it were, after a frame."""

    def __init__(self, rows, stop):
        super().__init__()
        self.rows, self.stop = rows, stop

    def progress(self, frames, updates, metrics):
        if frames >= self.stop:
            raise Crash


def session(path, rows, stop=10**9, env=PENDULUM, **options):
    """One process of a run: what a new one does first, and what it does until it is stopped."""
    torch.manual_seed(int(time.time()))  # whatever the process did before
    trainer = make_trainer(path, env, diary=Stopping(rows, stop), **{**SCHEDULE, **options})
    if not trainer.resume():
        rows.clear()
    with contextlib.suppress(Crash):
        trainer.run()
    return trainer


def untimed(rows):
    return [(frames, name, repr(value)) for frames, name, value in rows if not name.startswith("time/")]


def whole(path, **options):
    rows = []
    session(path, rows, **options)
    return result(path), untimed(rows)


CASES = {
    "one environment": {},
    "Hopper": {"env": "Hopper-v4", "init_random_frames": 20, "utd_ratio": 1},
    "three environments": {"num_envs": 3, "utd_ratio": 1, "policy_update_delay": 2},
    "a buffer that goes round": {"capacity": CAPACITY},
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The result of each case's run in one go."""
    return {name: whole(tmp_path_factory.mktemp("whole"), **options) for name, options in CASES.items()}


OFTEN, STOPS = (9, 17, 26, 34, 41, 50), [(5,), (12, 19), (43,), (59,)]
STOPPED = [  # each case often, and one case at each kind of frame; the other pairs are slow
    *(pytest.param(case, OFTEN, id=f"{case}-{OFTEN}") for case in CASES),
    *(pytest.param("one environment", stops, id=f"one environment-{stops}") for stops in STOPS),
    *(pytest.param(case, stops, id=f"{case}-{stops}", marks=pytest.mark.slow) for case in list(CASES)[1:] for stops in STOPS),
]


@pytest.mark.parametrize(("case", "stops"), STOPPED)
def test_a_stopped_run_equals_one_in_one_go(case, stops, wholes, tmp_path):
    expected, expected_rows = wholes[case]
    rows = []
    for stop in (*stops, 10**9):
        trainer = session(tmp_path, rows, stop, **CASES[case])
    assert trainer.frames == 60
    assert untimed(rows) == expected_rows
    assert differing(result(tmp_path), expected) == []


def test_a_run_stopped_by_a_signal_goes_on_from_its_very_frame(wholes, tmp_path):
    rows = []
    trainer = make_trainer(tmp_path, diary=Stopping(rows, 10**9), **SCHEDULE)
    progress = trainer.reporter.progress
    trainer.reporter.progress = lambda frames, *rest: (
        os.kill(os.getpid(), signal.SIGINT) if frames == 37 else progress(frames, *rest)
    )
    assert trainer.run() == "interrupted"
    assert Checkpointer(tmp_path).load()[0]["frames"] == 37
    session(tmp_path, rows)
    assert untimed(rows) == wholes["one environment"][1]
    assert differing(result(tmp_path), wholes["one environment"][0]) == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_run_stopped_while_it_saves_goes_on(n, wholes, tmp_path):
    """At each file of the checkpoint at frame 40: the segment, the state, the manifest."""
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        written = []

        def write(path, content, write=checkpoint.replace_file):
            written.append(path)
            if len(written) == 4 * 3 + n:
                path.with_name(path.name + ".tmp").write_bytes(content[: len(content) // 2])
                raise Crash
            write(path, content)

        patch.setattr(checkpoint, "replace_file", write)
        session(tmp_path, rows)
    assert Checkpointer(tmp_path).load()[0]["frames"] == 32
    assert list(tmp_path.glob("*.tmp"))
    session(tmp_path, rows)
    assert untimed(rows) == wholes["one environment"][1]
    assert differing(result(tmp_path), wholes["one environment"][0]) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(wholes, tmp_path):
    rows = []
    session(tmp_path, rows, 43)
    (newest,) = tmp_path.glob("state_000000040*")
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="passed over"):
        session(tmp_path, rows)
    assert untimed(rows) == wholes["one environment"][1]
    assert differing(result(tmp_path), wholes["one environment"][0]) == []


def test_a_finished_run_that_is_resumed_stays_as_it_is(wholes, tmp_path):
    rows = []
    session(tmp_path, rows)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert session(tmp_path, rows).frames == 60
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert untimed(rows) == wholes["one environment"][1]


def test_a_finished_run_that_is_made_longer_equals_a_longer_one(wholes, tmp_path):
    """But for the evaluation at its first end."""
    rows = []
    session(tmp_path, rows, total_frames=40)
    session(tmp_path, rows)
    assert [row[0] for row in rows if row[1] == "eval/return"] == [30, 40, 60]
    assert [row for row in untimed(rows) if row[:2] != (40, "eval/return")] == wholes["one environment"][1]
    assert differing(result(tmp_path), wholes["one environment"][0]) == ["/log"]  # which has a row more


PARTS = [
    *("update/loss", "update/critic_optim", "update/actor_optim", "writer", "replay", "transforms", "carrier", "episodes"),
    *("random/exploration", "random/draws", "random/replay", "log", "frames", "updates", "metrics", "log_due"),
]


@pytest.mark.parametrize("part", [None, *PARTS])
def test_every_part_of_a_checkpoint_is_needed(part, wholes, tmp_path):
    """Left out, which is to say as it is in a trainer that has just been made, the run is another."""
    fresh = make_trainer(tmp_path / "fresh", diary=Stopping([], 0), **SCHEDULE)
    fresh.save()
    others, _ = Checkpointer(tmp_path / "fresh").load()
    rows, path = [], tmp_path / "run"
    session(path, rows, 43)

    trainer = make_trainer(path, diary=Stopping(rows, 10**9), **SCHEDULE)
    state, files = trainer.checkpointer.load()
    assert state["frames"] == 40
    assert state["carrier"]["step_count"].item() > 0
    assert state["log_due"]
    assert (state["updates"] % 3, len(state["metrics"])) == (1, 7)
    if part == "replay":
        files = []
    elif part is not None:
        *where, name = part.split("/")
        inner, other = state, others
        for key in where:
            inner, other = inner[key], other[key]
        inner[name] = other[name]
    trainer.checkpointer.load = lambda: (state, files)
    try:
        trainer.resume()
        same = trainer.run() == "finished" and untimed(rows) == wholes["one environment"][1]
        same = same and not differing(result(path), wholes["one environment"][0])
    except (ValueError, IndexError, RuntimeError, KeyError):
        same = False
    assert same == (part is None)


def test_the_parts_are_all_there_are(tmp_path):
    """What is not in the list above: the policy, for those who only play, an evaluation that a signal ended (test_training.py),
    what the clock, a person or a warning says, and what it is compared with: the options, versions and flags (test_run.py)."""
    trainer = make_trainer(tmp_path, diary=Stopping([], 0), **SCHEDULE)
    trainer.save()
    state, _ = trainer.checkpointer.load()
    found = {f"{name}/{key}" for name in ("update", "random") for key in state[name]} | state.keys() - {"update", "random"}
    others = {"policy", "evaluation_due", "random/device", "elapsed", "times", "last", "options", "conditions"}
    assert found | {"replay"} == {*PARTS, *others}


@pytest.mark.parametrize(("num_envs", "stop", "start"), [(1, 43, 40), (3, 20, 18)])
def test_an_episode_that_cannot_be_brought_back_starts_anew_and_it_is_said(num_envs, stop, start, tmp_path):
    gymnasium.register("Counter-v0", Counter, disable_env_checker=True)
    try:
        rows, options = [], {"num_envs": num_envs, "utd_ratio": 1}
        session(tmp_path, rows, stop, "Counter-v0", **options)
        with pytest.warns(UserWarning, match="goes on, inexactly") as warned:
            trainer = session(tmp_path, rows, env="Counter-v0", **options)
        assert [str(one.message)[: len("environment 0")] for one in warned] == [f"environment {i}" for i in range(num_envs)]
        assert "Counter-v0" in str(warned[0].message)
        assert trainer.frames == 60
        # From the frame of the checkpoint on, the episode is a new one from its first step.
        data = trainer.buffer.storage.get(slice(0, 60))
        first = data[start : start + num_envs]
        assert (first["observation"][:, 0] == 0).all()
        assert (first["next", "observation"][:, 0] == 1).all()
        ends = data["next", "done"].view(-1, num_envs)[start // num_envs :, 0].nonzero().flatten()
        assert ends[0] == 9  # a whole episode of ten steps
        lengths = [value for frames, name, value in rows if name == "train/episode_length" and frames > start]
        assert set(lengths) == {10.0}
    finally:
        del gymnasium.registry["Counter-v0"]


def test_a_hidden_state_is_told_at_the_border_of_two_episodes(tmp_path):
    """As a task of 1,000 steps has one at every 10,000th frame: the checkpoint at frame 40 lies between two episodes of 10."""
    gymnasium.register("Counter-v0", Counter, disable_env_checker=True, kwargs={"shown": "reward"})
    try:
        session(tmp_path, [], 43, "Counter-v0")
        assert Checkpointer(tmp_path).load()[0]["carrier"]["step_count"].item() == 0
        with pytest.warns(UserWarning, match="Counter-v0, played again for 10 steps, came out .* goes on, inexactly"):
            assert session(tmp_path, [], env="Counter-v0").frames == 60
    finally:
        del gymnasium.registry["Counter-v0"]


# As a user runs it: in processes of their own, killed.

SMALL = [
    *("compile=false", "network.num_cells=[16,16]", "network.num_subnets=3", "network.sparsity=0.2", "optim.batch_size=16"),
    *("total_frames=150", "init_random_frames=60", "utd_ratio=1", "policy_update_delay=2"),
    *("log_interval=10", "eval.interval=60", "eval.episodes=2", "checkpoint.interval=15"),
]


def start(folder, *options):
    command = [sys.executable, "-W", "ignore", EXAMPLE, *options]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)


def run(folder, *options):
    """Run to the end, in ``folder/run``; the seconds and the text that it printed."""
    code = start(folder, *options).wait()
    text = (folder / "output.txt").read_text()
    assert code == 0, text
    return text


def new(*options):
    return [*options, "progress=false", "folder=run"]


RESUME = ["resume=run", "progress=false"]


def newest_frame(folder):
    return max((int(path.stem[-9:]) for path in (folder / "run" / "checkpoints").glob("checkpoint_*.json")), default=0)


def kill_when(process, happened):
    """``kill -9`` as soon as something has happened; whether it was before the process ended by itself."""
    while process.poll() is None:
        if happened():
            process.kill()
            process.wait()
            return True
        time.sleep(0.0005)
    return False


def run_rows(folder):
    with (folder / "run" / "metrics.csv").open() as file:
        rows = [(int(row["frames"]), row["name"], row["value"]) for row in csv.DictReader(file)]
    return [row for row in rows if not row[1].startswith("time/")]


def assert_same_runs(folder, expected):
    assert run_rows(folder) == run_rows(expected)
    # The log's position, in bytes, depends on how many digits its wall-clock rows have.
    found = differing(result(folder / "run" / "checkpoints"), result(expected / "run" / "checkpoints"))
    assert set(found) <= {"/log/size", "/log/sha256"}
    info = json.loads((folder / "run" / "run.json").read_text())
    assert info["status"] == "finished"
    assert not list((folder / "run" / "checkpoints").glob("*.tmp"))


def test_a_process_that_is_killed_goes_on_in_another(tmp_path):
    killed, whole_run = tmp_path / "killed", tmp_path / "whole"
    options = new("env=InvertedPendulum-v4", "num_envs=3", *SMALL)
    process = start(killed, *options)
    assert kill_when(process, lambda: newest_frame(killed) >= 75)
    code, printed = run_script(*options[:-1], f"folder={whole_run}/run")
    assert code == 0, printed
    run(killed, *RESUME)
    assert "goes on from frame" in (killed / "output.txt").read_text()
    assert_same_runs(killed, whole_run)


# The compiled run, killed ten times.

TASK = [
    *("compile=true", "network.num_cells=[64,64]", "optim.batch_size=64", "total_frames=1500", "init_random_frames=300"),
    *("utd_ratio=2", "policy_update_delay=2", "eval.interval=500", "eval.episodes=5", "checkpoint.interval=20"),
]


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("env", ["Hopper-v4", "Humanoid-v4"])
def test_ten_kills_change_nothing(env, tmp_path):
    whole_run, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(env)
    text = run(whole_run, *new(f"env={env}", *TASK))
    print(env, re.search(r"where it went.*\n.*", text)[0])  # what saving every 20 frames costs
    options, torn, kills = new(f"env={env}", *TASK), 0, 0
    while kills < 10:
        process = start(killed, *options)
        begun, further, pause = newest_frame(killed), moments.randint(0, 160), moments.uniform(0, 0.2)
        kind = kills % 2

        def reached(begun=begun, further=further):
            frame = newest_frame(killed)
            return frame > begun and frame >= begun + further

        def saving(reached=reached):
            return reached() and any((killed / "run" / "checkpoints").glob("*.tmp"))

        def later(reached=reached, pause=pause):
            return reached() and not time.sleep(pause)

        if not kill_when(process, saving if kind else later):
            assert process.returncode == 0, (killed / "output.txt").read_text()
            break
        kills += 1
        torn += any((killed / "run" / "checkpoints").glob("*.tmp"))
        print(f"{env}: killed at checkpoint {newest_frame(killed)}, {torn} of {kills} while saving", flush=True)
        options = RESUME
    assert kills == 10
    assert torn > 0
    run(killed, *RESUME)
    assert_same_runs(killed, whole_run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_compiled_run_that_is_made_longer_equals_a_longer_one(tmp_path):
    longer, extended = tmp_path / "longer", tmp_path / "extended"
    shorter = [option.replace("1500", "700") for option in TASK]
    run(longer, *new("env=Hopper-v4", *TASK))
    run(extended, *new("env=Hopper-v4", *shorter))
    run(extended, *RESUME, "total_frames=1500")
    rows = [row for row in run_rows(extended) if row[0] != 700 or "eval/" not in row[1]]
    assert rows == run_rows(longer)
    found = differing(result(extended / "run" / "checkpoints"), result(longer / "run" / "checkpoints"))
    assert set(found) <= {"/log/size", "/log/sha256"}
