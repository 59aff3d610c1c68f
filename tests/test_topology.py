"""Masks that change: literal numbers for every function, against plain NumPy, and how many weights are kept."""

import math

import numpy as np
import pytest
import torch

from omnet_torchrl import topology


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"in": (32, 7), "hidden": (32, 32), "out": (1, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_saliency_is_the_normalised_product():
    scores = topology.saliency(
        {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([3.0])},
        {"a": torch.tensor([[2.0, 1.0]]), "b": torch.tensor([-2.0])},
    )
    torch.testing.assert_close(scores["a"], torch.tensor([[0.2, 0.2]]))
    torch.testing.assert_close(scores["b"], torch.tensor([0.6]))


def test_saliency_without_a_gradient_is_zero():
    assert topology.saliency({"a": torch.ones(3)}, {"a": torch.zeros(3)})["a"].tolist() == [0, 0, 0]


def test_dapds_mask_is_that_of_numpy():
    """The largest of |weight x gradient| over the whole network; the gradient is that of a regression."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=generator), torch.randn(64, 1, generator=generator)
    first = torch.randn(5, 6, generator=generator, requires_grad=True)
    second = torch.randn(1, 5, generator=generator, requires_grad=True)
    loss = ((torch.relu(x @ first.T) @ second.T - y) ** 2).mean()
    gradients = dict(zip(("first", "second"), torch.autograd.grad(loss, (first, second)), strict=True))
    masks = topology.global_top_k(topology.saliency({"first": first, "second": second}, gradients), 0.4)

    a, b, inputs, target = (t.detach().double().numpy() for t in (first, second, x, y))
    hidden = np.maximum(inputs @ a.T, 0)
    error = 2 * (hidden @ b.T - target) / 64
    grad_b = error.T @ hidden
    grad_a = ((error @ b) * (hidden > 0)).T @ inputs
    scores = np.concatenate([np.abs(a * grad_a).ravel(), np.abs(b * grad_b).ravel()])
    expected = np.zeros(35, bool)
    expected[np.argsort(-scores, kind="stable")[:14]] = True
    got = torch.cat([masks["first"].flatten(), masks["second"].flatten()]).numpy()
    np.testing.assert_array_equal(got, expected)


def test_a_linear_problem_keeps_the_inputs_that_are_used():
    x = torch.randn(512, 10, generator=torch.Generator().manual_seed(0))
    target = x[:, [1, 4, 7]] @ torch.tensor([1.0, -2.0, 0.5])
    weight = torch.zeros(10).add_(0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(((x @ weight - target) ** 2).mean(), weight)
    kept = topology.global_top_k(topology.saliency({"w": weight}, {"w": gradient}), 0.3)["w"]
    assert kept.nonzero().flatten().tolist() == [1, 4, 7]


@pytest.mark.parametrize("density", [0.013, 0.05, 0.5, 0.95, 1.0])
def test_exactly_as_many_are_kept_however_many_are_equal(density):
    for scores in (network(), {name: torch.zeros_like(w) for name, w in network().items()}):
        masks = topology.global_top_k(scores, density)
        assert sum(int(mask.sum()) for mask in masks.values()) == round(density * 1280)
        masks = topology.layer_top_k(scores, topology.uniform_densities(scores, density))
        assert [int(mask.sum()) for mask in masks.values()] == [max(1, round(density * n)) for n in (224, 1024, 32)]


def test_of_equal_scores_the_first_are_kept():
    masks = topology.global_top_k({"a": torch.tensor([1.0, 2.0, 1.0]), "b": torch.tensor([1.0, 1.0])}, 0.6)
    assert masks["a"].tolist() == [True, True, True]
    assert masks["b"].tolist() == [False, False]


def test_moving_average():
    first = topology.moving_average(None, {"a": torch.tensor([1.0])}, 0.9)
    second = topology.moving_average(first, {"a": torch.tensor([11.0])}, 0.9)
    torch.testing.assert_close(second["a"], torch.tensor([2.0]))


def test_erdos_renyi_densities():
    """RigL's rule in its own numbers: (in + out) / (in * out) times one factor, dense where that exceeds one."""
    layers = {"in": torch.empty(100, 10), "hidden": torch.empty(100, 100), "kernel": torch.empty(8, 4, 3, 3)}
    densities = topology.erdos_renyi_densities(layers, 0.2)
    assert sum(densities[n] * w.numel() for n, w in layers.items()) == pytest.approx(0.2 * (1000 + 10000 + 288))
    assert densities["in"] / densities["hidden"] == pytest.approx((110 / 1000) / (200 / 10000))
    assert densities["kernel"] / densities["hidden"] == pytest.approx((18 / 288) / (200 / 10000))
    crowded = topology.erdos_renyi_densities(layers, 0.7)
    assert crowded["in"] == crowded["kernel"] == 1
    assert crowded["hidden"] == pytest.approx((0.7 * 11288 - 1288) / 10000)
    assert set(topology.erdos_renyi_densities(layers, 1.0).values()) == {1.0}


def test_drop_and_grow_is_rigls():
    mask = torch.tensor([[True, True, True, True], [False, False, False, False]])
    magnitude = torch.tensor([[4.0, 0.1, 0.2, 3.0], [9.0, 9.0, 9.0, 9.0]])
    gradient = torch.tensor([[9.0, 9.0, 9.0, 9.0], [0.1, 0.4, 0.3, 0.2]])
    got = topology.drop_and_grow(mask, 0.5, keep=magnitude, grow=gradient)
    assert got.tolist() == [[True, False, False, True], [False, True, True, False]]


def test_random_growth_is_sets():
    mask = topology.layer_top_k(network(), dict.fromkeys(network(), 0.2))["hidden"]
    keep = network()["hidden"].abs()
    got = topology.drop_and_grow(mask, 0.3, keep=keep, grow=None, generator=1)
    assert got.sum() == mask.sum()
    assert (got & ~mask).sum() == round(0.3 * int(mask.sum()))
    assert torch.equal(got, topology.drop_and_grow(mask, 0.3, keep=keep, grow=None, generator=1))
    assert not torch.equal(got, topology.drop_and_grow(mask, 0.3, keep=keep, grow=None, generator=2))
    kept, gone = keep[mask & got], keep[mask & ~got]
    assert kept.min() >= gone.max()


def test_no_more_are_replaced_than_there_is_room_for():
    mask = torch.tensor([True, True, True, False])
    got = topology.drop_and_grow(mask, 1.0, keep=torch.tensor([3.0, 2.0, 1.0, 9.0]), grow=torch.zeros(4))
    assert got.tolist() == [True, True, False, True]
    full = torch.ones(4, dtype=torch.bool)
    assert torch.equal(topology.drop_and_grow(full, 0.5, keep=torch.ones(4), grow=torch.ones(4)), full)


def test_cosine_decay():
    assert topology.cosine_decay(0, 100) == 0.5
    assert topology.cosine_decay(50, 100) == pytest.approx(0.25)
    assert topology.cosine_decay(100, 100) == topology.cosine_decay(1000, 100) == 0
    assert topology.cosine_decay(25, 100, 0.3) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))


