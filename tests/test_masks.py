"""Masks: what is drawn, from where, and what the statistics of a set of masks say."""

import copy
import math

import pytest
import torch
from torch import nn

from omnet_torchrl import (
    MaskedLinear,
    MaskedMLP,
    SubnetModule,
    bernoulli_masks,
    bernoulli_module_masks,
    mask_density,
    mask_iou,
    shared_fraction,
    unit_masks,
    unused_fraction,
)
from omnet_torchrl.layers import EnsembleLinear, MaskedConv2d
from omnet_torchrl.masks import as_generator, check_masks, check_module_masks


def masks_of(*rows):
    """Masks ``(N, in)`` or ``(N, out, in)`` of nested lists of zeros and ones."""
    return torch.tensor(rows, dtype=torch.bool)


# Draws


@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (2, 3, 3, 3)])
@pytest.mark.parametrize("num_subnets", [1, 5])
def test_masks_are_boolean_and_of_the_shape_asked(num_subnets, shape):
    masks = bernoulli_masks(num_subnets, shape, 0.5, generator=0)
    assert masks.shape == (num_subnets, *shape)
    assert masks.dtype == torch.bool


def test_masks_are_drawn_on_the_device_of_the_generator_and_moved_to_the_device_asked():
    assert bernoulli_masks(2, (3,), 0.5, generator=0, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert bernoulli_masks(2, (3,), 0.5, generator=0).device.type == "meta"
    assert bernoulli_masks(2, (3,), 0.5, generator=0).device.type == "cpu"


def test_a_seed_repeats_its_masks_and_another_seed_gives_others():
    masks = bernoulli_masks(3, (20, 20), 0.5, generator=7)
    assert torch.equal(masks, bernoulli_masks(3, (20, 20), 0.5, generator=7))
    assert not torch.equal(masks, bernoulli_masks(3, (20, 20), 0.5, generator=8))


def test_a_seed_is_the_generator_seeded_with_it():
    expected = bernoulli_masks(3, (20, 20), 0.5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(bernoulli_masks(3, (20, 20), 0.5, generator=7), expected)


def test_a_generator_advances_from_draw_to_draw():
    generator = torch.Generator().manual_seed(0)
    first, second = (bernoulli_masks(2, (20, 20), 0.5, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert as_generator(generator) is generator


def test_masks_without_a_generator_come_from_the_global_one_and_differ():
    torch.manual_seed(0)
    first, second = (bernoulli_masks(3, (20, 20), 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(bernoulli_masks(3, (20, 20), 0.5), first)


@pytest.mark.parametrize("sparsity", ["0.5", None, True])
def test_a_sparsity_that_is_no_number_is_refused(sparsity):
    with pytest.raises(TypeError, match="sparsity must be a number"):
        bernoulli_masks(3, (2, 2), sparsity)


def test_drawing_masks_from_a_seed_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    bernoulli_masks(3, (20, 20), 0.5, generator=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_without_a_generator_follow_the_global_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return bernoulli_masks(3, (20, 20), 0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_masks_without_a_generator_change_once_the_global_generator_has_moved():
    first = bernoulli_masks(3, (20, 20), 0.5)
    torch.rand(1)
    assert not torch.equal(first, bernoulli_masks(3, (20, 20), 0.5))


def test_sparsity_zero_keeps_every_weight():
    assert bernoulli_masks(5, (50, 50), 0.0, generator=0).all()
    assert bernoulli_masks(5, (50, 50), 0, generator=0).all()


def test_sparsity_is_the_same_draw_thresholded_higher():
    dense, sparse = (bernoulli_masks(4, (30, 30), s, generator=0) for s in (0.3, 0.6))
    assert (dense | ~sparse).all()
    assert (dense & ~sparse).any()


def test_masks_of_a_module_cover_parameters_of_two_dimensions_and_more():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    masks = bernoulli_module_masks(network, 5, 0.3, generator=0)
    assert {name: tuple(m.shape) for name, m in masks.items()} == {"0.weight": (5, 3, 2, 3, 3), "3.weight": (5, 4, 12)}


def test_masks_of_a_module_repeat_from_a_seed_and_differ_between_equal_layers():
    network = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    masks = bernoulli_module_masks(network, 3, 0.5, generator=0)
    assert torch.equal(masks["0.weight"], bernoulli_masks(3, (20, 20), 0.5, generator=0))
    assert not torch.equal(masks["0.weight"], masks["1.weight"])
    repeated = bernoulli_module_masks(network, 3, 0.5, generator=0)
    assert all(torch.equal(m, repeated[name]) for name, m in masks.items())


def test_masks_of_a_module_leave_its_parameters_and_the_global_generator_alone():
    network = nn.Linear(20, 20)
    weight, before = network.weight.clone(), torch.get_rng_state()
    bernoulli_module_masks(network, 3, 0.5, generator=0)
    assert torch.equal(network.weight, weight)
    assert torch.equal(torch.get_rng_state(), before)


# Masks over units


@pytest.mark.parametrize(
    ("num_units", "sparsity", "kept"), [(256, 0.5, 128), (256, 0.29, 182), (7, 0.9, 1), (7, 0.0, 7), (1, 0.9, 1)]
)
def test_every_mask_over_units_keeps_exactly_as_many(num_units, sparsity, kept):
    masks = unit_masks(5, num_units, sparsity, generator=0)
    assert (masks.shape, masks.dtype) == ((5, num_units), torch.bool)
    assert masks.sum(-1).tolist() == [kept] * 5
    assert mask_density(masks).tolist() == pytest.approx([kept / num_units] * 5)


def test_masks_over_units_are_independent_uniform_choices():
    masks = unit_masks(4_000, 4, 0.5, generator=0)
    choices = (masks.int() @ torch.tensor([8, 4, 2, 1], dtype=torch.int32)).unique(return_counts=True)[1]
    assert len(choices) == 6  # 4 over 2
    # Each choice of 4,000 has the probability 1/6; five standard deviations.
    assert (choices - 4_000 / 6).abs().max() < 5 * math.sqrt(4_000 * 5 / 36)
    pairs = (masks[::2] == masks[1::2]).all(-1).float().mean()
    assert pairs.item() == pytest.approx(1 / 6, abs=5 * math.sqrt(5 / 36 / 2_000))


def test_masks_over_units_keep_the_weights_of_bernoulli_masks_at_29_percent():
    masks = unit_masks(5, 256, 0.29, generator=0)
    assert mask_density(masks[:, :, None] & masks[:, None]).tolist() == pytest.approx([0.5054] * 5, abs=1e-4)


def test_masks_over_units_come_from_generators_as_other_masks_do():
    masks = unit_masks(3, 50, 0.5, generator=7)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(unit_masks(3, 50, 0.5, generator=generator), masks)
    assert not torch.equal(unit_masks(3, 50, 0.5, generator=generator), masks)
    state = torch.get_rng_state()
    assert torch.equal(unit_masks(3, 50, 0.5, generator=7, device="cpu"), masks)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(unit_masks(3, 50, 0.5), masks)
    assert not torch.equal(unit_masks(3, 50, 0.5), masks)
    assert unit_masks(3, 50, 0.5, generator=7, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 4, 0.5), "num_subnets"), ((2, 0, 0.5), "num_units"), ((2, 4, 1.0), "sparsity")]
)
def test_masks_over_units_refuse_what_other_masks_refuse(arguments, message):
    with pytest.raises(ValueError, match=f"{message}.* must be "):
        unit_masks(*arguments)


# Statistics

SHAPE = (300, 400)


def five_sigma(p):
    """Five standard deviations of the mean of as many Bernoulli draws as a mask of the test has weights."""
    return 5 * math.sqrt(p * (1 - p) / math.prod(SHAPE)) + 1e-6


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_density_of_bernoulli_masks_is_one_minus_sparsity(sparsity):
    density = mask_density(bernoulli_masks(5, SHAPE, sparsity, generator=0))
    assert density.shape == (5,)
    torch.testing.assert_close(density, torch.full((5,), 1 - sparsity), rtol=0, atol=five_sigma(sparsity))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_iou_of_bernoulli_masks_tends_to_its_closed_form(sparsity):
    iou = mask_iou(bernoulli_masks(5, SHAPE, sparsity, generator=0))
    expected = (1 - sparsity) / (1 + sparsity)
    # Given the weights that either keeps, a fraction 1 - S^2 of all, each is kept by both with the probability expected.
    atol = five_sigma(expected) / math.sqrt(1 - sparsity**2)
    torch.testing.assert_close(iou, torch.full((5, 5), expected).fill_diagonal_(1.0), rtol=0, atol=atol)
    assert torch.equal(iou, iou.T)


@pytest.mark.parametrize(("num_subnets", "sparsity"), [(1, 0.5), (2, 0.3), (5, 0.0), (5, 0.5), (10, 0.8)])
def test_unused_and_shared_fractions_of_bernoulli_masks_are_their_closed_forms(num_subnets, sparsity):
    masks = bernoulli_masks(num_subnets, SHAPE, sparsity, generator=0)
    unused, shared = sparsity**num_subnets, (1 - sparsity) ** num_subnets
    assert unused_fraction(masks).item() == pytest.approx(unused, abs=five_sigma(unused))
    assert shared_fraction(masks).item() == pytest.approx(shared, abs=five_sigma(shared))


def test_masks_of_the_paper_leave_three_percent_unused():
    masks = bernoulli_masks(5, SHAPE, 0.5, generator=0)
    assert unused_fraction(masks).item() == pytest.approx(0.03125, abs=five_sigma(1 / 32))
    assert mask_iou(masks)[0, 1].item() == pytest.approx(1 / 3, abs=0.01)


def test_statistics_of_literal_masks():
    masks = masks_of([[1, 1], [0, 0]], [[1, 0], [1, 0]], [[1, 1], [1, 0]])
    torch.testing.assert_close(mask_density(masks), torch.tensor([0.5, 0.5, 0.75]))
    torch.testing.assert_close(mask_iou(masks), torch.tensor([[1, 1 / 3, 2 / 3], [1 / 3, 1, 2 / 3], [2 / 3, 2 / 3, 1]]))
    assert unused_fraction(masks).item() == 0.25
    assert shared_fraction(masks).item() == 0.25


def test_disjoint_masks_overlap_nowhere_and_empty_masks_fully():
    torch.testing.assert_close(mask_iou(masks_of([1, 0, 0], [0, 1, 1])), torch.eye(2))
    torch.testing.assert_close(mask_iou(masks_of([0, 0], [0, 0])), torch.ones(2, 2))
    torch.testing.assert_close(mask_iou(masks_of([0, 0], [1, 0])), torch.eye(2))


def test_statistics_count_large_masks_exactly():
    # More weights than float32 has integers (2^24), so that a float32 count of them would be wrong.
    masks = torch.ones(2, 2**24 + 2, dtype=torch.bool)
    masks[1, 0] = False
    assert mask_density(masks)[0].item() == 1.0
    assert mask_iou(masks)[0, 1].item() == pytest.approx(1 - 1 / (2**24 + 2), abs=1e-9)


# Errors


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\), got {sparsity}"):
        bernoulli_masks(2, (3,), sparsity)


@pytest.mark.parametrize("num_subnets", [0, -1])
def test_less_than_one_subnet_is_refused(num_subnets):
    with pytest.raises(ValueError, match=f"num_subnets must be at least 1, got {num_subnets}"):
        bernoulli_masks(num_subnets, (3,), 0.5)


@pytest.mark.parametrize("num_subnets", [2.5, 2.0, True, "2", None])
def test_a_number_of_subnets_that_is_no_int_is_refused(num_subnets):
    with pytest.raises(TypeError, match="num_subnets must be an int, got"):
        bernoulli_masks(num_subnets, (3,), 0.5)


@pytest.mark.parametrize("masks", [torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.int64), [[[True] * 4] * 3] * 2])
def test_masks_of_another_type_than_boolean_are_refused(masks):
    with pytest.raises(TypeError, match="masks must be a boolean tensor"):
        MaskedLinear(4, 3, masks=masks)


@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 4), (2, 3), (0, 3, 4), (), (2, 3, 4, 1)])
def test_masks_of_another_shape_than_the_weight_are_refused(shape):
    with pytest.raises(ValueError, match=r"masks must have shape \(num_subnets, 3, 4\)"):
        MaskedLinear(4, 3, masks=torch.ones(shape, dtype=torch.bool))


