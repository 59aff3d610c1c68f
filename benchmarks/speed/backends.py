"""What workers gain where an environment is slow.

    python benchmarks/speed/backends.py                       # an environment that sleeps for 20 ms a step: a few minutes
    python benchmarks/speed/backends.py --seconds 0.1 --workers 2 4 8 --utd-ratio 20 --backends process ray

A sleeping environment takes no processor: what else the machine does disturbs it little. Every line is a run of the main job.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box

from omnet_torchrl.training.record.metrics import read_metrics

EXAMPLE = Path(__file__).parents[2] / "examples" / "omnet_sac.py"
RANDOM = 320  # frames before the first update


class Sleeping(gymnasium.Env):
    """An environment of Hopper's sizes that sleeps at each step."""

    observation_space, action_space = Box(-np.inf, np.inf, (11,), np.float32), Box(-1, 1, (3,), np.float32)

    def __init__(self, seconds: float = 0.02):
        self.seconds = seconds

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Random numbers."""
        super().reset(seed=seed)
        self._steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Sleep; the more the actions are 1, the better."""
        time.sleep(self.seconds)
        self._steps += 1
        return self._observation(), float(action.sum()), False, self._steps >= 200, {}

    def _observation(self) -> np.ndarray:
        return self.np_random.standard_normal(11, dtype=np.float32)


def rate(arguments: argparse.Namespace, backend: str, workers: int) -> tuple[float, float]:
    """Frames per second of a run, once everything is compiled, and the mean age of its policy in frames."""
    frames = RANDOM + arguments.frames
    options = {"env": "backends:Sleeping", "env_kwargs.seconds": arguments.seconds, "utd_ratio": arguments.utd_ratio}
    options |= {"total_frames": frames, "init_random_frames": RANDOM, "log_interval": 40, "eval.episodes": 0}
    options |= {"eval.interval": frames, "checkpoint.interval": 0, "progress": False, "collect.backend": backend}
    options |= {} if backend == "direct" else {"collect.num_workers": workers}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        options["folder"] = f"{folder}/run"
        command = [sys.executable, str(EXAMPLE), *(f"{name}={value}" for name, value in options.items())]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True)
        metrics = read_metrics(Path(folder, "run", "metrics.csv"))
    counts, rates = map(np.array, metrics["time/frames_per_second"])
    steady = slice(len(counts) // 3, None)  # the first ones have what was collected while the update was compiled
    age = np.mean(metrics["collect/policy_age"][1]) if "collect/policy_age" in metrics else 1.0
    return float(np.ptp(counts[steady]) / np.ptp((counts / rates)[steady])), float(age)


def workers_table(arguments: argparse.Namespace) -> list[str]:
    """Frames per second by backend and workers."""
    direct, age = rate(arguments, "direct", 1)
    lines = ["| backend | workers | frames/s | / direct | age of the policy, frames |", "|---|---|---|---|---|"]
    lines.append(f"| direct | | {direct:.1f} | 1 | {age:.0f} |")
    for backend in arguments.backends:
        for workers in arguments.workers:
            found, age = rate(arguments, backend, workers)
            lines.append(f"| {backend} | {workers} | {found:.1f} | {found / direct:.2f} | {age:.0f} |")
    return lines


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.02, help="that a step of the environment sleeps")
    parser.add_argument("--utd-ratio", type=float, default=1, help="updates per frame")
    parser.add_argument("--frames", type=int, default=800, help="after the random ones")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--backends", nargs="+", default=["process"], choices=["process", "ray"])
    arguments = parser.parse_args()
    table = workers_table(arguments)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch {torch.__version__}"
    print("\n".join([*table, "", machine]))


if __name__ == "__main__":
    main()
