"""What the options build."""

import pytest
from torchrl.data import Bounded, Unbounded

from omnet_torchrl import MaskedMLP, UnitMaskedMLP, make_qvalue
from omnet_torchrl.training.algorithms import network_options, network_sparsity, target_entropy
from omnet_torchrl.training.config import to_config
from omnet_torchrl.training.options import LossConfig, NetworkConfig, TrainConfig


@pytest.mark.parametrize(("env", "expected"), [("Hopper-v4", -1), ("Humanoid-v4", -2), ("Hopper-v5", -3), ("Pendulum-v1", -3)])
def test_the_target_entropy_is_redqs_for_the_papers_tasks_and_minus_the_actions_elsewhere(env, expected):
    assert target_entropy(TrainConfig(env=env), 3) == expected
    assert target_entropy(TrainConfig(env=env, loss=LossConfig(target_entropy=0.0)), 3) == 0


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (NetworkConfig(), 0.5),
        (NetworkConfig(sparsity=[0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]),
        (NetworkConfig(dense_input=True), [0, 0.5, 0.5]),
        (NetworkConfig(dense_output=True, sparsity=0.8), [0.8, 0.8, 0]),
        (NetworkConfig(dense_input=True, dense_output=True, num_cells=[8]), [0, 0]),
    ],
)
def test_dense_layers_have_no_sparsity_and_the_network_takes_it(network, expected):
    sparsity = network_sparsity(network)
    assert sparsity == expected
    MaskedMLP(in_features=30, out_features=1, num_cells=network.num_cells, num_subnets=2, sparsity=sparsity)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_masks_choose_the_network(role):
    weight = network_options(to_config({"network": {"mask_bias": True}}), role)
    assert (weight["network_class"], weight["mask_bias"], weight["sparsity"]) == (MaskedMLP, True, 0.5)
    unit = network_options(to_config({"network": {"masks": "unit", "sparsity": [0.5, 0.75]}}), role)
    assert unit["network_class"] is UnitMaskedMLP
    qvalue = make_qvalue(Unbounded((3,)), Bounded(-1, 1, (2,)), **unit)
    assert qvalue.extract(0).module.num_cells == [128, 64]
