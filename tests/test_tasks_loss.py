"""Tasks as the index: laws of the loss with choose="batch" and of its update."""

import copy

import pytest
import torch
from conftest import make_batch, small_actor, small_qvalue, specs
from torch import nn

from omnet_torchrl import MaskedMLP, OMNetSACLoss, Update, make_actor, make_qvalue
from omnet_torchrl.layers import MaskedLinear
from omnet_torchrl.updates import compiled as compiled_module

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")
T, B = 3, 8
LAYERS = {"num_cells": (16, 16), "layer_norm": False}


def make_loss(tasks=T, critics=2, **kwargs):
    return OMNetSACLoss(small_actor(tasks), small_qvalue(tasks * critics), choose="batch", **kwargs)


def batch_of(*lead, tasks=T, seed=0):
    """Transitions ``(*lead, T, B)``, a task in each row."""
    batch = make_batch(*lead, tasks, B, seed=seed, done=0.2)
    return batch.set("subnet", torch.arange(tasks)[:, None].expand(*lead, tasks, B))


def weights(loss):
    """Weights of masked layers with their masks, of critic and actor."""
    return {
        f"{name}.{path}": (layer.weight.detach().clone(), layer.masks)
        for name, network in (("critic", loss.qvalue_network), ("actor", loss.actor_network))
        for path, layer in network.named_modules()
        if isinstance(layer, MaskedLinear)
    }


def put(loss):
    """The loss with its parameters in its networks, to read them by layer."""
    loss = copy.deepcopy(loss)
    loss.qvalue_network_params.to_module(loss.qvalue_network)
    loss.actor_network_params.to_module(loss.actor_network)
    return loss


@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("task", range(T))
def test_a_tasks_update_changes_no_weight_outside_its_masks(task, critics):
    loss = make_loss(critics=critics)
    before = weights(put(loss))
    Update(loss, lr=1e-2, compile=False)(batch_of()[task : task + 1])
    for name, (weight, masks) in weights(put(loss)).items():
        own = masks[task * critics : (task + 1) * critics] if name.startswith("critic") else masks[task : task + 1]
        changed = weight != before[name][0]
        assert not (changed & ~own.any(0)).any(), name
        assert changed.any(), name
    temperature = loss.log_alpha.detach() != 0
    assert temperature.tolist() == [t == task for t in range(T)]


def disjoint(sizes, tasks, critics):
    """Masks of each layer: a task's weights are no other task's, and its critics share half of them."""
    source, layers = torch.Generator().manual_seed(0), []
    for shape in sizes:
        owner = torch.randint(tasks, shape, generator=source)
        kept = [(owner == t) & (torch.rand(shape, generator=source) < 0.7) for t in range(tasks) for _ in range(critics)]
        layers.append(torch.stack(kept))
    return layers


def networks(masks, kind):
    """A critic or actor with these masks, and biases, which all tasks share, that stay 0."""
    drawn = iter(masks)
    make = make_qvalue if kind == "critic" else make_actor
    options = {"num_subnets": len(masks[0]), "mask_fn": lambda *_, **__: next(drawn), **LAYERS}
    torch.manual_seed(3)  # every network of one kind has the same weights
    network = make(*specs(), network_class=MaskedMLP, **options)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.bias.requires_grad_(False)
    return network


SIZES = {"critic": [(16, 7), (16, 16), (1, 16)], "actor": [(16, 5), (16, 16), (4, 16)]}


