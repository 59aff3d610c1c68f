"""Layers with an index: every path equals a plain loop over subnetworks, and masks are nothing but masks."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torchrl.modules import MLP, NormalParamExtractor

from omnet_torchrl import (
    EnsembleLayerNorm,
    EnsembleLinear,
    EnsembleMLP,
    MaskedLinear,
    MaskedMLP,
    UnitLayerNorm,
    UnitLinear,
    UnitMaskedMLP,
    bernoulli_masks,
    mask_density,
)
from omnet_torchrl.layers import indexed_linear

N, IN, CELLS, OUT = 5, 8, 6, 3
KINDS = ["masked_linear", "masked_mlp", "ensemble_mlp", "unit_mlp"]

# Shape of the index, batch of the input.
PATHS = {
    "one for everything": ((), (6,)),
    "one for one element": ((), ()),
    "one for everything, (1,)": ((1,), (6,)),
    "one for two dimensions": ((), (4, 6)),
    "one for everything, (1, 1)": ((1, 1), (6,)),
    "per row, shared input": ((3, 1), (6,)),
    "per row, own input": ((3, 1), (3, 6)),
    "per row, more rows than subnets": ((7, 1), (7, 6)),
    "per row, two dimensions each": ((3, 1, 1), (4, 6)),
    "per row of the middle dimension": ((3, 1), (4, 3, 6)),
    "per element, fewer than subnets": ((2,), (2,)),
    "per element, more than subnets": ((7,), (7,)),
    "per element, one element": ((6,), ()),
    "per element, repeated over rows": ((6,), (4, 6)),
    "per element of two dimensions, shared input": ((3, 6), (6,)),
    "per element of two dimensions": ((4, 6), (4, 6)),
    "per element of two dimensions, few": ((2, 2), (2, 2)),
}
each_path = pytest.mark.parametrize(("index_shape", "batch"), PATHS.values(), ids=PATHS.keys())
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(kind, dtype=torch.float64, device=None, **kwargs):
    """A network of 8 inputs and 3 outputs as 5 subnetworks."""
    if kind == "masked_linear":
        masks, bias_masks = bernoulli_masks(N, (OUT, IN), 0.5, generator=0), bernoulli_masks(N, (OUT,), 0.5, generator=1)
        return MaskedLinear(IN, OUT, masks=masks, bias_masks=bias_masks, dtype=dtype, device=device, **kwargs)
    norm = {"norm_class": nn.LayerNorm, "norm_kwargs": {"normalized_shape": CELLS}}
    kwargs = {"depth": 2, "num_cells": CELLS, "num_subnets": N, "device": device, **norm, **kwargs}
    if kind == "masked_mlp":
        return MaskedMLP(IN, OUT, **{"sparsity": 0.4, "mask_bias": True, "generator": 0, **kwargs}).to(dtype)
    if kind == "unit_mlp":
        net = UnitMaskedMLP(IN, OUT, **{"sparsity": 0.4, "generator": 0, **kwargs}).to(dtype)
    else:
        net = EnsembleMLP(IN, OUT, **kwargs).to(dtype)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith(("1.", "4.")):  # Normalisations that do something.
                p.add_(torch.randn_like(p))
    return net


def subnetwork(kind, net, params, k, x):
    """Answer of subnetwork ``k`` in plain operations: what every path must equal."""
    buffers = dict(net.named_buffers())
    if kind == "masked_linear":
        return F.linear(x, params["weight"] * buffers["masks"][k], params["bias"] * buffers["bias_masks"][k])
    if kind == "unit_mlp":
        return full_width(buffers, params, k, x)
    for i in (0, 3, 6):
        weight, bias = params[f"{i}.weight"], params[f"{i}.bias"]
        if kind == "ensemble_mlp":
            weight, bias = weight[k], bias[k]
        else:
            weight = weight * buffers[f"{i}.masks"][k]
            bias = bias * buffers[f"{i}.bias_masks"][k] if i < 6 else bias
        x = F.linear(x, weight, bias)
        if i < 6:
            scale, shift = params[f"{i + 1}.weight"], params[f"{i + 1}.bias"]
            if kind == "ensemble_mlp":
                scale, shift = scale[k], shift[k]
            x = torch.tanh(F.layer_norm(x, (CELLS,), scale, shift))
    return x


def full_width(buffers, params, k, x):
    """Subnetwork ``k`` of masked units as a network of full width whose other units are zero everywhere."""
    before = torch.ones(IN, dtype=x.dtype)
    for i in (0, 3):
        units = buffers[f"{i}.out_units"][k]
        kept = torch.zeros(CELLS, dtype=x.dtype).index_fill(0, units, 1)
        x = F.linear(x, params[f"{i}.weight"] * torch.outer(kept, before), params[f"{i}.bias"] * kept)
        mean = x.sum() / len(units)
        variance = ((x - mean) * kept).square().sum() / len(units)
        normal = (x - mean) / (variance + 1e-5).sqrt() * params[f"{i + 1}.weight"] + params[f"{i + 1}.bias"]
        x, before = torch.tanh(normal * kept), kept
    return F.linear(x, params["6.weight"] * before, params["6.bias"])


def loop(kind, net, x, subnet, params=None):
    """One call of the subnetwork asked for each element of the broadcast batch."""
    params = dict(net.named_parameters()) if params is None else params
    batch = torch.broadcast_shapes(subnet.shape, x.shape[:-1])
    elements = x.expand(*batch, x.shape[-1]).reshape(-1, x.shape[-1])
    indices = subnet.expand(batch).reshape(-1).tolist()
    outputs = [subnetwork(kind, net, params, k, element) for k, element in zip(indices, elements, strict=True)]
    return torch.stack(outputs).reshape(*batch, -1)


def draw(index_shape, batch, dtype=torch.float64):
    return torch.randn(*batch, IN, dtype=dtype), torch.randint(N, index_shape)


# Every index path


@each_kind
@each_path
def test_every_index_path_equals_a_loop_over_subnetworks(kind, index_shape, batch):
    net, (x, subnet) = make(kind), draw(index_shape, batch)
    output = net(x, subnet)
    assert output.shape == (*torch.broadcast_shapes(index_shape, batch), OUT)
    torch.testing.assert_close(output, loop(kind, net, x, subnet), rtol=1e-10, atol=1e-12)


@each_kind
@each_path
def test_gradients_of_every_index_path_equal_those_of_a_loop(kind, index_shape, batch):
    net, (x, subnet) = make(kind), draw(index_shape, batch)
    x.requires_grad_()
    leaves = [x, *net.parameters()]
    output = net(x, subnet)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    expected = torch.autograd.grad(loop(kind, net, x, subnet), leaves, cotangent)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


@each_path
def test_gradient_is_zero_where_the_mask_is_zero(index_shape, batch):
    net, (x, subnet) = make("masked_linear"), draw(index_shape, batch)
    net(x, subnet).square().sum().backward()
    drawn = subnet.unique()
    assert torch.equal(net.weight.grad != 0, net.masks[drawn].any(0))
    assert torch.equal(net.bias.grad != 0, net.bias_masks[drawn].any(0))


@each_path
def test_gradient_of_every_layer_is_zero_where_the_mask_is_zero(index_shape, batch):
    net, (x, subnet) = make("masked_mlp"), draw(index_shape, batch)
    net(x, subnet).square().sum().backward()
    for layer in (net[0], net[3], net[6]):
        kept = layer.masks[subnet.unique()].any(0)
        assert (layer.weight.grad[~kept] == 0).all()
        assert (layer.weight.grad[kept] != 0).float().mean() > 0.5
    assert torch.equal(net[6].weight.grad != 0, net[6].masks[subnet.unique()].any(0))


@each_path
def test_only_the_members_asked_get_a_gradient(index_shape, batch):
    net, (x, subnet) = make("ensemble_mlp"), draw(index_shape, batch)
    net(x, subnet).square().sum().backward()
    asked = torch.zeros(N, dtype=torch.bool).index_fill_(0, subnet.unique(), True)
    for p in net.parameters():
        assert torch.equal(p.grad.flatten(1).any(1), asked)


@each_kind
@pytest.mark.parametrize(("index_shape", "batch"), [((), (0,)), ((0,), (0,)), ((3, 1), (0,)), ((3, 1), (3, 0)), ((0, 1), (6,))])
def test_an_empty_batch_has_an_empty_answer(kind, index_shape, batch):
    output = make(kind)(*draw(index_shape, batch))
    assert output.shape == (*torch.broadcast_shapes(index_shape, batch), OUT)


@pytest.mark.parametrize(
    ("index_shape", "batch", "asked"),
    [((), (60,), 1), ((3, 1), (60,), 3), ((60,), (60,), N), ((4, 60), (60,), N), ((2,), (2,), 2), ((60, 1), (60, 7), 60)],
)
def test_no_path_makes_a_weight_matrix_for_each_element_of_a_large_batch(index_shape, batch, asked):
    weights, counts = torch.randn(N, OUT, IN), []

    def select(index):
        counts.append(len(index))
        return weights[index], None

    x, subnet = draw(index_shape, batch, torch.float32)
    indexed_linear(x, subnet, N, select)
    assert counts == [asked]


def test_several_inputs_are_concatenated():
    net, (x, subnet) = make("masked_mlp"), draw((3, 1), (6,))
    assert torch.equal(net(x[:, :5], x[:, 5:], subnet), net(x, subnet))


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP])
@pytest.mark.parametrize(("index_shape", "batch"), [((), (6,)), ((3, 1), (6,)), ((7,), (7,))])
def test_out_features_of_several_dimensions_are_the_last_dimensions(network_class, index_shape, batch):
    torch.manual_seed(1)
    kwargs = {"generator": 0, "sparsity": 0.3} if network_class is MaskedMLP else {}
    tuples = network_class(IN, (2, 3), num_cells=[CELLS], num_subnets=N, **kwargs)
    torch.manual_seed(1)
    flat = network_class(IN, 6, num_cells=[CELLS], num_subnets=N, **kwargs)
    x, subnet = draw(index_shape, batch, torch.float32)
    output = tuples(x, subnet)
    assert output.shape == (*torch.broadcast_shapes(index_shape, batch), 2, 3)
    assert torch.equal(output.flatten(-2), flat(x, subnet))


@each_path
def test_a_layer_norm_for_each_member_equals_a_loop(index_shape, batch):
    net, (x, subnet) = EnsembleLayerNorm(IN, eps=0.1, num_subnets=N, dtype=torch.float64), draw(index_shape, batch)
    with torch.no_grad():
        net.weight.normal_()
        net.bias.normal_()
    batch = torch.broadcast_shapes(index_shape, batch)
    elements, indices = x.expand(*batch, IN).reshape(-1, IN), subnet.expand(batch).reshape(-1).tolist()
    expected = [F.layer_norm(e, (IN,), net.weight[k], net.bias[k], 0.1) for k, e in zip(indices, elements, strict=True)]
    torch.testing.assert_close(net(x, subnet), torch.stack(expected).reshape(*batch, IN), rtol=1e-10, atol=1e-12)


@each_kind
@pytest.mark.parametrize(("index_shape", "batch"), [((), (6,)), ((3, 1), (6,)), ((7,), (7,)), ((2,), (2,))])
def test_vmap_over_stacked_parameters_equals_a_loop(kind, index_shape, batch):
    net, (x, subnet) = make(kind), draw(index_shape, batch)
    params = {name: torch.randn(4, *p.shape, dtype=p.dtype) for name, p in net.named_parameters()}
    output = torch.vmap(lambda p: torch.func.functional_call(net, p, (x, subnet)))(params)
    expected = [loop(kind, net, x, subnet, {name: p[i] for name, p in params.items()}) for i in range(4)]
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-10, atol=1e-12)


@each_kind
def test_vmap_over_the_index_equals_a_loop(kind):
    net, (x, subnet) = make(kind), draw((3,), (6,))
    output = torch.vmap(net, in_dims=(None, 0))(x, subnet)
    torch.testing.assert_close(output, loop(kind, net, x, subnet[:, None]), rtol=1e-10, atol=1e-12)


# Inductor once, as it takes half a minute: what the layers must do is trace, forward and backward.
@pytest.mark.parametrize(
    ("kind", "backend"), [("masked_mlp", "inductor"), ("ensemble_mlp", "aot_eager"), ("unit_mlp", "inductor")]
)
def test_compiled_forward_and_backward_agree_with_eager(kind, backend, compiler):
    net = make(kind, depth=1)
    x = torch.randn(7, IN, dtype=torch.float64)
    one, rows, elements = torch.tensor(2), torch.tensor([[4], [0], [4]]), torch.randint(N, (7,))

    def every_path():
        return net(x, one), net(x, rows), net(x, elements)

    def gradients(outputs):
        return torch.autograd.grad(sum(y.square().sum() for y in outputs), list(net.parameters()))

    expected, outputs = every_path(), torch.compile(every_path, fullgraph=True, backend=backend)()
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(outputs), gradients(expected), rtol=1e-10, atol=1e-12)


def test_compiled_code_serves_every_value_of_the_index(compiler):
    net = make("masked_mlp")
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, subnet = draw((7,), (7,))
    compiled(x, subnet)
    with torch.compiler.set_stance("fail_on_recompile"):
        for k in range(N):
            torch.testing.assert_close(compiled(x, torch.full((7,), k)), loop("masked_mlp", net, x, torch.tensor(k)))


@pytest.mark.gpu
@each_kind
@each_path
def test_outputs_on_cuda_equal_those_on_the_cpu(kind, index_shape, batch):
    net, (x, subnet) = make(kind), draw(index_shape, batch)
    expected = net(x, subnet)
    output = net.to("cuda")(x.to("cuda"), subnet.to("cuda"))
    assert output.is_cuda
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
def test_masks_from_a_seed_are_the_same_on_every_device():
    cpu, cuda = (make("masked_mlp", device=device) for device in ("cpu", "cuda"))
    assert cuda[0].masks.is_cuda
    assert torch.equal(cuda[0].masks.cpu(), cpu[0].masks)


# One dense subnetwork is an MLP

CONFIGS = {
    "no hidden layer": {},
    "depth": {"depth": 2},
    "depth 0": {"depth": 0},
    "depth and an int": {"depth": 2, "num_cells": 7},
    "list": {"num_cells": [7, 4]},
    "tuple": {"num_cells": (7, 4)},
    "depth and list": {"depth": 2, "num_cells": [7, 4]},
    "several out_features": {"num_cells": [7], "out_features": (2, 3)},
    "torch.Size": {"num_cells": [7], "out_features": torch.Size([2, 3])},
    "norm": {"depth": 2, "num_cells": 7, "norm_class": nn.LayerNorm, "norm_kwargs": {"normalized_shape": 7}},
    "norm of each layer": {
        "num_cells": [7, 4],
        "norm_class": nn.LayerNorm,
        "norm_kwargs": [{"normalized_shape": 7}, {"normalized_shape": 4}],
    },
    "activation": {"num_cells": [7], "activation_class": nn.ELU, "activation_kwargs": {"alpha": 0.3}},
    "activation with parameters": {"num_cells": [7], "activation_class": nn.PReLU},
    "activated output": {"num_cells": [7], "activate_last_layer": True},
    "no bias in the output": {"num_cells": [7], "bias_last_layer": False},
    "one bias for all outputs": {"num_cells": [7], "single_bias_last_layer": True},
    "dropout": {"num_cells": [7, 4], "dropout": 0.5},
    "device": {"num_cells": [7], "device": "cpu"},
}


def seeded(network_class, **kwargs):
    torch.manual_seed(3)
    return network_class(in_features=IN, **{"out_features": OUT, **kwargs})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("network_class", [MaskedMLP, UnitMaskedMLP])
def test_one_dense_subnet_is_an_mlp_bit_for_bit(network_class, config, training):
    masked = seeded(network_class, num_subnets=1, sparsity=0.0, **config).train(training)
    mlp = seeded(MLP, **config).train(training)
    params, expected = dict(masked.named_parameters()), dict(mlp.named_parameters())
    assert list(params) == list(expected)
    assert all(torch.equal(params[name], p) for name, p in expected.items())
    x = torch.randn(6, IN)
    for subnet in (torch.tensor(0), torch.zeros(1, 1, dtype=torch.int64)):
        torch.manual_seed(4)
        output = masked(x, subnet)
        torch.manual_seed(4)
        assert torch.equal(output, mlp(x).expand(output.shape))
    assert (masked.depth, masked.num_cells, masked.in_features) == (mlp.depth, mlp.num_cells, mlp.in_features)


@pytest.mark.parametrize("network_class", [MaskedMLP, UnitMaskedMLP])
def test_one_dense_subnet_trains_as_an_mlp(network_class):
    kwargs = {"num_cells": [7, 4], "norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": n} for n in (7, 4)]}
    masked, mlp = seeded(network_class, num_subnets=1, sparsity=0.0, **kwargs), seeded(MLP, **kwargs)
    optimisers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (masked, mlp)]
    x, subnet = torch.randn(6, IN), torch.zeros(6, dtype=torch.int64)
    for _ in range(5):
        for optimiser, output in zip(optimisers, (masked(x, subnet), mlp(x)), strict=True):
            optimiser.zero_grad()
            output.square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(dict(masked.named_parameters()), dict(mlp.named_parameters()))


@pytest.mark.parametrize("config", [{"num_cells": 7}, {"depth": 3, "num_cells": [7, 7]}])
def test_hidden_layers_that_mlp_refuses_are_refused(config):
    with pytest.raises(RuntimeError) as expected:
        MLP(IN, OUT, **config)
    for network_class in (MaskedMLP, EnsembleMLP, UnitMaskedMLP):
        with pytest.raises(RuntimeError) as error:
            network_class(IN, OUT, **config)
        assert str(error.value) == str(expected.value)


# Masks


@pytest.mark.parametrize("generator", [None, 0, 1])
@pytest.mark.parametrize("mask_bias", [True, False])
def test_masks_do_not_disturb_initial_weights(generator, mask_bias):
    kwargs = {"num_cells": [20, 20], "num_subnets": N, "mask_bias": mask_bias, "generator": generator}
    mlp = seeded(MLP, num_cells=[20, 20])
    following = torch.rand(3)
    for sparsity in (0.0, 0.3):
        masked = seeded(MaskedMLP, sparsity=sparsity, **kwargs)
        assert torch.equal(torch.rand(3), following)
        assert all(torch.equal(p, q) for p, q in zip(masked.parameters(), mlp.parameters(), strict=True))


def test_layers_of_one_shape_get_masks_of_their_own():
    net = MaskedMLP(20, 20, num_cells=[20, 20], generator=0)
    assert not torch.equal(net[0].masks, net[2].masks)
    assert not torch.equal(net[2].masks, net[4].masks)


def test_networks_that_share_a_generator_get_masks_of_their_own_and_a_seed_repeats_them():
    generator = torch.Generator().manual_seed(0)
    first, second, repeated = (MaskedMLP(20, 20, generator=g) for g in (generator, generator, 0))
    assert not torch.equal(first[0].masks, second[0].masks)
    assert torch.equal(first[0].masks, repeated[0].masks)


def test_sparsity_can_differ_from_layer_to_layer():
    net = MaskedMLP(50, 50, num_cells=[50, 50], sparsity=[0.0, 0.8, 0.2], mask_bias=True, generator=0)
    densities = [mask_density(net[i].masks).mean().item() for i in (0, 2, 4)]
    assert densities == pytest.approx([1.0, 0.2, 0.8], abs=0.02)
    assert mask_density(net[2].bias_masks).mean().item() == pytest.approx(0.2, abs=0.15)


def test_biases_are_masked_on_request_but_for_the_output():
    plain, masked = (MaskedMLP(IN, OUT, num_cells=[7, 4], mask_bias=m, sparsity=0.2, generator=0) for m in (False, True))
    assert all(plain[i].bias_masks is None for i in (0, 2, 4))
    assert masked[4].bias_masks is None
    assert [tuple(masked[i].bias_masks.shape) for i in (0, 2)] == [(5, 7), (5, 4)]
    assert not masked[0].bias_masks.all()


def test_masks_come_from_the_function_given():
    calls = []

    def halves(num_subnets, shape, sparsity, *, generator, device):
        calls.append((num_subnets, tuple(shape), sparsity, isinstance(generator, torch.Generator), device))
        return torch.arange(math.prod(shape)).reshape(shape).remainder(2).bool().expand(num_subnets, *shape)

    net = MaskedMLP(4, 2, num_cells=[3], num_subnets=2, sparsity=[0.5, 0.25], mask_fn=halves, device="cpu")
    assert calls == [(2, (3, 4), 0.5, True, "cpu"), (2, (2, 3), 0.25, True, "cpu")]
    assert torch.equal(net[0].masks[1], torch.tensor([0, 1, 0, 1]).bool().expand(3, 4))


def test_masks_are_buffers_and_not_parameters():
    net = make("masked_mlp")
    assert {name for name, _ in net.named_buffers()} == {"0.masks", "0.bias_masks", "3.masks", "3.bias_masks", "6.masks"}
    assert set(net.state_dict()) == {name for name, _ in [*net.named_parameters(), *net.named_buffers()]}
    assert all(p.is_floating_point() for p in net.parameters())


def test_masks_survive_state_dict_and_decide_the_output():
    net, other = make("masked_mlp"), make("masked_mlp", sparsity=0.1)
    x, subnet = draw((7,), (7,))
    assert not torch.equal(other[0].masks, net[0].masks)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other[0].masks, net[0].masks)
    assert torch.equal(other(x, subnet), net(x, subnet))


WRITES = {
    "copy": lambda layer, name, new: getattr(layer, name).copy_(new),
    "copy to data": lambda layer, name, new: getattr(layer, name).data.copy_(new),
    "load": lambda layer, name, new: layer.load_state_dict({**layer.state_dict(), name: new}),
    "one entry": lambda layer, name, new: [getattr(layer, name)[k].copy_(row) for k, row in enumerate(new)],
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("index_shape", [(), (2, 1), (6,)])
def test_masks_written_in_place_are_those_of_the_next_call(write, index_shape):
    net, (x, index) = make("masked_mlp", sparsity=0.5), draw(index_shape, (6,))
    before = net(x, index)
    fresh = make("masked_mlp", sparsity=0.3, generator=7)
    parameters = dict(net.named_parameters())
    fresh.load_state_dict({**fresh.state_dict(), **{name: p.detach().clone() for name, p in parameters.items()}})
    for layer, other in zip(net, fresh, strict=True):
        for name, new in other.named_buffers():
            write(layer, name, new)
    after, expected = net(x, index), fresh(x, index)
    assert not torch.equal(after, before)
    assert torch.equal(after, expected)
    assert torch.equal(net.extract(1)(x), fresh.extract(1)(x))
    weight = torch.randn_like(after)
    gradients = torch.autograd.grad((after * weight).sum(), list(parameters.values()))
    others = torch.autograd.grad((expected * weight).sum(), list(fresh.parameters()))
    assert all(torch.equal(gradient, other) for gradient, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("index_shape", [(), (2, 1)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float64, torch.bool])
def test_masks_may_be_numbers_where_they_are_put_in_place_for_a_call(index_shape, kind):
    net, (x, index) = make("masked_mlp"), draw(index_shape, (6,))
    buffers = {name: b.to(kind) for name, b in net.named_buffers()}
    assert torch.equal(torch.func.functional_call(net, buffers, (x, index)), net(x, index))
    assert all(b.dtype == torch.bool for b in net.buffers())


def test_a_compiled_call_sees_masks_written_in_place(compiler):
    net, (x, index) = make("masked_mlp"), draw((2, 1), (6,))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index), net(x, index))
    for buffer in net.buffers():
        buffer.copy_(~buffer)
    torch.testing.assert_close(compiled(x, index), net(x, index))


def test_a_traced_call_sees_masks_written_in_place():
    net, (x, index) = make("masked_mlp"), draw((2, 1), (6,))
    traced = make_fx(net)(x, index)
    for buffer in net.buffers():
        buffer.copy_(~buffer)
    assert torch.equal(traced(x, index), net(x, index))


def test_a_copy_has_masks_of_its_own():
    net = make("masked_mlp")
    clone = copy.deepcopy(net)
    x, subnet = draw((7,), (7,))
    assert torch.equal(clone(x, subnet), net(x, subnet))
    clone[0].masks.zero_()
    clone[0].weight.data.zero_()
    assert net[0].masks.any()
    assert net[0].weight.any()


def test_masks_stay_boolean_when_the_network_changes_dtype():
    net = make("masked_mlp", dtype=torch.float32)
    masks = net[0].masks.clone()
    for dtype in (torch.float64, torch.bfloat16):
        net.to(dtype)
        assert net[0].weight.dtype == dtype
        assert torch.equal(net[0].masks, masks)
        assert net(torch.zeros(2, IN, dtype=dtype), torch.tensor(0)).dtype == dtype
    assert net.double().half().float()[0].masks.dtype == torch.bool


@pytest.mark.parametrize("optimiser_class", [torch.optim.Adam, torch.optim.SGD])
def test_an_optimiser_step_moves_weights_and_no_masks(optimiser_class):
    net, (x, subnet) = make("masked_mlp"), draw((3, 1), (6,))
    masks = {name: b.clone() for name, b in net.named_buffers()}
    weight = net[0].weight.detach().clone()
    optimiser = optimiser_class(net.parameters(), lr=0.1, weight_decay=0.1)
    net(x, subnet).square().sum().backward()
    optimiser.step()
    assert all(torch.equal(b, masks[name]) for name, b in net.named_buffers())
    assert (net[0].weight != weight).any()


@pytest.mark.parametrize("init_fn", [None, nn.init.xavier_uniform_, nn.init.orthogonal_])
@each_kind
def test_resetting_draws_the_weights_anew_with_the_same_initialiser_and_leaves_masks(kind, init_fn):
    torch.manual_seed(5)
    net = make(kind, dtype=torch.float32, init_fn=init_fn)
    layers = [m for m in net.modules() if isinstance(m, MaskedLinear | EnsembleLinear | UnitLinear)]
    assert len(layers) == (1 if kind == "masked_linear" else 3)
    initial = {name: v.clone() for name, v in net.state_dict().items()}
    for layer in layers:
        layer.reset_parameters()
    for layer_name, layer in net.named_modules():
        if layer in layers:
            assert not torch.equal(layer.weight, initial[f"{layer_name}.weight".lstrip(".")])
            assert (layer.bias == 0).all() == (init_fn is not None)
    assert all(torch.equal(b, initial[name]) for name, b in net.named_buffers())
    torch.manual_seed(5)
    for layer in layers:
        layer.reset_parameters()
    parameters = {id(p) for layer in layers for p in layer.parameters()}
    assert all(torch.equal(p, initial[name]) for name, p in net.named_parameters() if id(p) in parameters)


def test_an_initialiser_fills_every_weight_and_zeroes_biases():
    net = MaskedMLP(IN, OUT, num_cells=[7], sparsity=0.2, generator=0, init_fn=lambda w: nn.init.constant_(w, 0.5))
    assert all((net[i].weight == 0.5).all() and (net[i].bias == 0).all() for i in (0, 2))


# Ensembles


@pytest.mark.parametrize("bias", [True, False])
def test_members_start_as_linear_layers_made_one_after_the_other(bias):
    torch.manual_seed(6)
    ensemble = EnsembleLinear(IN, OUT, bias, num_subnets=N)
    torch.manual_seed(6)
    for k in range(N):
        expected = nn.Linear(IN, OUT, bias)
        assert torch.equal(ensemble.weight[k], expected.weight)
        assert (ensemble.bias is None) if not bias else torch.equal(ensemble.bias[k], expected.bias)


@pytest.mark.parametrize(("init_fn", "bound"), [(None, 1 / math.sqrt(60)), (nn.init.xavier_uniform_, math.sqrt(6 / 100))])
def test_every_member_is_initialised_as_a_network_of_its_own(init_fn, bound):
    weight = EnsembleMLP(60, 40, num_subnets=10, init_fn=init_fn)[0].weight.flatten(1)
    # Uniform in [-bound, bound], where fans counted over all networks at once would give another bound.
    assert (weight.abs().amax(1) <= bound).all()
    torch.testing.assert_close(weight.std(1), torch.full((10,), bound / math.sqrt(3)), rtol=0.05, atol=0)
    assert torch.pdist(weight).min() > 0


def test_members_are_independent_under_training():
    net, x = make("ensemble_mlp"), torch.randn(6, IN, dtype=torch.float64)
    every = torch.arange(N)[:, None]
    before = net(x, every).detach()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x, torch.tensor(2)).square().sum().backward()
    optimiser.step()
    changed = (net(x, every) != before).flatten(1).any(1)
    assert changed.tolist() == [k == 2 for k in range(N)]


def test_members_have_normalisations_of_their_own():
    net = make("ensemble_mlp")
    assert isinstance(net[1], EnsembleLayerNorm)
    assert net[1].weight.shape == net[1].bias.shape == (N, CELLS)
    fresh = EnsembleMLP(IN, OUT, num_cells=[4, 6], num_subnets=N, norm_class=nn.LayerNorm, norm_kwargs=norms(4, 6))
    assert (fresh[1].weight == 1).all()
    assert (fresh[1].bias == 0).all()
    assert (fresh[1].weight.shape, fresh[4].weight.shape) == ((N, 4), (N, 6))


def norms(*sizes):
    return [{"normalized_shape": n, "eps": 1e-3} for n in sizes]


def test_dropout_of_an_ensemble_falls_differently_on_each_network():
    net = EnsembleMLP(IN, 200, num_subnets=2, activate_last_layer=True, activation_class=nn.Identity, dropout=0.5)
    dropped = net(torch.randn(1, IN), torch.tensor([[0], [1]])) == 0
    assert dropped.any()
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("kwargs", [{"single_bias_last_layer": True}, {"activation_class": nn.PReLU}])
def test_parameters_that_an_ensemble_would_share_are_refused(kwargs):
    with pytest.raises(ValueError, match="its networks would share"):
        EnsembleMLP(IN, OUT, num_cells=[7], **kwargs)


# Extraction

EXTRACTED = {
    "masked": (MaskedMLP, {"sparsity": 0.4, "generator": 0, "mask_bias": True}),
    "masked, normalised": (
        MaskedMLP,
        {"sparsity": 0.4, "generator": 0, "norm_class": nn.LayerNorm, "norm_kwargs": norms(7, 4)},
    ),
    "ensemble, normalised": (EnsembleMLP, {"norm_class": nn.LayerNorm, "norm_kwargs": norms(7, 4)}),
    "units, normalised": (UnitMaskedMLP, {"generator": 0, "norm_class": nn.LayerNorm, "norm_kwargs": norms(7, 4)}),
    "units, dropout": (UnitMaskedMLP, {"generator": 0, "dropout": 0.5, "out_features": (2, 3)}),
    "ensemble, several out_features": (EnsembleMLP, {"out_features": (2, 3)}),
    "masked, one bias": (MaskedMLP, {"sparsity": 0.4, "generator": 0, "single_bias_last_layer": True}),
    "masked, no bias": (MaskedMLP, {"sparsity": 0.4, "generator": 0, "bias_last_layer": False, "out_features": (2, 3)}),
    "masked, dropout": (MaskedMLP, {"sparsity": 0.4, "generator": 0, "dropout": 0.5}),
}


@pytest.mark.parametrize(("network_class", "kwargs"), EXTRACTED.values(), ids=EXTRACTED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_extracted_subnet_is_a_plain_mlp_equal_to_its_index(network_class, kwargs, dtype):
    net = network_class(IN, **{"out_features": OUT, **kwargs}, num_cells=[7, 4], num_subnets=N).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    x = torch.randn(6, IN, dtype=dtype)
    for k in range(N):
        plain = net.extract(k)
        assert type(plain) is MLP
        assert {type(m) for m in plain} <= {nn.Linear, nn.LayerNorm, nn.Tanh, nn.Dropout, type(net[-1])} - {MaskedLinear}
        for seed in (0, 1):
            torch.manual_seed(seed)
            output = plain(x)
            torch.manual_seed(seed)
            assert torch.equal(output, net(x, torch.tensor(k)))


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP])
def test_an_extracted_subnet_takes_several_inputs_and_knows_its_sizes(network_class):
    net = network_class(IN, OUT, num_cells=[7, 6], **({"sparsity": 0.2, "generator": 0} if network_class is MaskedMLP else {}))
    plain, x = net.extract(1), torch.randn(6, IN)
    assert torch.equal(plain(x[:, :3], x[:, 3:]), net(x, torch.tensor(1)))
    assert (plain.in_features, plain.out_features, plain.depth, plain.num_cells) == (IN, OUT, 2, [7, 6])


@each_kind
def test_an_extracted_subnet_has_parameters_of_its_own(kind):
    net, (x, _) = make(kind), draw((), (6,))
    plain, before = net.extract(1), net(x, torch.tensor(1)).detach()
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    assert not list(plain.buffers())
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert torch.equal(net(x, torch.tensor(1)), before)
    frozen = net.extract(1)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    torch.testing.assert_close(frozen(x), before, rtol=1e-12, atol=1e-12)


@each_kind
def test_extraction_leaves_the_global_generator_and_the_network_alone(kind):
    net = make(kind)
    before, state = torch.get_rng_state(), {name: v.clone() for name, v in net.state_dict().items()}
    net.extract(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[name]) for name, v in net.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_an_extracted_subnet_is_in_the_mode_of_its_network(training):
    net = MaskedMLP(IN, OUT, num_cells=[7], dropout=0.5, generator=0).train(training)
    assert all(m.training is training for m in net.extract(0).modules())


@each_kind
@pytest.mark.parametrize(("subnet", "error"), [(N, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_only_a_subnet_that_exists_can_be_extracted(kind, subnet, error):
    with pytest.raises(error, match=f"subnet must be .*got {subnet}"):
        make(kind).extract(subnet)


# Errors


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(), (6,), (3, 1)])
def test_an_index_that_is_not_int64_is_refused(kind, dtype, shape):
    with pytest.raises(TypeError, match=f"the subnet index must be an int64 tensor or an int, got {dtype}"):
        make(kind)(torch.zeros(6, IN, dtype=torch.float64), torch.zeros(shape, dtype=dtype))


@each_kind
def test_an_int_is_an_index_without_dimensions(kind):
    net, (x, _) = make(kind), draw((), (6,))
    assert torch.equal(net(x, N - 1), net(x, torch.tensor(N - 1)))
    assert net(x[0], 0).shape == (OUT,)
    for wrong in (-1, N):
        with pytest.raises(ValueError, match=rf"subnet must be in \[0, num_subnets={N}\), got {wrong}"):
            net(x, wrong)
    for wrong in (True, 1.0, None):
        with pytest.raises(TypeError, match=f"subnet must be an int64 tensor or an int, got {wrong}"):
            net(x, wrong)


@pytest.mark.parametrize("layer", [EnsembleLayerNorm(7, num_subnets=N), UnitLayerNorm(7, num_subnets=N)])
def test_an_int_is_an_index_of_a_normalisation_too(layer):
    x = torch.randn(6, 7)
    assert torch.equal(layer(x, 2), layer(x, torch.tensor(2)))
    with pytest.raises(TypeError, match=r"must be an int64 tensor or an int, got torch\.float32"):
        layer(x, torch.tensor(2.0))


@each_kind
def test_an_index_that_does_not_broadcast_against_the_batch_is_refused(kind):
    with pytest.raises(RuntimeError, match=r"mismatch|broadcast|must match"):
        make(kind)(torch.zeros(6, IN, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))


@each_kind
@pytest.mark.parametrize("subnet", [N, -1])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2,), (7,)])
def test_an_index_out_of_range_never_goes_unnoticed_on_the_cpu(kind, subnet, shape):
    batch = shape if len(shape) == 1 else (7,)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|DATA bounds|bounds)"):
        make(kind)(torch.zeros(*batch, IN, dtype=torch.float64), torch.full(shape, subnet))


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP, UnitMaskedMLP])
def test_a_forgotten_index_is_an_error_that_says_so(network_class):
    with pytest.raises(TypeError, match="takes its inputs and then the subnet index, got one argument"):
        network_class(IN, OUT)(torch.zeros(6, IN))
    with pytest.raises(TypeError, match=f"give SubnetActor the {network_class.__name__} alone, without NormalParamExtractor"):
        nn.Sequential(network_class(IN, 2 * OUT), NormalParamExtractor())(torch.zeros(6, IN))
    with pytest.raises(TypeError, match="the subnet index must be an int64 tensor or an int, got torch"):
        network_class(IN, OUT)(torch.zeros(6, 5), torch.zeros(6, 3))


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP, UnitMaskedMLP])
def test_lazy_input_features_are_refused(network_class):
    with pytest.raises(ValueError, match="in_features must be given"):
        network_class(in_features=None, out_features=OUT)


@pytest.mark.parametrize("network_class", [MaskedMLP, EnsembleMLP, UnitMaskedMLP])
@pytest.mark.parametrize(("num_subnets", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_number_of_subnets_must_be_a_positive_int(network_class, num_subnets, error):
    with pytest.raises(error, match="num_subnets must be"):
        network_class(IN, OUT, num_subnets=num_subnets)


@pytest.mark.parametrize("sparsity", [[0.5], [0.5] * 3, []])
def test_a_wrong_number_of_sparsities_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf"one per linear layer \(2\), got {len(sparsity)}"):
        MaskedMLP(IN, OUT, num_cells=[7], sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan, [0.5, 1.0]])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        MaskedMLP(IN, OUT, num_cells=[7], sparsity=sparsity, generator=0)


@pytest.mark.parametrize("network_class", [EnsembleMLP, UnitMaskedMLP])
def test_normalisations_that_cannot_be_told_apart_are_refused(network_class):
    with pytest.raises(ValueError, match=r"no other normalisation than LayerNorm, got norm_class=.*BatchNorm1d"):
        network_class(IN, OUT, num_cells=[7], norm_class=nn.BatchNorm1d, norm_kwargs={"num_features": 7})
