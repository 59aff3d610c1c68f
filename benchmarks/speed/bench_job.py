"""The main job end to end: frames per second, where the time goes, peak memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from omnet_torchrl.training.logging import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "omnet_sac.py"
FRAMES, RANDOM = 3_000, 1_000


@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("env", ["Hopper-v4", "Humanoid-v4"])
def test_main_job(benchmark, tmp_path, env, num_envs):
    folder = tmp_path / "run"
    options = {"env": env, "num_envs": num_envs, "total_frames": FRAMES, "init_random_frames": RANDOM, "folder": folder}
    options |= {"eval.interval": FRAMES, "eval.episodes": 1, "checkpoint.interval": 0, "progress": "false"}
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
    frames, rates = read_metrics(folder / "metrics.csv")["time/frames_per_second"]
    benchmark.extra_info["frames_per_second"] = rates[-1]
    benchmark.extra_info["peak_mib"] = usage[-1].ru_maxrss / 1024
    benchmark.extra_info["where_it_went"] = re.search(r"where it went\W+(.*)", output[-1])[1].strip()
    assert frames[-1] > RANDOM
