"""Acting: a plain MLP, one subnetwork extracted, and the index; one environment to 64."""

import components
import pytest
import torch
from components import TASKS
from tensordict import TensorDict

from omnet_torchrl import make_actor


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
