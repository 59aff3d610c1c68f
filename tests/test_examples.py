"""The examples on real environments, each started as a user starts it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(folder, *overrides, ok=True):
    command = [sys.executable, EXAMPLES / "omnet_sac.py", f"hydra.run.dir={folder}", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (result.returncode == 0) == ok, result.stderr
    return result


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return [(int(row["frames"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


def values(folder, name):
    return {frames: value for frames, key, value in metrics(folder) if key == name}


@pytest.mark.parametrize("env", ["InvertedPendulum-v4", "Humanoid-v4"])
def test_a_short_run_logs_training_and_evaluation(env, tmp_path):
    sizes = [
        "network.num_cells=[32,32]",
        "network.num_subnets=3",
        "utd_ratio=2",
        "policy_update_delay=2",
        "optim.batch_size=16",
    ]
    frames = ["total_frames=200", "init_random_frames=50", "eval.interval=100", "eval.episodes=4"]
    run_example(tmp_path, f"env={env}", *sizes, *frames)
    names = {name for _, name, _ in metrics(tmp_path)}
    assert names >= {
        "train/episode_return",
        "train/loss_qvalue",
        "train/loss_actor",
        "train/alpha",
        "eval/return",
        "eval/length",
    }
    assert values(tmp_path, "time/updates") == {100: 2 * 50, 200: 2 * 150}
    assert list(values(tmp_path, "eval/return")) == [100, 200]
    for frames, mean in values(tmp_path, "eval/return").items():
        each = [values(tmp_path, f"eval/return_subnet_{k}")[frames] for k in range(3)]
        assert mean == pytest.approx((2 * each[0] + each[1] + each[2]) / 4)  # four episodes over three subnetworks


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(tmp_path):
    options = ["env=InvertedPendulum-v4", "total_frames=120", "init_random_frames=50", "eval.interval=120", "utd_ratio=2"]
    rows = []
    for i, seed in enumerate([1, 1, 2]):
        folder = tmp_path / str(i)
        folder.mkdir()
        run_example(folder, *options, f"seed={seed}")
        rows.append(metrics(folder))
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_a_wrong_option_is_named(tmp_path):
    assert "num_subnet" in run_example(tmp_path, "network.num_subnet=3", ok=False).stderr
    assert "sparsity" in run_example(tmp_path, "network.sparsity=1.0", ok=False).stderr
    assert "Bounded of floating point" in run_example(tmp_path, "env=CartPole-v1", ok=False).stderr


@pytest.mark.gpu
def test_a_short_run_on_a_gpu_reaches_its_evaluations(tmp_path):
    options = ["env=InvertedPendulum-v4", "total_frames=120", "init_random_frames=50", "eval.interval=60", "utd_ratio=2"]
    run_example(tmp_path, *options, "device=cuda")
    assert list(values(tmp_path, "eval/return")) == [60, 120]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_solves_the_inverted_pendulum(tmp_path):
    run_example(tmp_path, "env=InvertedPendulum-v4", "total_frames=6000", "init_random_frames=1000", "eval.interval=1000")
    assert max(values(tmp_path, "eval/return").values()) > 950
