"""The block of 20 critic updates and one actor update with sampling: rows, ways to run it, and how it grows."""

import components
import pytest
import torch
from components import BATCH, ROWS, TASKS, WIDTH
from torchrl.objectives import REDQLoss, SACLoss

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GROWTH = {
    "width": (WIDTH, 512, 1024, 2048),
    "num_subnets": (1, 2, 8, 16, 32),
    "batch": (64, 1024, 4096),
}


def run(benchmark, block, rounds=10):
    benchmark.pedantic(block, rounds=rounds)


@pytest.mark.parametrize("mode", ["eager", "compiled", pytest.param("captured", marks=[pytest.mark.gpu, NO_GPU])])
@pytest.mark.parametrize("task", ["hopper", "humanoid"])
@pytest.mark.parametrize("row", ROWS)
def test_rows(benchmark, row, task, mode):
    device = "cuda" if mode == "captured" else "cpu"
    run(benchmark, components.omnet_block(row, TASKS[task], compile=mode != "eager", device=device))


@pytest.mark.gpu
@NO_GPU
def test_eager_on_a_gpu(benchmark):
    run(benchmark, components.omnet_block("omnet", TASKS["hopper"], compile=False, device="cuda"))


@pytest.mark.filterwarnings("ignore")  # theirs, under torch.compile
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", [SACLoss, REDQLoss])
def test_torchrls_own_losses(benchmark, loss, compile):
    run(benchmark, components.torchrl_block(loss, TASKS["hopper"], compile=compile), rounds=3)


def test_bare_torch(benchmark):
    run(benchmark, components.bare_block(TASKS["hopper"]))


@pytest.mark.parametrize(("what", "value"), [(what, value) for what, values in GROWTH.items() for value in values])
@pytest.mark.parametrize("row", components.MASKED)
def test_growth(benchmark, row, what, value):
    run(benchmark, components.omnet_block(row, TASKS["hopper"], **{what: value}), rounds=5)


@pytest.mark.parametrize("batch", [64, BATCH, 4096])
@pytest.mark.parametrize("task", ["hopper", "humanoid"])
def test_replay_sampling(benchmark, task, batch):
    """The 20 batches of a frame at once; the main job only draws which rows they are."""
    buffer = components.replay(TASKS[task])
    benchmark(lambda: buffer.sample(20 * batch).reshape(20, batch))


@pytest.mark.parametrize("task", ["hopper", "humanoid"])
def test_draws(benchmark, task):
    update = components.make_update("omnet", TASKS[task], width=WIDTH, compile=False)
    batch = components.transitions(TASKS[task], BATCH)
    actor = [False] * 19 + [True]
    benchmark(lambda: update.loss.draw(batch, num_updates=20, actor=actor))


@pytest.mark.gpu
@NO_GPU
def test_peak_memory_on_a_gpu(benchmark):
    torch.cuda.reset_peak_memory_stats()
    run(benchmark, components.omnet_block("omnet", TASKS["hopper"], device="cuda"))
    benchmark.extra_info["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
