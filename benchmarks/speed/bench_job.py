"""The main job end to end: frames per second, where the time goes, peak memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from omnet_torchrl.training.record.metrics import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "omnet_sac.py"
FRAMES, RANDOM = 3_000, 1_000


@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("env", ["Hopper-v4", "Humanoid-v4"])
def test_main_job(benchmark, tmp_path, env, num_envs):
    run(benchmark, tmp_path / "run", env=env, num_envs=num_envs, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_main_job_on_a_gpu(benchmark, tmp_path, compile):
    """To be at least 5,000 updates per second in steady state when captured, and eight times as many as eager."""
    run(benchmark, tmp_path / "run", env="Hopper-v4", device="cuda", compile=compile)


def run(benchmark, folder, **options):
    """One job, and what is known of it."""
    options |= {"total_frames": FRAMES, "init_random_frames": RANDOM, "folder": folder}
    options |= {"eval.interval": FRAMES, "eval.episodes": 1, "checkpoint.interval": 0, "progress": False}
    command = [sys.executable, str(EXAMPLE), *(f"{name}={value}" for name, value in options.items())]
    output, usage = [], []

    def job():
        wide = {**os.environ, "COLUMNS": "200"}
        with subprocess.Popen(command, env=wide, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            output.append(process.stdout.read())
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        usage.append(used)
        assert process.returncode == 0, output[-1]

    benchmark.pedantic(job, rounds=1)
    metrics = read_metrics(folder / "metrics.csv")
    frames, rates = map(np.array, metrics["time/frames_per_second"])
    assert frames[-1] > RANDOM
    elapsed = frames / rates
    made = metrics["time/updates_per_second"][1] * elapsed
    steady = slice(len(frames) // 2, None)  # by then everything is compiled
    benchmark.extra_info["frames_per_second"] = float(rates[-1])
    benchmark.extra_info["steady_updates_per_second"] = float(np.ptp(made[steady]) / np.ptp(elapsed[steady]))
    benchmark.extra_info["peak_mib"] = usage[-1].ru_maxrss / 1024
    benchmark.extra_info["where_it_went"] = re.search(r"where it went\W+(.*)", output[-1])[1].strip()
