"""Linear layers of the weights that a structure keeps: they are masked layers with the structure as their mask."""

import copy

import pytest
import torch
from conftest import OBS
from test_dqn import SPACES, dqn_batch
from test_update import compiler  # noqa: F401
from torch import nn
from torchrl.data import Binary, OneHot

from omnet_torchrl import IndexedSequential, MaskedLinear, MaskedMLP, OMNetDQNLoss, RedrawnMLP, SubnetQValueActor, Update
from omnet_torchrl.grids import make_grid_qvalue_actor
from omnet_torchrl.layers import SparseLinear, StructuredLinear
from omnet_torchrl.structures import l1_structure, random_structure, set_structure, spatial_structure


def pair(bias=True, num_subnets=3, kind="random"):
    """A masked layer with a structure, and a layer of the structure alone."""
    generator = torch.Generator().manual_seed(0)
    structure = random_structure(7, 9, 4, generator=0)
    if kind == "l1":  # as many weights, but not the same number for each unit
        structure = l1_structure(torch.randn(7, 9, generator=generator).abs() ** 3, 4)
    masked = MaskedLinear(9, 7, bias, masks=torch.ones(num_subnets, 7, 9, dtype=torch.bool))
    set_structure(masked, structure, generator=1)
    return masked, StructuredLinear(masked, structure)


