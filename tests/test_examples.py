"""The main job on real environments, started as a user starts it; what needs no process of its own runs in this one."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import EXAMPLE, run_script

# Small, so that a run takes seconds.
SIZES = ["network.num_cells=[32,32]", "network.num_subnets=3", "optim.batch_size=16", "compile=false"]
FRAMES = ["total_frames=200", "init_random_frames=50", "eval.interval=100", "eval.episodes=4", "utd_ratio=2"]
pytestmark = pytest.mark.filterwarnings("ignore:.*units .* lose every one")
PENDULUM = ["env=InvertedPendulum-v4", *SIZES, *FRAMES, "policy_update_delay=2"]


def command(*arguments):
    return [sys.executable, str(EXAMPLE), *arguments]


def run_example(folder, *arguments, ok=True):
    """Start it in ``folder``, and give the run in ``folder/run``."""
    result = subprocess.run(command(f"folder={folder}/run", *arguments), capture_output=True, text=True, cwd=folder)
    assert (result.returncode == 0) == ok, result.stderr
    return result


def run_here(folder, *arguments):
    """The same in this process; what it prints for a person."""
    code, printed = run_script(f"folder={folder}/run", *arguments)
    assert code == 0, printed
    return printed


def metrics(run):
    with (run / "metrics.csv").open() as file:
        return [(int(row["frames"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


def repeatable(run):
    return [row for row in metrics(run) if not row[1].startswith("time/")]


def values(run, name):
    return {frames: value for frames, key, value in metrics(run) if key == name}


def info(run):
    return json.loads((run / "run.json").read_text())


@pytest.mark.parametrize("option", ["env=InvertedPendulum-v4", "env=Humanoid-v4", "network.masks=unit"])
def test_a_short_run_leaves_all_that_it_promises(option, tmp_path, pictures):
    alone = option == "env=InvertedPendulum-v4"
    said = run_example(tmp_path, *PENDULUM).stderr if alone else run_here(tmp_path, *PENDULUM, option)
    run = tmp_path / "run"
    names = {name for _, name, _ in metrics(run)}
    training = {"loss_qvalue", "qvalue", "loss_actor", "alpha", "entropy", "episode_return", "episode_length"}
    assert names >= {f"train/{name}" for name in training}
    assert names >= {"eval/return", "eval/length", "subnets/q_std", "subnets/action_distance", "time/updates_per_second"}
    assert list(values(run, "train/alpha")) == [100, 200]
    assert list(values(run, "eval/return")) == [100, 200]
    for frames, mean in values(run, "eval/return").items():
        each = [values(run, f"eval/return_subnet_{k}")[frames] for k in range(3)]
        assert mean == pytest.approx((2 * each[0] + each[1] + each[2]) / 4)  # four episodes over three subnetworks
    assert info(run)["status"] == "finished"
    assert info(run)["updates"] == 2 * 150
    assert (run / "learning_curve.png").stat().st_size > 10_000
    assert (run / "checkpoints" / "checkpoint_000000200.json").exists()
    assert ("training FLOPs" in said) == ("Humanoid" in option)  # one of the tasks that the paper compares on
    for part in ("subnets", "results", "finished", "where it went"):
        assert part in said


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(tmp_path):
    rows = []
    for i, seed in enumerate([1, 1, 2]):
        folder = tmp_path / str(i)
        folder.mkdir()
        run_here(folder, *PENDULUM, "total_frames=90", "eval.interval=45", f"seed={seed}")
        rows.append(repeatable(folder / "run"))
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_ctrl_c_saves_and_says_how_to_go_on_and_going_on_changes_nothing(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    options = [*PENDULUM, "total_frames=400", "utd_ratio=1"]
    run_here(whole, *options)
    process = subprocess.Popen(command("folder=run", *options), stderr=subprocess.PIPE, text=True, cwd=stopped)
    while not values_so_far(stopped / "run", "eval/return"):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert info(stopped / "run")["status"] == "interrupted"
    hint = re.search(r"to go on, in this directory: python (\S+omnet_sac.py) (resume=\S+)", said)
    assert hint, said
    resumed = subprocess.run([sys.executable, hint[1], hint[2]], capture_output=True, text=True, cwd=stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert repeatable(stopped / "run") == repeatable(whole / "run")
    assert len(info(stopped / "run")["sessions"]) == 2

    # A finished run goes on when it may last longer.
    assert run_script(f"resume={stopped}/run", "total_frames=450")[0] == 0
    assert max(values(stopped / "run", "eval/return")) == 450
    assert repeatable(stopped / "run")[: len(repeatable(whole / "run"))] == repeatable(whole / "run")


def test_a_run_that_diverges_ends_with_status_1(tmp_path):
    wrong = ["optim.lr=1e30", "log_interval=10", "total_frames=80"]
    code, said = run_script(*PENDULUM, *wrong, f"folder={tmp_path}/run")
    assert (code, "diverged: " in said) == (1, True)
    assert info(tmp_path / "run")["status"] == "diverged"


def values_so_far(run, name):
    return (run / "metrics.csv").exists() and name in (run / "metrics.csv").read_text()


def test_several_environments_and_a_sweep_over_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, wrong = run_script("-m", *PENDULUM, "seed=0,-1")
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert re.fullmatch(r"error: seed must be .* of the sweep; none was started\)\n", wrong)
    arguments = [
        "-m",
        *PENDULUM,
        "num_envs=4",
        "init_random_frames=52",
        "total_frames=100",
        "seed=0,1",
        "folder=sweep/seed${seed}",
    ]
    code, printed = run_script(*arguments)
    assert code == 0, printed
    for seed in (0, 1):
        assert info(tmp_path / "sweep" / f"seed{seed}")["seed"] == seed
        assert info(tmp_path / "sweep" / f"seed{seed}")["updates"] == 2 * (100 - 52)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "sweep"]


def test_hydras_flags_print_the_options_and_run_nothing(tmp_path):
    result = subprocess.run(command("--cfg", "job", "seed=3"), capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed: 3\n" in result.stdout
    assert list(tmp_path.iterdir()) == []


BAD = {
    "network.num_subnet=3": r"did you mean 'network.num_subnets'",
    "network.sparsity=1.0": r"network.sparsity must be .* \[0, 1\)",
    "env=Hoper-v4": r"Hopper-v4",
    "env=CartPole-v1": r"the action of env must be a Box of floats .*, got Discrete\(2\)",
    "device=cuda:77": r"device",
    "policy_update_delay=1000": r"policy_update_delay must be at most 300",
    "utd_ratio=0": r"utd_ratio must be in \(0, 1e6\]",
    "resume=nowhere": r"is no run folder",
    "+foo=3": r"unknown option 'foo'; did you mean",
    "logger=tensorbord": r"did you mean tensorboard",
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_wrong_option_is_one_line_before_anything_is_made(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = run_script("folder=run", *PENDULUM, wrong)
    assert code == 1
    (line,) = (line for line in printed.splitlines() if line.strip())
    assert line.startswith("error: ")
    assert re.search(BAD[wrong], line)
    assert list(tmp_path.iterdir()) == []


def test_resuming_another_architecture_or_a_damaged_run_is_refused(tmp_path):
    run_here(tmp_path, *PENDULUM)
    run = tmp_path / "run"
    before = (run / "metrics.csv").read_bytes()
    code, said = run_script(f"resume={run}", "network.num_cells=[8,8]")
    assert "network.num_cells is [32, 32], got [8, 8]" in said
    assert code == 1
    for state in (run / "checkpoints").glob("state_*"):
        os.truncate(state, 100)
    code, said = run_script(f"resume={run}")
    assert "is whole" in said
    assert code == 1
    assert (run / "metrics.csv").read_bytes() == before
    assert info(run)["status"] == "finished"


@pytest.mark.gpu
def test_a_short_run_on_a_gpu_reaches_its_evaluations(tmp_path):
    run_example(tmp_path, *PENDULUM, "device=cuda", "compile=true")
    assert list(values(tmp_path / "run", "eval/return")) == [100, 200]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quick_start_solves_its_task(tmp_path):
    start = time.monotonic()
    run_example(tmp_path, "--config-name", "quick_start")
    assert time.monotonic() - start < 300  # compiling included
    returns = values(tmp_path / "run", "eval/return")
    assert returns[max(returns)] > 9_000