def test_bias_masks_must_be_boolean_and_fit_the_bias_and_the_number_of_subnets():
    masks = torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="bias_masks must be a boolean tensor"):
        MaskedLinear(4, 3, masks=masks, bias_masks=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"bias_masks must have shape \(num_subnets, 3\)"):
        MaskedLinear(4, 3, masks=masks, bias_masks=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"one row per subnetwork \(2\).*got bias=True and 5 rows"):
        MaskedLinear(4, 3, masks=masks, bias_masks=torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="bias_masks must be None without a bias"):
        MaskedLinear(4, 3, bias=False, masks=masks, bias_masks=torch.ones(2, 3, dtype=torch.bool))


def test_masks_of_a_module_must_name_its_parameters_and_agree_on_the_number_of_subnets():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    good = bernoulli_module_masks(network, 2, 0.0)
    assert check_module_masks(good, network) == 2
    with pytest.raises(ValueError, match="masks is empty"):
        check_module_masks({}, network)
    with pytest.raises(ValueError, match=r"masks name the parameter '2.weight', the network has \['0.bias', '0.weight'"):
        check_module_masks({**good, "2.weight": good["0.weight"]}, network)
    with pytest.raises(ValueError, match=r"masks\['1.weight'\] must have shape \(num_subnets, 4, 3\)"):
        check_module_masks({**good, "1.weight": good["0.weight"]}, network)
    with pytest.raises(ValueError, match=r"same number of subnetworks, got \{'0.weight': 2, '1.weight': 1\}"):
        check_module_masks({**good, "1.weight": good["1.weight"][:1]}, network)