@pytest.mark.parametrize("kind", ["random", "l1"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "index"),
    [
        ((9,), 1),
        ((1, 9), torch.tensor([2])),
        ((5, 9), torch.tensor(0)),
        ((5, 9), torch.arange(2)[:, None]),
        ((2, 5, 9), torch.arange(2)[:, None]),
        ((5, 9), torch.tensor([0, 1, 2, 2, 0])),
        ((0, 9), torch.tensor(0)),
    ],
)
def test_output_and_gradients_are_the_masked_layers(kind, bias, shape, index):
    masked, structured = pair(bias, kind=kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    results = []
    for layer in (masked, structured):
        leaf = x.clone().requires_grad_()
        output = layer(leaf, index)
        of = [leaf, layer.weight, *([layer.bias] if bias else [])]
        results.append((output, torch.autograd.grad(output.square().sum(), of)))
    (expected, (of_x, of_weight, *of_bias)), (output, gradients) = results
    torch.testing.assert_close(output, expected)
    kept = structured.structure
    torch.testing.assert_close(gradients, (of_x, of_weight[kept], *of_bias))
    assert len(gradients[1]) == kept.sum() == 28
    with torch.no_grad():  # a policy's way, which is another for a single observation
        torch.testing.assert_close(structured(x, index), expected)


def test_gradients_in_float64():
    _, structured = pair()
    structured = structured.double()
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    names = dict(structured.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(structured, dict(zip(names, parameters, strict=True)), (x, 0))

    assert torch.autograd.gradcheck(call, (x, *names.values()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # it has no batching rule, and is called once for each
def test_under_vmap():
    _, structured = pair()
    x, weights = torch.randn(5, 9), torch.randn(3, 28)
    expected = torch.stack([torch.func.functional_call(structured, {"weight": w}, (x, 0)) for w in weights])
    outputs = torch.vmap(lambda w: torch.func.functional_call(structured, {"weight": w}, (x, 0)))(weights)
    torch.testing.assert_close(outputs, expected)


def networks():
    """A network with a structure in its first layer, as masks and as the weights that it keeps."""
    torch.manual_seed(0)
    masked = MaskedMLP(in_features=OBS, out_features=3, num_cells=[8], num_subnets=2, sparsity=0.0)
    structure = random_structure(8, OBS, 2, generator=0)
    set_structure(masked[0], structure, generator=0)
    with torch.no_grad():
        masked[0].weight.mul_(structure)  # an L1 penalty is of the others too
    structured = copy.deepcopy(masked)
    structured[0] = StructuredLinear(structured[0], structure)
    return masked, structured


def test_a_network_extracts_it_dense_or_sparse():
    masked, structured = networks()
    x = torch.randn(4, OBS)
    expected = masked(x, 1)
    dense, sparse = structured.extract(1), structured.extract(1, sparse=True)
    assert [type(layer) for layer in dense] == [nn.Linear, nn.Tanh, nn.Linear]
    assert dense.num_cells == [8]
    assert isinstance(sparse[0], SparseLinear)
    for plain in (dense, sparse):
        torch.testing.assert_close(plain(x), expected)
    again = copy.deepcopy(structured)
    again.load_state_dict(structured.state_dict())
    torch.testing.assert_close(again(x, 1), expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("fast", [False, True], ids=["eager", "compiled"])
def test_updates_are_those_under_masks(frozen, size, fast, request):
    if fast:
        request.getfixturevalue("compiler")
    batches = torch.stack([dqn_batch(size, seed=seed) for seed in range(4)])
    losses, metrics = [], []
    for network in networks():
        network[0].requires_grad_(not frozen)
        losses.append(OMNetDQNLoss(SubnetQValueActor(network, SPACES["one-hot"]), delay_value=True, l1=1e-3))
        update = Update(losses[-1], lr=0.01, tau=0.1, compile=fast)
        torch.manual_seed(1)
        metrics.append(update(batches))
    for name in ("loss", "td_error"):
        torch.testing.assert_close(metrics[1][name], metrics[0][name], rtol=1e-4, atol=1e-5)
    kept, layer = networks()[1][0].structure, ("module", "0", "module", "0", "weight")
    for params in ("value_network_params", "target_value_network_params"):
        masked, structured = (getattr(loss, params).get(layer) for loss in losses)
        torch.testing.assert_close(structured, masked[kept], rtol=1e-4, atol=1e-5)
        assert torch.equal(structured, networks()[1][0].weight) == frozen


def test_a_network_for_grids_has_a_structure():
    specs = Binary(shape=(10, 10, 4), dtype=torch.bool), OneHot(3)
    structure = spatial_structure(20, (10, 10, 4), generator=0)
    options = {"num_cells": [20], "num_subnets": 1, "sparsity": 0.0, "structure": structure}
    actor = make_grid_qvalue_actor(*specs, **options, channels=None)
    layer = next(each for each in actor.modules() if isinstance(each, StructuredLinear))
    assert torch.equal(layer.structure, structure)
    assert layer.weight.abs().max() <= 1 / 6
    with pytest.raises(ValueError, match="channels must be None with a structure, which is of the first layer, got 16"):
        make_grid_qvalue_actor(*specs, **options)
    with pytest.raises(ValueError, match=r"a structure, network_class must be MaskedMLP, got .*RedrawnMLP"):
        make_grid_qvalue_actor(*specs, **options, channels=None, network_class=RedrawnMLP)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: StructuredLinear(nn.Linear(9, 7), torch.ones(9, 7) > 0),
            r"weight's shape \(7, 9\), got torch.bool of \(9, 7\)",
        ),
        (lambda: StructuredLinear(nn.Linear(9, 7), torch.ones(7, 9)), "must be boolean"),
        (lambda: pair()[1](torch.zeros(4, 8), 0), r"inputs \(\*batch, 9\) of torch.float32, got \(4, 8\)"),
        (lambda: pair()[1](torch.zeros(4, 9, dtype=torch.float64), 0), "of torch.float64"),
        (lambda: pair()[1](torch.zeros(4, 9), 3), r"in \[0, num_subnets=3\), got 3"),
        (lambda: pair()[1].extract(3), r"in \[0, num_subnets=3\), got 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_reset_draws_it_anew():
    _, structured = networks()
    loss = OMNetDQNLoss(SubnetQValueActor(structured, SPACES["one-hot"]), delay_value=True)
    update = Update(loss, lr=0.01, compile=False)
    before = {name: value.clone() for name, value in loss.named_parameters()}
    update.reset()
    assert not [name for name, value in loss.named_parameters() if torch.equal(value, before[name])]
    layer = StructuredLinear(nn.Linear(400, 200), random_structure(200, 400, 36, generator=0))
    layer.reset_parameters()
    for parameter in (layer.weight, layer.bias):
        assert 0.15 < parameter.abs().max() <= 1 / 6


def test_a_generator_decides_the_masks_of_a_network_for_grids():
    specs = Binary(shape=(10, 10, 4), dtype=torch.bool), OneHot(3)
    for options in ({}, {"channels": None}, {"sparsity": 0.3}):
        buffers = []
        for seed in range(2):
            torch.manual_seed(seed)
            buffers.append(list(make_grid_qvalue_actor(*specs, generator=0, **options).buffers()))
        assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_a_mask_of_the_bias_is_refused():
    masks = torch.ones(2, 7, 9, dtype=torch.bool)
    layer = MaskedLinear(9, 7, masks=masks, bias_masks=masks[..., 0])
    with pytest.raises(ValueError, match="one bias for all subnetworks: build it with mask_bias=False"):
        StructuredLinear(layer, masks[0])


def test_an_l1_penalty_is_of_weights_and_not_of_scales():
    layers = networks()[1], nn.BatchNorm1d(3), nn.ReLU(), MaskedLinear(3, 3, masks=torch.ones(2, 3, 3, dtype=torch.bool))
    loss = OMNetDQNLoss(SubnetQValueActor(IndexedSequential(*layers), SPACES["one-hot"]), l1=1e-3)
    assert [".".join(name[2:]) for name in loss._hidden] == ["module.0.0.weight", "module.0.2.weight"]


@pytest.mark.gpu
def test_it_is_the_same_on_a_gpu():
    _, structured = pair()
    there = copy.deepcopy(structured).cuda()
    x = torch.randn(6, 9)
    for layer, inputs in ((structured, x), (there, x.cuda())):
        layer(inputs, 0).square().sum().backward()
    torch.testing.assert_close(there.weight.grad.cpu(), structured.weight.grad)
    for rows in (x, x[:1]):
        with torch.no_grad():
            torch.testing.assert_close(there(rows.cuda(), 0).cpu(), structured(rows, 0))
