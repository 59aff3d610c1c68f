"""Sparse structures of a layer: literal masks, equal numbers of weights, predictions in plain NumPy, bad input."""

import numpy as np
import pytest
import torch

from omnet_torchrl import MaskedLinear
from omnet_torchrl.structures import (
    l1_structure,
    predict_inputs,
    predictive_structure,
    random_structure,
    set_structure,
    spatial_structure,
)

GRID = (10, 10, 4)
SIZE = 400


def predictive(generator, num_units=200):
    weights = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return predictive_structure(num_units, weights, 36, generator=generator)


STRUCTURES = {
    "random": lambda generator: random_structure(200, SIZE, 36, generator=generator),
    "spatial": lambda generator: spatial_structure(200, GRID, 3, generator=generator),
    "predictive": predictive,
}


@pytest.mark.parametrize("make", STRUCTURES.values(), ids=STRUCTURES)
def test_each_unit_keeps_as_many_inputs_and_a_seed_repeats_them(make):
    masks = make(0)
    assert masks.shape == (200, SIZE)
    assert masks.dtype == torch.bool
    assert (masks.sum(-1) == 36).all()
    assert torch.equal(masks, make(0))
    assert not torch.equal(masks, make(1))
    torch.manual_seed(3)
    first = make(None)
    assert not torch.equal(first, make(None))
    torch.manual_seed(3)
    assert torch.equal(first, make(None))


def test_random_inputs_are_uniform():
    counts = random_structure(4_000, 20, 5, generator=0).float().mean(0)
    assert (counts - 0.25).abs().max() < 0.03


def test_a_window_in_every_channel():
    masks = spatial_structure(6, (3, 4, 2), 2, generator=0).view(6, 3, 4, 2)
    assert torch.equal(masks[..., 0], masks[..., 1])
    places = sorted(tuple(m[..., 0].nonzero()[0].tolist()) for m in masks)
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]  # each once
    for mask in masks[..., 0]:
        top, left = mask.nonzero()[0].tolist()
        assert mask[top : top + 2, left : left + 2].all()
        assert mask.sum() == 4


def test_places_are_taken_as_often_as_the_others():
    places = spatial_structure(130, GRID, 3, generator=0)
    counts = torch.unique(places, dim=0, return_counts=True)[1]
    assert len(counts) == 64
    assert set(counts.tolist()) == {2, 3}


def test_the_neighbourhood_of_an_input_is_what_predicts_it():
    weights = torch.tensor([[0.1, -3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -0.2, 0.1]])
    masks = predictive_structure(3, weights, 2, generator=0)
    # Nothing predicts input 2, and of equal weights the first count.
    assert sorted(m.nonzero().flatten().tolist() for m in masks) == [[0, 1], [1, 2], [2, 3]]


def test_predictions_are_linear_td_lambda():
    """Against the textbook's loops in NumPy (accumulating traces, one step at a time), over two episodes."""
    generator = np.random.default_rng(0)
    x, ended = generator.integers(0, 2, (40, 6)).astype(bool), np.zeros(39, bool)
    ended[20] = True
    gamma, trace, step = 0.9, 0.8, 0.01
    expected, e = np.zeros((6, 6)), np.zeros(6)
    for t in range(39):
        for j in range(6):
            e[j] = gamma * trace * e[j] + x[t, j]
        if ended[t]:
            e[:] = 0
            continue
        for i in range(6):
            delta = x[t + 1, i] + gamma * expected[i] @ x[t + 1] - expected[i] @ x[t]
            expected[i] += step * delta * e
    got = predict_inputs(torch.from_numpy(x), torch.from_numpy(ended), gamma=gamma, trace=trace, step_size=step)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_predictions_find_what_is_connected():
    """Input 0 copies input 1 one step later; input 2 is noise."""
    noise = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)) < 0.1
    x = torch.stack([noise[:, 0].roll(1), *noise.unbind(1)], -1)
    weights = predict_inputs(x, torch.zeros(len(x) - 1, dtype=torch.bool), gamma=0.5, trace=0.0, step_size=0.01)
    assert weights[0].argmax() == 1
    assert weights[0, 1] > 0.5
    assert weights[1:].abs().max() < 0.3


