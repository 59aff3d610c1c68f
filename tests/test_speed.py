"""The benchmarks of benchmarks/speed: their reference is the update, number for number, and what they time runs."""

import bare
import matmuls
import pytest
import torch
from components import TASKS, bare_batch, bare_update, make_update, transitions

from omnet_torchrl.metrics import sac_flops

TINY = TASKS["tiny"]


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tensors(update):
    """Networks, target, temperature and moments, in one order for both kinds of updates."""
    if isinstance(update, bare.Update):
        networks = [bare.flat(layers) for layers in (update.actor, update.critic, update.target)]
        adams = [(adam.m, adam.v) for adam in (update.critic_adam, update.actor_adam)]
        log_alpha = update.log_alpha
    else:
        loss = update.loss
        params = (loss.actor_network_params, loss.qvalue_network_params, loss.target_qvalue_network_params)
        networks = [[value for value in each.values(True, True) if value.is_floating_point()] for each in params]
        adams = [(adam.exp_avgs, adam.exp_avg_sqs) for adam in (update._critic_adam, update._actor_adam)]
        log_alpha = loss.log_alpha
    groups = [*networks, *(moment for adam in adams for moment in adam), [log_alpha]]
    return [tensor.detach().reshape(-1) for group in groups for tensor in group]


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("bound", [1.0, 0.4])
def test_the_bare_torch_reference_is_the_update_number_for_number(bound):
    task = TINY._replace(bound=bound)
    update = make_update("omnet", task, width=16, compile=False)
    reference = bare_update(update, task, compile=False)
    before = [tensor.clone() for tensor in tensors(update)]
    close = {"rtol": 1e-9, "atol": 1e-12}  # float64; the order of sums is all that differs
    for i, batch in enumerate(transitions(task, 8 * 32).reshape(8, 32).unbind(0)):
        draws = update.loss.draw(batch, torch.Generator().manual_seed(i))
        plain = bare_batch(batch), dict(draws.items())
        torch.testing.assert_close(reference.critic_step(*plain), update.critic_step(batch, draws)["loss_qvalue"], **close)
        if i % 2:
            losses = update.actor_step(batch, draws)
            torch.testing.assert_close(reference.actor_step(*plain), (losses["loss_actor"], losses["loss_alpha"]), **close)
    for expected, got, first in zip(tensors(update), tensors(reference), before, strict=True):
        torch.testing.assert_close(got, expected, **close)
        assert not torch.equal(got, first)


@pytest.mark.slow
def test_the_compiled_reference_is_the_eager_one():
    updates = []
    for compile in (False, True):
        update = make_update("omnet", TINY, width=16, compile=False)
        reference = bare_update(update, TINY, compile=compile)
        for i, batch in enumerate(transitions(TINY, 4 * 32).reshape(4, 32).unbind(0)):
            draws = dict(update.loss.draw(batch, torch.Generator().manual_seed(i)).items())
            reference.critic_step(bare_batch(batch), draws)
            reference.actor_step(bare_batch(batch), draws)
        updates.append(tensors(reference))
    for eager, compiled in zip(*updates, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_the_matmul_floor_counts_the_products_of_a_block():
    """By hand, for a network of one unit: forward 3 layers; trained pass forward, 3 weights, 2 inputs."""
    shapes = matmuls.products(1, 1, width=1, batch=1, updates=1, trained=1, target=2, value=5)
    actor, critic = 1 + 1 + 2, 2 + 1 + 1
    update = actor + 2 * critic + (critic + critic + 1 + 1)
    delayed = (actor + actor + 1 + 2) + 5 * (critic + 1 + 1 + 1)
    assert matmuls.flops(shapes) == 2 * (update + delayed)


@pytest.mark.parametrize(("observation", "action", "least"), [(11, 3, 0.95), (376, 17, 0.85)])
def test_the_matmul_floor_counts_no_more_than_the_papers_convention(observation, action, least):
    counted = matmuls.flops(matmuls.products(observation, action))
    assert least < counted / (20 * sac_flops(observation, action)) < 1
