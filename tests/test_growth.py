"""What a process holds does not grow with the frames of a run beyond its buffer, nor with the runs that it makes."""

import gc
import os
import runpy
import threading
from pathlib import Path

import pytest
from conftest import EXAMPLE

from omnet_torchrl.training import Run
from omnet_torchrl.training.record.reporter import Reporter

OPTIONS = {
    **{"env": "InvertedPendulum-v4", "compile": False, "progress": False, "num_threads": 1, "utd_ratio": 0.05},
    **{"init_random_frames": 100, "policy_update_delay": 2, "log_interval": 100, "optim": {"batch_size": 16}},
    **{"network": {"num_cells": [16, 16], "sparsity": 0.1}, "eval": {"interval": 1_000, "episodes": 2, "bias_episodes": 1}},
    "checkpoint": {"interval": 1_000},
}


def held():
    """Memory in MiB, open files and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    native = int(Path("/proc/self/status").read_text().split("Threads:")[1].split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, (threading.active_count(), native)


@pytest.fixture
def train():
    return runpy.run_path(str(EXAMPLE))["train"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_twenty_thousand_frames_hold_what_ten_thousand_did(train, tmp_path, monkeypatch):
    progress, seen = Reporter.progress, {}

    def watch(reporter, frames, *rest):
        progress(reporter, frames, *rest)
        if frames % 5_000 == 0:
            seen[frames] = held()

    monkeypatch.setattr(Reporter, "progress", watch)
    with Run({**OPTIONS, "total_frames": 20_000, "folder": str(tmp_path / "run")}) as run:
        train(run)
    (memory, *others), (later, *still) = seen[10_000], seen[20_000]
    assert still == others == list(seen[5_000][1:])
    assert later - memory < 5  # 10,000 transitions of 12 numbers are 0.5 MiB; the rest is for the allocator


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_five_runs_in_a_process_hold_what_two_did(train, tmp_path):
    seen = []
    for number in range(5):
        with Run({**OPTIONS, "total_frames": 1_000, "folder": str(tmp_path / str(number))}) as run:
            train(run)
        seen.append(held())
    (memory, *others), (later, *still) = seen[1], seen[4]
    assert still == others
    assert later - memory < 15