@pytest.mark.filterwarnings("ignore:.*units .* lose every one")
def test_tasks_with_disjoint_masks_learn_as_separate_networks():
    tasks, critics = 2, 2
    masks = {"critic": disjoint(SIZES["critic"], tasks, critics), "actor": disjoint(SIZES["actor"], tasks, 1)}
    together = OMNetSACLoss(networks(masks["actor"], "actor"), networks(masks["critic"], "critic"), choose="batch")
    alone = []
    for t in range(tasks):
        own = {"critic": [m[2 * t : 2 * t + 2] for m in masks["critic"]], "actor": [m[t : t + 1] for m in masks["actor"]]}
        pair = [networks(own[kind], kind) for kind in ("actor", "critic")]
        alone.append(OMNetSACLoss(*pair, num_trained_subnets=None))  # SAC with two critics, of this task alone
    options = {"lr": 1e-2, "tau": 0.1, "policy_update_delay": 2, "compile": False}
    updates = [Update(loss, **options) for loss in (together, *alone)]
    for i in range(10):
        batch = batch_of(tasks=tasks, seed=i)
        draws = together.draw(batch)
        metrics = updates[0](batch, draws=draws)
        for t in range(tasks):
            own = alone[t].draw(batch[t])
            expected = updates[1 + t](batch[t].exclude("subnet"), draws=own.update(draws.apply(lambda x, t=t: x[t])))
            for name in ("loss_qvalue", "qvalue", "td_error"):
                torch.testing.assert_close(metrics[f"{name}_task"][t], expected[name])
    found = weights(put(together))
    for t in range(tasks):
        for name, (weight, mask) in weights(put(alone[t])).items():
            torch.testing.assert_close(found[name][0] * mask.any(0), weight * mask.any(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.log_alpha[t], alone[t].log_alpha)


def test_tasks_with_equal_masks_learn_as_one_network():
    """Their losses are summed: the gradient is that of one network on all transitions, times the number of tasks."""
    ones = {kind: [torch.ones(1, *size, dtype=torch.bool) for size in sizes] for kind, sizes in SIZES.items()}
    equal = {
        "critic": [mask.expand(2 * T, -1, -1).clone() for mask in ones["critic"]],
        "actor": [mask.expand(T, -1, -1).clone() for mask in ones["actor"]],
    }
    tasks = OMNetSACLoss(*(networks(equal[kind], kind) for kind in ("actor", "critic")), choose="batch")
    one = OMNetSACLoss(*(networks(ones[kind], kind) for kind in ("actor", "critic")))
    batch = batch_of()
    draws = tasks.draw(batch)
    flat = {name: draws[name].flatten(0, 1) for name in ("next_noise", "noise")}
    flat = one.draw(batch.flatten()).update(flat)
    # Each task has two critics, which are the same network here: the critic's loss counts it twice.
    for factor, loss, mean in (
        (2 * T, tasks.qvalue_loss(batch, draws=draws)[0], one.qvalue_loss(batch.flatten(), draws=flat)[0]),
        (T, tasks.actor_loss(batch, draws=draws)[0], one.actor_loss(batch.flatten(), draws=flat)[0]),
    ):
        torch.testing.assert_close(loss, factor * mean)
        params = [{**dict(each.named_parameters())} for each in (tasks, one)]
        grads = [
            torch.autograd.grad(value, [p for p in each.values() if p.requires_grad], allow_unused=True)
            for value, each in zip((loss, mean), params, strict=True)
        ]
        for got, expected in zip(*grads, strict=True):
            assert (got is None) == (expected is None)
            if got is not None and got.shape == expected.shape:
                torch.testing.assert_close(got, factor * expected, rtol=1e-4, atol=1e-5)


def test_each_element_may_have_a_task_of_its_own():
    """A batch (B,) of mixed tasks has, up to the number of tasks, the losses of the rows that it is made of."""
    loss, batch = make_loss(reduction="none", scalar_output_mode="exclude"), batch_of()
    draws = loss.draw(batch)
    rows, elements = loss(batch.clone(), draws=draws), loss(batch.flatten(), draws=draws.apply(lambda x: x.flatten(0, 1)))
    for name in ("loss_qvalue", "loss_actor", "loss_alpha"):
        torch.testing.assert_close(rows[name].flatten(), elements[name])


def test_what_is_logged_of_each_task_adds_up():
    update = Update(make_loss(), compile=False)
    metrics = update(batch_of(4))
    torch.testing.assert_close(metrics["loss_qvalue_task"].sum(), metrics["loss_qvalue"])
    torch.testing.assert_close(metrics["loss_actor_task"].sum(), metrics["loss_actor"])
    for name in ("qvalue", "td_error", "entropy", "alpha"):
        assert metrics[f"{name}_task"].shape == (T,)
        torch.testing.assert_close(metrics[f"{name}_task"].mean(), metrics[name])


def test_the_rows_may_be_some_of_the_tasks_in_any_order():
    loss, batch = make_loss(), batch_of()
    draws, order = loss.draw(batch), [2, 0]
    every = loss.qvalue_loss(batch, draws=draws)[1]
    some = loss.qvalue_loss(batch[order], draws=draws.apply(lambda x: x[order]))[1]
    torch.testing.assert_close(some["loss_qvalue_task"], every["loss_qvalue_task"][order])


def test_priorities_weigh_within_each_task():
    loss, batch = make_loss(use_prioritized_weights=True), batch_of()
    weight = torch.rand(T, B)
    draws = loss.draw(batch)
    got = loss.qvalue_loss(batch.set("priority_weight", weight), draws=draws)[0]
    plain = make_loss(reduction="none", scalar_output_mode="exclude")
    plain.load_state_dict(loss.state_dict())
    each = plain.qvalue_loss(batch.exclude("priority_weight"), draws=draws)[0]
    torch.testing.assert_close(got, ((each * weight).sum(1) / weight.sum(1)).sum())


@pytest.mark.parametrize("code", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
def test_compiled_and_eager_updates_agree(code, monkeypatch):
    if code == "traced":
        monkeypatch.setattr(compiled_module, "translate", lambda graph, inputs: graph)
    updates = []
    for compile in (False, True):
        torch.manual_seed(0)
        updates.append(Update(make_loss(), lr=1e-2, policy_update_delay=2, compile=compile))
    batch = batch_of(2)
    draws = updates[0].loss.draw(batch[0], num_updates=2)
    metrics = [update(batch.clone(), draws=draws) for update in updates]
    for name, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][name], value, rtol=1e-4, atol=1e-5)
    for name, value in updates[0].loss.state_dict().items():
        torch.testing.assert_close(updates[1].loss.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_temperature_for_each_task_is_reset_saved_and_bounded():
    loss = make_loss(alpha_init=0.5, max_alpha=0.6)
    assert loss.log_alpha.exp().tolist() == pytest.approx([0.5] * T)
    update = Update(loss, lr=1.0, compile=False)
    other = Update(make_loss(alpha_init=0.5, max_alpha=0.6), lr=1.0, compile=False)
    for _ in range(3):
        update(batch_of())
    assert loss.log_alpha.exp().max() <= 0.6 + 1e-6
    other.load_state_dict(update.state_dict())
    torch.testing.assert_close(other.loss.log_alpha, loss.log_alpha)
    update.reset()
    assert loss.log_alpha.exp().tolist() == pytest.approx([0.5] * T)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: OMNetSACLoss(small_actor(2), small_qvalue(5), choose="batch"), "multiple of the actor's .* got 5 .* 2 of"),
        (lambda: OMNetSACLoss(small_actor(3), small_qvalue(2), choose="batch"), "multiple of the actor's .* got 2 .* 3 of"),
        (lambda: make_loss(replacement=True), "replacement=True"),
        (lambda: make_loss(num_trained_subnets=None), "left out with choose='batch'"),
        (lambda: OMNetSACLoss(small_actor(2), small_qvalue(2), choose="tasks"), "'uniform' or 'batch', got 'tasks'"),
        (lambda: Update(make_loss(), compile=False)(batch_of()[0]), r"\(T, B\) or \(U, T, B\).* got \(8,\)"),
        (lambda: Update(make_loss(), compile=False)(batch_of().transpose(0, 1)), "must be of one task"),
        (lambda: Update(make_loss(), compile=False)(batch_of().exclude("subnet")), "the batch has no 'subnet'"),
        (lambda: make_loss().qvalue_loss(batch_of().exclude("subnet")), "the batch has no 'subnet'"),
    ],
)
def test_what_does_not_fit_is_said(wrong, message):
    with pytest.raises((ValueError, KeyError), match=message):
        wrong()
