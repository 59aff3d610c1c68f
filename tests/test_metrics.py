"""Metrics: literal numbers and laws."""

import itertools
import math

import pytest
import torch
from conftest import make_batch, small_qvalue
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate

from omnet_torchrl import EnsembleMLP, Maze2DEnv, OMNetSACLoss, make_actor, make_qvalue
from omnet_torchrl.metrics import (
    action_disagreement,
    coverage,
    min_of_two,
    network_memory,
    sac_flops,
    soft_returns,
    trajectory_diversity,
    value_bias,
    value_disagreement,
    visitation,
)

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


EXACT_MFLOP = {"REDQ": (1194.9, 2394.3), "SAC, DroQ": (328.7, 693.5), "single critic": (184.9, 395.7), "OMNet": (234.6, 515.0)}


def make_loss(row, observation_dim, action_dim):
    specs = Unbounded((observation_dim,)), Bounded(-1, 1, (action_dim,))
    if row == "OMNet":
        return OMNetSACLoss(make_actor(*specs), make_qvalue(*specs))
    actor = make_actor(*specs, num_subnets=1, sparsity=0.0, layer_norm=False)
    if row == "single critic":
        return OMNetSACLoss(actor, make_qvalue(*specs, num_subnets=1, sparsity=0.0), num_target_subnets=1)
    qvalue = make_qvalue(*specs, network_class=EnsembleMLP, num_subnets=10 if row == "REDQ" else 2, layer_norm=False)
    return OMNetSACLoss(actor, qvalue, num_trained_subnets=None)


@pytest.mark.parametrize("task", ["Hopper-v4", "Humanoid-v4"])
@pytest.mark.parametrize("row", ROWS)
def test_the_exact_flops_are_those_that_pytorch_counts_in_the_losses(row, task):
    observation_dim, action_dim = ENVIRONMENTS[task]
    loss = make_loss(row, observation_dim, action_dim)
    batch = make_batch(8)
    batch["observation"], batch["action"] = torch.randn(8, observation_dim), torch.rand(8, action_dim)
    batch["next", "observation"] = torch.randn(8, observation_dim)
    SoftUpdate(loss, tau=0.005)  # without an updater the loss warns
    draws, counts = loss.draw(batch), {}
    for name in ("qvalue_loss", "actor_loss"):
        with FlopCounterMode(display=False) as counter:
            getattr(loss, name)(batch, draws=draws)[0].backward()
        counts[name] = counter.get_total_flops()
    for delay in (1, 20):
        exact = sac_flops(observation_dim, action_dim, **ROWS[row], policy_update_delay=delay, batch_size=8, exact=True)
        assert math.isclose(exact, counts["qvalue_loss"] + counts["actor_loss"] / delay, rel_tol=1e-12)


@pytest.mark.parametrize("row", ROWS)
def test_an_update_costs_exactly_these_megaflops(row):
    costs = [sac_flops(*ENVIRONMENTS[task], **ROWS[row], exact=True) / 1e6 for task in ("Hopper-v4", "Humanoid-v4")]
    assert tuple(round(cost, 1) for cost in costs) == EXACT_MFLOP[row]


def test_exact_flops_of_networks_without_hidden_layers_by_hand():
    # Of a single layer, no gradient of the input is computed: two passes of three.
    exact = sac_flops(3, 2, (), num_value=7, policy_update_delay=4, batch_size=1, exact=True)
    assert exact == 2 * (12 + 2 * 5 + 2 * 5 + (2 * 12 + 2 * 7 * 5) / 4)


# Memory -----------------------------------------------------------------------------------------------------------------


def test_parameters_and_masks_of_a_small_network_by_hand():
    # Layers 7 -> 16 -> 16 -> 1 with biases and two LayerNorms; a mask for each of 3 subnetworks over each weight.
    weights, vectors = 7 * 16 + 16 * 16 + 16, 16 + 16 + 1 + 2 * 2 * 16
    assert network_memory(small_qvalue(3)) == {
        "parameters": weights + vectors,
        "parameter_bytes": 4 * (weights + vectors),
        "mask_bytes": 3 * weights,
    }


def test_more_subnetworks_cost_masks_and_separate_networks_parameters():
    masked = [network_memory(small_qvalue(num)) for num in (2, 8)]
    separate = [network_memory(EnsembleMLP(in_features=7, out_features=1, num_cells=[16], num_subnets=n)) for n in (1, 10)]
    assert masked[0]["parameters"] == masked[1]["parameters"]
    assert 4 * masked[0]["mask_bytes"] == masked[1]["mask_bytes"]
    assert separate[1]["parameters"] == 10 * separate[0]["parameters"]
    assert separate[1]["mask_bytes"] == 0


