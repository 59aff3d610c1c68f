"""Metrics: literal numbers and laws."""

import math

import pytest
import torch

from omnet_torchrl.metrics import action_disagreement, sac_flops, value_disagreement

# Disagreement -----------------------------------------------------------------------------------------------------------


def test_value_disagreement_is_the_standard_deviation_over_subnets_averaged_over_the_batch():
    # Element 1: values 1, 3, deviation 1. Element 2: values 0, 6, deviation 3.
    value = torch.tensor([[1.0, 0.0], [3.0, 6.0]])
    assert value_disagreement(value) == 2.0


def test_action_disagreement_is_the_mean_distance_of_two_different_subnets():
    # Distances 5, 5 and 6 of the three pairs in element 1, and 0 of all pairs in element 2.
    first = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, 4.0]])
    action = torch.stack([first, torch.ones(3, 2)], 1)
    torch.testing.assert_close(action_disagreement(action), torch.tensor((5 + 5 + 6) / 3 / 2))


def test_disagreement_counts_every_element_of_a_batch_of_several_dimensions():
    value, action = torch.randn(3, 4, 5), torch.randn(3, 4, 5, 2)
    torch.testing.assert_close(value_disagreement(value), value_disagreement(value.flatten(1)))
    torch.testing.assert_close(action_disagreement(action), action_disagreement(action.flatten(1, 2)))


@pytest.mark.parametrize("disagreement", [value_disagreement, action_disagreement])
def test_one_subnet_agrees_with_itself(disagreement):
    assert disagreement(torch.randn(1, 4, 2)) == 0.0


@pytest.mark.parametrize("disagreement", [value_disagreement, action_disagreement])
def test_equal_subnets_agree(disagreement):
    every = torch.randn(1, 4, 2).expand(5, 4, 2)
    torch.testing.assert_close(disagreement(every), torch.zeros(()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("disagreement", [value_disagreement, action_disagreement])
def test_disagreement_is_0_dimensional_and_positive_where_subnets_differ(disagreement):
    result = disagreement(torch.randn(3, 4, 2))
    assert result.shape == ()
    assert result > 0


@pytest.mark.parametrize("disagreement", [value_disagreement, action_disagreement])
def test_disagreement_does_not_depend_on_the_order_of_subnets_or_batch(disagreement):
    every = torch.randn(5, 7, 2, dtype=torch.float64)
    shuffled = every[torch.randperm(5)][:, torch.randperm(7)]
    torch.testing.assert_close(disagreement(shuffled), disagreement(every))


@pytest.mark.parametrize("disagreement", [value_disagreement, action_disagreement])
def test_disagreement_scales_with_its_unit_and_ignores_a_shift(disagreement):
    every = torch.randn(5, 7, 2, dtype=torch.float64)
    torch.testing.assert_close(disagreement(-3 * every + torch.randn(7, 2)), 3 * disagreement(every))


# FLOPs ------------------------------------------------------------------------------------------------------------------

ENVIRONMENTS = {"Hopper-v4": (11, 3), "Walker2d-v4": (17, 6), "Ant-v4": (27, 8), "Humanoid-v4": (376, 17)}
ROWS = {
    "REDQ": {"num_online": 10, "num_value": 10},
    "SAC, DroQ": {"num_online": 2, "num_value": 2},
    "single critic": {"num_online": 1, "num_target": 1, "num_value": 1},
    "OMNet": {},
}
MFLOP = {
    "REDQ": (1213.3, 1254.1, 1308.1, 2911.9),
    "SAC, DroQ": (332.4, 343.9, 358.9, 799.0),
    "single critic": (186.8, 193.4, 202.0, 449.7),
    "OMNet": (236.5, 244.8, 255.6, 569.0),
}


@pytest.mark.parametrize("row", ROWS)
def test_an_update_costs_these_megaflops(row):
    costs = [sac_flops(*sizes, **ROWS[row]) / 1e6 for sizes in ENVIRONMENTS.values()]
    assert tuple(round(cost, 1) for cost in costs) == MFLOP[row]


def test_flops_of_networks_without_hidden_layers_by_hand():
    # A = 3 * 4 and C = 5 multiply-adds; 2 * [12 + 2 * 5 + 3 * 5 + (3 * 12 + 2 * 7 * 5) / 4].
    assert sac_flops(3, 2, (), num_value=7, policy_update_delay=4, batch_size=1) == 2 * (12 + 10 + 15 + 106 / 4)


def test_flops_are_proportional_to_the_batch():
    assert math.isclose(sac_flops(11, 3, batch_size=512), 2 * sac_flops(11, 3, batch_size=256))
