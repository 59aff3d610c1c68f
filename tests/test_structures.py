"""Structures: who sees what, equal numbers of kept weights, seeds, networks of them, bad input."""

import pytest
import torch
from torch import nn

from omnet_torchrl import MaskedLinear
from omnet_torchrl.structures import grid_closeness, neighbourhood_masks, random_closeness


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_spatial_unit_sees_a_window_of_all_channels(channels_last):
    closeness = grid_closeness(5, 6, channels=2, channels_last=channels_last)
    shape = (5, 6, 2) if channels_last else (2, 5, 6)
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[1:4, 2:5] = True
    centre = (2 * 6 + 3) * 2 if channels_last else 2 * 6 + 3
    order = closeness[centre].argsort(descending=True)[: 9 * 2]
    window = torch.zeros(60, dtype=torch.bool).scatter(0, order, True).reshape(shape)
    for channel in range(2):
        assert torch.equal(window[..., channel] if channels_last else window[channel], expected)
    assert torch.equal(closeness, closeness.T)


def test_of_equally_far_places_the_nearer_one_in_a_straight_line_comes_first():
    closeness = grid_closeness(3, 3)
    assert closeness[4].argsort(dim=-1, descending=True, stable=True)[:5].sort().values.tolist() == [1, 3, 4, 5, 7]


@pytest.mark.parametrize("structure", ["spatial", "random", "predictive"])
@pytest.mark.parametrize("fan_in", [1, 7, 36])
def test_every_unit_of_every_structure_sees_as_many_inputs_its_own_among_them(structure, fan_in):
    weights = torch.randn(36, 36, generator=torch.Generator().manual_seed(1))
    closeness = {
        "spatial": grid_closeness(3, 4, channels=3),
        "random": random_closeness(36, generator=2),
        "predictive": weights.abs(),
    }[structure]
    masks = neighbourhood_masks(3, 50, closeness, fan_in, generator=0)
    assert masks.shape == (3, 50, 36)
    assert (masks.sum(-1) == fan_in).all()
    order = closeness.masked_fill(torch.eye(36, dtype=torch.bool), float("inf")).topk(fan_in).indices
    neighbourhoods = {tuple(sorted(row)) for row in order.tolist()} if structure != "spatial" else None
    for row in masks.flatten(0, 1):
        inputs = tuple(row.nonzero().flatten().tolist())
        assert neighbourhoods is None or inputs in neighbourhoods
    assert not torch.equal(masks[0], masks[1]) or fan_in == 36


def test_masks_are_those_of_their_seed_and_centres_are_uniform():
    closeness = grid_closeness(2, 2)
    masks = neighbourhood_masks(2, 2_000, closeness, 1, generator=5)
    assert torch.equal(masks, neighbourhood_masks(2, 2_000, closeness, 1, generator=5))
    torch.testing.assert_close(masks.float().mean((0, 1)), torch.full((4,), 0.25), atol=0.03, rtol=0)
    assert torch.equal(random_closeness(4, generator=1), random_closeness(4, generator=1))


def test_a_masked_layer_takes_them_and_a_unit_ignores_what_it_does_not_see():
    masks = neighbourhood_masks(2, 8, grid_closeness(4, 4), 4, generator=0)
    layer, image = MaskedLinear(16, 8, masks=masks, init_fn=nn.init.ones_), torch.zeros(16)
    for pixel in range(16):
        assert torch.equal(layer(image.index_fill(0, torch.tensor(pixel), 1.0), 0) != 0, masks[0, :, pixel])


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"fan_in in \[1, 4\], the number of inputs, got 3 and 0: a unit without inputs"):
        neighbourhood_masks(2, 3, torch.zeros(4, 4), 0)
    with pytest.raises(ValueError, match=r"fan_in in \[1, 4\]"):
        neighbourhood_masks(2, 3, torch.zeros(4, 4), 5)
    with pytest.raises(ValueError, match=r"closeness must be \(D, D\), .* got \(4, 3\)"):
        neighbourhood_masks(2, 3, torch.zeros(4, 3), 1)
    with pytest.raises(ValueError, match="num_subnets must be at least 1"):
        neighbourhood_masks(0, 3, torch.zeros(4, 4), 1)