def test_what_is_frozen_takes_memory_and_is_not_trained():
    network = nn.Linear(3, 2, dtype=torch.float64)
    network.weight.requires_grad_(False)
    assert network_memory(network) == {"parameters": 2, "parameter_bytes": 8 * 8, "mask_bytes": 0}


# Value bias -------------------------------------------------------------------------------------------------------------


def flags(*ends, length):
    """A row of booleans, true at ``ends``."""
    return torch.tensor([t in ends for t in range(length)])


def test_soft_returns_of_an_episode_by_hand():
    reward, log_prob = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 1.0, -2.0])
    returns = soft_returns(reward, log_prob, flags(2, length=3), flags(length=3), alpha=0.5, gamma=0.5)
    # 4; 2 + 0.5 (4 + 0.5 * 2); 1 + 0.5 (4.5 - 0.5 * 1). The first action's entropy counts nowhere.
    assert returns.tolist() == [3.0, 4.5, 4.0]


def test_a_truncated_episode_is_cut_or_goes_on_with_the_bootstrap():
    reward, zero = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.zeros(4)
    ends = {"terminated": flags(3, length=4), "truncated": flags(1, length=4)}
    cut = soft_returns(reward, zero, **ends, alpha=1.0, gamma=0.5)
    assert cut.tolist() == [1.5, 1.0, 1.5, 1.0]
    value = torch.tensor([math.nan, 8.0, math.nan, math.nan])
    assert soft_returns(reward, zero, **ends, alpha=1.0, gamma=0.5, bootstrap=value).tolist() == [3.5, 5.0, 1.5, 1.0]


def test_the_last_step_of_a_row_is_truncated_unless_it_is_terminal():
    reward, zero, ends = torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([[False, True], [False, False]])
    returns = soft_returns(reward, zero, ends, torch.zeros_like(ends), alpha=1.0, gamma=0.5, bootstrap=torch.full((2, 2), 8.0))
    assert returns.tolist() == [[1.5, 1.0], [3.5, 5.0]]


def test_a_step_that_terminates_and_is_truncated_is_terminal():
    end = torch.tensor([True])
    assert soft_returns(torch.ones(1), torch.ones(1), end, end, alpha=1.0, bootstrap=torch.ones(1)).item() == 1.0


def test_soft_returns_equal_the_sum_of_what_follows():
    length, gamma, alpha = 40, 0.9, 0.3
    reward, log_prob = torch.randn(3, length, dtype=torch.float64), torch.randn(3, length, dtype=torch.float64)
    value, end = torch.randn(3, length, dtype=torch.float64), torch.rand(3, length)
    terminated, truncated = end < 0.05, end > 0.95
    returns = soft_returns(reward, log_prob, terminated, truncated, alpha=alpha, gamma=gamma, bootstrap=value)
    for row, start in itertools.product(range(3), range(length)):
        ends = (terminated | truncated)[row, start:].nonzero()[:, 0].tolist()
        last = start + ends[0] if ends else length - 1
        total = sum(gamma ** (t - start) * reward[row, t] for t in range(start, last + 1))
        total -= sum(gamma ** (t - start) * alpha * log_prob[row, t] for t in range(start + 1, last + 1))
        if not terminated[row, last]:
            total += gamma ** (last + 1 - start) * value[row, last]
        torch.testing.assert_close(returns[row, start], total)


def test_soft_returns_of_other_shapes_raise():
    reward, end = torch.zeros(3, 4), torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one shape \(\*batch, T\), got .*'truncated': \(4,\)"):
        soft_returns(reward, reward, reward.bool(), end, alpha=1.0)
    with pytest.raises(ValueError, match=r"TorchRL's \(\*batch, T, 1\) need squeeze\(-1\)"):
        soft_returns(reward.unsqueeze(-1), reward, reward.bool().unsqueeze(-1), reward.bool().unsqueeze(-1), alpha=1.0)
    with pytest.raises(TypeError, match=r"the reward must be floating point, got torch\.int64"):
        soft_returns(reward.long(), reward, reward.bool(), reward.bool(), alpha=1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: action_disagreement(torch.zeros(3)), r"action must have shape \(N, \*batch, action_dim\), got \(3,\)"),
        (lambda: trajectory_diversity(torch.zeros(3, 4)), r"position must have shape \(N, T, dim\), got \(3, 4\)"),
        (lambda: coverage(torch.zeros(4, 4), torch.ones(3, 3).bool()), r"grid's shape \(4, 4\), got \(3, 3\)"),
        (lambda: visitation(torch.zeros(2, 2), bins=0), "bins must be at least 1, got 0"),
    ],
)
def test_arguments_of_another_shape_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_the_minimum_of_two_is_the_mean_over_all_pairs():
    assert min_of_two(torch.tensor([[3.0], [1.0], [2.0]])).item() == pytest.approx((1 + 1 + 2) / 3)
    value = torch.randn(10, 4, 5, dtype=torch.float64)
    pairs = [torch.minimum(value[i], value[j]) for i, j in itertools.combinations(range(10), 2)]
    torch.testing.assert_close(min_of_two(value), torch.stack(pairs).mean(0))
    assert torch.equal(min_of_two(value[:1]), value[0])
    assert torch.equal(min_of_two(value[:2]), value[:2].amin(0))