def test_l1_keeps_the_largest_and_exactly_as_many():
    weight = torch.tensor([[3.0, -1.0, 0.5], [0.5, -4.0, 0.5]])
    assert l1_structure(weight, 1.5).tolist() == [[True, True, False], [False, True, False]]
    assert l1_structure(weight, 2).tolist() == [[True, True, True], [False, True, False]]
    assert l1_structure(torch.ones(7, 5), 2).sum() == 14
    faint = torch.tensor([[3.0, 1.0, 2.0], [0.1, 0.2, 0.0]])  # a unit that the penalty has nearly switched off keeps an input
    assert l1_structure(faint, 1.5).tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize("num_subnets", [1, 3])
def test_weights_are_drawn_for_the_inputs_that_are_left(num_subnets):
    layer = MaskedLinear(SIZE, 200, masks=torch.ones(num_subnets, 200, SIZE, dtype=torch.bool))
    masks = STRUCTURES["spatial"](0)
    set_structure(layer, masks, generator=5)
    assert (layer.masks == masks).all()
    assert layer.weight.abs().max() <= 1 / 6
    assert layer.weight.abs().max() > 0.16
    assert layer.weight.std().item() == pytest.approx(1 / 6 / 3**0.5, rel=0.02)
    before = layer.weight.clone()
    set_structure(layer, masks, generator=5)
    assert torch.equal(before, layer.weight)
    output = layer(torch.ones(SIZE), 0)
    torch.testing.assert_close(output, (layer.weight * masks).sum(-1) + layer.bias)


def test_a_structure_for_each_subnetwork():
    layer = MaskedLinear(SIZE, 200, bias=False, masks=torch.ones(2, 200, SIZE, dtype=torch.bool))
    masks = torch.stack([STRUCTURES["random"](0), STRUCTURES["spatial"](0)])
    set_structure(layer, masks)
    assert torch.equal(layer.masks, masks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_structure(3, 10, 11), r"in \[1, 10\].*got 11"),
        (lambda: random_structure(3, 10, 0), r"in \[1, 10\].*got 0"),
        (lambda: random_structure(0, 10, 1), "num_subnets must be at least 1"),
        (lambda: spatial_structure(3, (3, 4, 1), 4), r"window must be in \[1, 3\]"),
        (lambda: spatial_structure(0, (3, 4, 1), 2), "num_units must be at least 1"),
        (lambda: predictive_structure(3, torch.zeros(4, 4), 2), "must not all be zero"),
        (lambda: predictive_structure(3, torch.ones(4, 3), 2), r"finite \(D, D\)"),
        (lambda: predictive_structure(3, torch.full((4, 4), torch.nan), 2), r"finite \(D, D\)"),
        (lambda: predictive_structure(3, torch.ones(4, 4), 5), r"in \[1, 4\]"),
        (lambda: predict_inputs(torch.zeros(5, 3), torch.zeros(5, dtype=torch.bool)), r"\(T \+ 1, D\)"),
        (lambda: l1_structure(torch.ones(2, 3), 0), r"in \[1, 3\]"),
        (lambda: l1_structure(torch.full((2, 3), torch.inf), 1), "finite"),
        (lambda: set_structure(MaskedLinear(3, 2, masks=torch.ones(1, 2, 3) > 0), torch.ones(3, 2) > 0), r"of shape \(2, 3\)"),
        (lambda: set_structure(MaskedLinear(3, 2, masks=torch.ones(1, 2, 3) > 0), torch.ones(2, 3)), "boolean"),
        (
            lambda: set_structure(MaskedLinear(3, 2, masks=torch.ones(1, 2, 3) > 0), torch.zeros(2, 3) > 0),
            "every unit must keep an input, got 2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_a_generator_each_draw_is_another():
    layers = [MaskedLinear(16, 8, masks=torch.ones(1, 8, 16, dtype=torch.bool)) for _ in range(2)]
    torch.manual_seed(0)
    for layer in layers:
        set_structure(layer, random_structure(8, 16, 4, generator=0))
    assert not torch.equal(layers[0].weight, layers[1].weight)