# Units that lose every input

DEAD = masks_of([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


def test_units_without_inputs_are_counted_in_a_warning():
    with pytest.warns(
        UserWarning, match=r"^3 of 6 units \(3 units in each of 2 subnetworks\) lose every one of their 4 inputs"
    ):
        MaskedLinear(4, 3, masks=DEAD)


def test_the_inputs_of_a_convolution_are_its_channels_times_its_kernel():
    conv = nn.Conv2d(1, 3, 2)
    with pytest.warns(UserWarning, match=r"^3 of 6 units .* their 4 inputs"):
        SubnetModule(conv, {"weight": DEAD.view(2, 3, 1, 2, 2)}, event_dims=3)


def test_a_few_units_without_inputs_among_many_are_no_warning():
    masks = torch.ones(5, 256, 11, dtype=torch.bool)
    masks[0, 0] = False
    check_masks(masks, (256, 11))
    masks[1, :12] = False
    with pytest.warns(UserWarning, match="13 of 1280 units"):
        check_masks(masks, (256, 11))


def test_no_warning_where_every_unit_has_an_input():
    # Warnings are errors here.
    check_masks(DEAD | torch.eye(3, 4, dtype=torch.bool), (3, 4))
    check_masks(torch.zeros(2, 3, dtype=torch.bool), (3,))


def test_masks_that_are_given_stay_the_givers():
    masks = bernoulli_masks(2, (4, 4), 0.5, generator=0)
    kernels = masks.view(2, 4, 4, 1, 1)
    network, before = nn.Linear(4, 4), masks.clone()
    modules = [
        *(MaskedLinear(4, 4, masks=masks, bias_masks=masks[..., 0]) for _ in range(2)),
        *(MaskedConv2d(4, 4, 1, masks=kernels) for _ in range(2)),
        *(SubnetModule(network, {"weight": masks}) for _ in range(2)),
        EnsembleLinear(4, 4, num_subnets=2, masks=masks),
    ]
    for module in modules:
        for buffer in module.buffers():
            buffer.fill_(True)
        assert torch.equal(masks, before)


def test_masks_may_be_views_of_one():
    one = torch.ones(4, 4, dtype=torch.bool)
    net = MaskedMLP(in_features=4, out_features=4, num_cells=[4], mask_fn=lambda n, shape, _, **__: one.expand(n, *shape))
    net.load_state_dict(copy.deepcopy(net).state_dict())