def test_value_bias_by_hand():
    # Mean of two subnetworks: 6 and -2, off by 2 and -4; the smaller: 5 and -3, off by 1 and -5. Mean return 3.
    bias = value_bias(torch.tensor([[5.0, -3.0], [7.0, -1.0]]), torch.tensor([4.0, 2.0]))
    expected = {"mean": -1, "std": 3, "normalised_mean": -1 / 3, "normalised_std": 1, "min_mean": -2, "min_std": 3, "return": 3}
    assert {name: value.item() for name, value in bias.items()} == pytest.approx({f"bias/{k}": v for k, v in expected.items()})


def test_the_truth_has_no_bias_and_a_negative_return_a_positive_scale():
    returns = torch.tensor([-4.0, -2.0])
    assert all(value == 0 for name, value in value_bias(returns.expand(3, 2), returns).items() if name != "bias/return")
    assert value_bias(returns.expand(3, 2) + 1.5, returns)["bias/normalised_mean"] == 0.5


def test_values_of_other_pairs_raise():
    with pytest.raises(ValueError, match=r"value must have shape \(N, \*\(4,\)\), N and the returns', got \(4,\)"):
        value_bias(torch.zeros(4), torch.zeros(4))


# Where an agent has been ------------------------------------------------------------------------------------------------


def test_visits_are_counted_with_rows_of_y_and_columns_of_x():
    position = torch.tensor([[[0.1, 0.9], [0.4, 0.9]], [[0.9, 0.1], [0.9, 0.1]]])
    assert visitation(position, bins=2).tolist() == [[0, 2], [2, 0]]


def test_a_cell_holds_its_lower_edge_and_the_last_one_both():
    position = torch.tensor([[0.0, 0.5], [0.5, 1.0], [1.0, 0.0]])
    assert visitation(position, bins=2).tolist() == [[0, 1], [1, 1]]
    assert visitation(position * 4 - 2, bins=2, low=-2, high=2).tolist() == [[0, 1], [1, 1]]


def test_visits_equal_a_count_one_by_one():
    position = torch.rand(2, 300, 2)
    expected = torch.zeros(30, 30, dtype=torch.int64)
    for x, y in position.flatten(0, 1).tolist():
        expected[math.floor(y * 30), math.floor(x * 30)] += 1
    assert torch.equal(visitation(position), expected)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (torch.zeros(3), r"shape \(\*batch, 2\), x and y, got \(3,\)"),
        (torch.tensor([0.5, 1.1]), r"in \[0.0, 1.0\], got 0.5 to 1.1"),
    ],
)
def test_positions_that_are_none_raise(position, message):
    with pytest.raises(ValueError, match=message):
        visitation(position)


def test_coverage_is_the_fraction_of_the_reachable_cells_visited():
    visits = torch.tensor([[3, 0], [1, 0]])
    assert coverage(visits) == 0.5
    assert coverage(visits, torch.tensor([[True, True], [False, True]])) == pytest.approx(1 / 3)
    assert coverage(torch.stack([visits, visits + 1])).tolist() == [0.5, 1.0]


def test_a_random_walk_in_the_maze_covers_more_of_it_the_longer_it_is():
    env = Maze2DEnv(200)
    seen = env.rollout(50, break_when_any_done=False)["next", "observation"]
    covered = [float(coverage(visitation(seen[:, :steps]), env.reachable())) for steps in (1, 10, 50)]
    assert 0 < covered[0] < covered[1] < covered[2] <= 1


# Diversity --------------------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_distance_of_two_trajectories_at_one_step():
    # Three points that begin together and are 3, 4 and 5 apart at the end.
    end = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    position = torch.stack([torch.zeros(3, 2), end], 1)
    assert trajectory_diversity(position) == 2.0
    assert trajectory_diversity(position[:, -1:]) == 4.0
    assert trajectory_diversity(position[:1]) == 0.0


def test_diversity_equals_a_loop_over_pairs_and_steps():
    position = torch.rand(5, 20, 2, dtype=torch.float64)
    distances = [math.dist(position[i, t], position[j, t]) for i, j in itertools.permutations(range(5), 2) for t in range(20)]
    assert trajectory_diversity(position).item() == pytest.approx(sum(distances) / len(distances))