def test_overlap_is_over_the_whole_network():
    before = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True])}
    after = {"a": torch.tensor([True, False, True]), "b": torch.tensor([True])}
    assert topology.mask_overlap(before, after) == 0.5
    assert topology.mask_overlap(before, before) == 1
    assert topology.mask_overlap({"a": torch.tensor([False])}, {"a": torch.tensor([False])}) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topology.global_top_k(network(), 0.0), r"density must be in \(0, 1\], got 0"),
        (lambda: topology.layer_top_k(network(), dict.fromkeys(network(), 1.5)), "got 1.5"),
        (lambda: topology.erdos_renyi_densities(network(), -1), "got -1"),
        (lambda: topology.global_top_k({"a": torch.tensor([1.0, torch.nan])}, 0.5), "scores must be finite"),
        (lambda: topology.global_top_k({"a": torch.tensor([1.0, torch.inf])}, 0.5), "scores must be finite"),
        (lambda: topology.moving_average(None, network(), 1.0), r"decay must be in \[0, 1\)"),
        (
            lambda: topology.drop_and_grow(torch.ones(3) > 0, 2.0, keep=torch.ones(3), grow=None),
            r"fraction must be in \[0, 1\]",
        ),
        (lambda: topology.drop_and_grow(torch.ones(3) > 0, 0.5, keep=torch.ones(2), grow=None), r"the mask's shape \(3,\)"),
        (
            lambda: topology.drop_and_grow(
                torch.tensor([True, False]), 1.0, keep=torch.full((2,), torch.nan), grow=torch.ones(2)
            ),
            "scores must be finite",
        ),
        (lambda: topology.cosine_decay(-1, 100), "step must be at least 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_masks_are_the_same_on_a_gpu():
    scores = {name: weight.round() for name, weight in network().items()}  # with many ties
    there = {name: score.cuda() for name, score in scores.items()}
    for name, mask in topology.global_top_k(scores, 0.3).items():
        assert torch.equal(mask, topology.global_top_k(there, 0.3)[name].cpu())


def test_random_growth_without_a_generator_is_another_each_time():
    mask = torch.zeros(1_000, dtype=torch.bool).index_fill(0, torch.arange(100), True)
    torch.manual_seed(0)
    first, second = (topology.drop_and_grow(mask, 0.5, keep=torch.arange(1_000.0), grow=None) for _ in range(2))
    assert not torch.equal(first, second)
    same = [topology.drop_and_grow(mask, 0.5, keep=torch.arange(1_000.0), grow=None, generator=3) for _ in range(2)]
    assert torch.equal(*same)
