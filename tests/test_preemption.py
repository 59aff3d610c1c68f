"""A job that has to make room ends with a code that says so, and the same command goes on with it."""

import csv
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLE, run_script

from omnet_torchrl.training import Run
from omnet_torchrl.training.options import to_config
from omnet_torchrl.training.record.reporter import Reporter

OPTIONS = [
    *("env=InvertedPendulum-v4", "network.num_cells=[32,32]", "network.sparsity=0.1", "compile=false", "num_threads=1"),
    *("total_frames=300", "init_random_frames=50", "optim.batch_size=16", "utd_ratio=1", "policy_update_delay=2"),
    *("eval.interval=50", "eval.episodes=3", "checkpoint.interval=70", "log_interval=20", "progress=false"),
]
SUBMITIT = importlib.util.find_spec("submitit") is not None


def records(run):
    """What a run has logged, but for what the clock says; none yet where it has not begun."""
    path = Path(run) / "metrics.csv"
    with path.open() if path.exists() else open(os.devnull) as file:
        rows = [(row["frames"], row["name"], row["value"]) for row in csv.DictReader(file)]
    return [row for row in rows if not row[1].startswith("time/")]


def info(run):
    return json.loads((Path(run) / "run.json").read_text())


def start(folder, *arguments):
    return subprocess.Popen([sys.executable, EXAMPLE, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True)


def wait_for_records(run, more, process):
    before, deadline = len(records(run)), time.monotonic() + 120
    while len(records(run)) < before + more:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of a run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_script(*OPTIONS, f"folder={folder}/run")[0] == 0
    return records(folder / "run")


def script_with_a_signal(number, at, *arguments):
    """As :func:`run_script`; this process gets the signal after the ``at``-th frame that it plays."""
    played, progress = itertools.count(1), Reporter.progress

    def send(*args):
        progress(*args)
        if next(played) == at:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "progress", send)
        return run_script(*arguments)


def check_stopped(run, code, said):
    assert (code, info(run)["status"]) == (75, "interrupted"), said
    assert "stopping: the run is saved first" in said
    assert info(run)["saved"] == info(run)["frames"]


def test_one_command_starts_a_job_and_goes_on_with_it_until_it_is_done(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*OPTIONS, "resume=auto", "folder=run"]
    process = start(tmp_path, *command)
    wait_for_records("run", 8, process)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    check_stopped("run", process.returncode, said)
    for number in (signal.SIGHUP, signal.SIGTERM):
        check_stopped("run", *script_with_a_signal(number, 25, *command))
    for expected in ("goes on from frame", "already finished"):
        code, said = run_script(*command)
        assert code == 0, said
        assert expected in said
        assert records("run") == whole
    assert len(info("run")["sessions"]) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_sweep_that_was_stopped_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["-m", *OPTIONS, "utd_ratio=0.5,1", "resume=auto"]
    assert script_with_a_signal(signal.SIGUSR1, 400, *command)[0] == 75
    folder = Path("runs/InvertedPendulum-v4/omnet/seed0")
    (second,) = folder.glob("*,utd_ratio=1.0*")
    assert (info(second)["status"], info(second)["frames"]) == ("interrupted", 100)
    assert run_script(*command)[0] == 0
    assert [info(run)["status"] for run in folder.iterdir()] == ["finished"] * 2
    assert len(info(second)["sessions"]) == 2
    assert records(second) == whole


def named(**options):
    return Path(to_config({"resume": "auto", **options}).folder)


def test_a_run_that_is_to_go_on_by_itself_has_a_folder_that_its_options_tell():
    assert named() == Path("runs/Hopper-v4/omnet/seed0/default")
    assert named(algorithm="redq", seed=3, total_frames=10_000, num_threads=1) == Path("runs/Hopper-v4/redq/seed3/default")
    assert named(utd_ratio=5, optim={"lr": 1e-4}).name == "optim.lr=0.0001,utd_ratio=5.0"
    assert named(folder="x") == Path("x")
    lists = [named(network={"num_cells": cells}).name for cells in ([64, 64], [6, 464], [64] * 60, [64] * 61)]
    assert len(set(lists)) == 4
    assert max(map(len, lists)) < 220
    assert all(name.isprintable() and not set(name) & set(" /[]") for name in lists)
    assert Path(to_config({}, sweep=True).folder) == named()
    assert to_config({"folder": "${now:%Y}"}, sweep=True).folder == to_config({"folder": "${now:%Y}"}).folder
    with pytest.raises(ValueError, match=r"resume=auto needs a folder without the time of day, got folder=x/\$\{now:%H\}: "):
        named(folder="x/${now:%H}")


def test_a_run_that_goes_on_by_itself_has_the_options_that_it_is_given(tmp_path):
    options = {"folder": str(tmp_path / "run"), "env": "InvertedPendulum-v4", "progress": False, "resume": "auto"}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # left by a process that was killed as it began
    (tmp_path / "run" / "config.yaml.tmp").touch()
    for resumed, change in ((False, {}), (True, {"eval": {"episodes": 3}})):
        with Run({**options, **change}) as run:  # which ends before it was trained
            assert (run.resumed, run.config.eval.episodes) == (resumed, 3 if change else 10)
    with pytest.raises(ValueError, match="goes on with the run's own options, and these differ: seed is 0, got 1"):
        Run({**options, "seed": 1})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"folder must be new, empty or a run's, got .*mine, which has other files"):
        Run({**options, "folder": str(tmp_path / "mine")})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not SUBMITIT, reason="needs hydra-submitit-launcher")
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL])
def test_a_job_of_submitit_that_is_preempted_or_killed_equals_one_that_was_not(number, whole, tmp_path):
    """Of a preempted job submitit hands in a second part itself; a killed one is handed in again by the same command."""
    launcher = [
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=10",
        f"hydra.launcher.submitit_folder={tmp_path}/log",
    ]
    command = ["-m", *OPTIONS, *launcher, "resume=auto", "folder=run"]
    process = start(tmp_path, *command)
    wait_for_records(tmp_path / "run", 30, process)
    os.kill(int(info(tmp_path / "run")["process"].split()[0]), number)
    _, said = process.communicate(timeout=300)
    assert (process.returncode == 0) == (number == signal.SIGUSR2), said
    if number == signal.SIGKILL:
        assert info(tmp_path / "run")["status"] == "running"
        process = start(tmp_path, *command)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert info(tmp_path / "run")["status"] == "finished"
    assert len(info(tmp_path / "run")["sessions"]) == 2
    assert records(tmp_path / "run") == whole
