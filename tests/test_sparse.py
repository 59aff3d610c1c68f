"""Linear layers of the weights that are not 0: the same numbers as the dense ones, wherever a module goes."""

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl import EnsembleMLP, MaskedMLP, make_actor, make_qvalue
from omnet_torchrl.layers import SparseLinear, sparsified


def layer(density=0.2, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(9, 7, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(7, 9, generator=generator) < density)
    return linear


@pytest.mark.parametrize("shape", [(9,), (1, 9), (5, 9), (2, 3, 9), (0, 9)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sparse_layer_is_the_dense_one(shape, bias, dtype):
    linear = layer(bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(SparseLinear(linear)(x), linear(x))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_layer_without_weights_and_a_dense_one(density):
    linear = layer(density)
    sparse = SparseLinear(linear)
    x = torch.randn(4, 9)
    torch.testing.assert_close(sparse(x), linear(x))
    assert len(sparse.values) == 63 * density
    assert f"weights={63 * density:.0f} ({density:.1%})" in repr(sparse)


def test_a_sparse_layer_is_copied_stored_loaded_and_converted(tmp_path):
    linear, x = layer(), torch.randn(4, 9)
    sparse = SparseLinear(linear)
    expected = sparse(x)
    torch.testing.assert_close(copy.deepcopy(sparse)(x), expected)
    torch.save(sparse.state_dict(), tmp_path / "layer.pt")
    other = SparseLinear(layer())
    with torch.no_grad():
        other.values.zero_()
    other(x)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(copy.deepcopy(sparse).double()(x.double()), linear.double()(x.double()))
    assert not any(p.requires_grad for p in sparse.parameters())


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP])
def test_a_subnetwork_is_extracted_sparse(network_class):
    net = network_class(
        9,
        3,
        num_cells=[32, 32],
        num_subnets=3,
        sparsity=[0.1, 0.8, 0.8],
        norm_class=nn.LayerNorm,
        norm_kwargs={"normalized_shape": 32},
        generator=0,
    ).eval()
    x = torch.randn(6, 9)
    plain = net.extract(1, sparse=True)
    torch.testing.assert_close(plain(x), net(x, 1))
    linears = [each for each in plain if isinstance(each, SparseLinear)]
    masks = [each.masks[1] for each in net if hasattr(each, "masks")]
    assert [len(each.values) for each in linears] == [int(mask.sum()) for mask in masks]
    assert plain.num_cells == net.extract(1).num_cells
    assert not plain.training


def test_actors_and_critics_are_extracted_sparse():
    specs = Unbounded(5), Bounded(-1, 1, (2,))
    batch = TensorDict({"observation": torch.randn(4, 5), "action": torch.rand(4, 2)}, [4])
    for make in (make_actor, make_qvalue):
        network = make(*specs, num_cells=(32, 32), num_subnets=2, sparsity=[0.0, 0.8, 0.8], generator=0)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            dense, sparse = (network.extract(1, sparse=sparse)(batch.copy()) for sparse in (False, True))
        key = "action" if make is make_actor else "state_action_value"
        torch.testing.assert_close(sparse[key], dense[key])
    actor = sparsified(make_actor(*specs, num_cells=(8,), num_subnets=2, sparsity=0.2, generator=0).extract(0))
    assert not any(isinstance(module, nn.Linear) for module in actor.modules())


def test_subnetworks_must_be_extracted_first():
    net = MaskedMLP(in_features=8, out_features=1, num_cells=[8], num_subnets=2, sparsity=0.5, generator=0)
    for module in (net, nn.Sequential(net)):
        with pytest.raises(TypeError, match="a MaskedMLP is several subnetworks: extract one"):
            sparsified(module)
    assert isinstance(sparsified(layer()), SparseLinear)
