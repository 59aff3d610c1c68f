"""Acting: a plain MLP, one subnetwork extracted, and the index; one environment to 64. And collectors with subnet sampling."""

import components
import pytest
import torch
from collecting import COLLECTORS, collect
from components import TASKS
from tensordict import TensorDict

from omnet_torchrl import make_actor

# Where the index is drawn, and who acts: the dense extract(0), which leaves the primer's own cost, or all subnetworks.
DRAWN = [("none", False), ("outside", False), ("inside", False), ("outside", True), ("inside", True), ("policy", True)]


@pytest.mark.parametrize("kind", ["plain", "extracted", "indexed"])
def test_acting_in_one_environment(benchmark, kind):
    """200 actions."""
    benchmark.pedantic(components.act_block(kind), rounds=10)


@pytest.mark.parametrize("num_envs", [1, 4, 16, 64])
@pytest.mark.parametrize("kind", ["extracted", "indexed"])
def test_acting_in_many(benchmark, kind, num_envs):
    task = TASKS["hopper"]
    actor = make_actor(*task.specs())
    data = TensorDict(observation=torch.randn(num_envs, task.observation), batch_size=[num_envs])
    if kind == "indexed":
        data["subnet"] = torch.randint(actor.num_subnets, (num_envs,))
    policy = actor if kind == "indexed" else actor.extract(0)
    with torch.no_grad():
        benchmark(lambda: policy(data))


@pytest.mark.parametrize("num_envs", [1, 4, 16, 64])
@pytest.mark.parametrize(("placement", "indexed"), DRAWN)
@pytest.mark.parametrize("env", ["Hopper-v4", "Humanoid-v4", "ZeroWork"])
@pytest.mark.parametrize("collector", COLLECTORS)
def test_collecting(benchmark, collector, env, placement, indexed, num_envs):
    """100 steps of each environment, 400 frames at least; ``extra_info`` has frames per second."""
    if num_envs == 64 and (env != "ZeroWork" or collector != "Collector"):
        pytest.skip("so many only where the collector's own work is all there is")
    frames = 100 * max(4, num_envs)
    # Two workers of their own pace end their batches at nearly the same time: every other wait is none.
    each = 4 if collector == "MultiAsync" else 1
    batches, end = collect(env, placement, indexed=indexed, collector=collector, num_envs=num_envs, frames_per_batch=frames)
    try:
        benchmark.pedantic(lambda: [next(batches) for _ in range(each)], rounds=3, warmup_rounds=1)
    finally:
        end()
    benchmark.extra_info["frames_per_second"] = each * frames / benchmark.stats.stats.median
