"""Masks over units: a subnetwork is a smaller dense network; tests/test_layers.py holds it to the contract of the index."""

import copy

import pytest
import torch
from conftest import ACT, OBS, make_batch, specs
from tensordict import TensorDict
from test_update import actor_step, critic_step
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP

from omnet_torchrl import (
    MaskedMLP,
    OMNetSACLoss,
    UnitLayerNorm,
    UnitLinear,
    UnitMaskedMLP,
    Update,
    make_actor,
    make_qvalue,
    unit_masks,
)
from omnet_torchrl.metrics import subnet_disagreement
from omnet_torchrl.updates import compiled as compiled_module

N, IN, OUT = 5, 8, 3
NORMS = {"norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": 10}, {"normalized_shape": 6}]}
INDICES = [((), (7,)), ((1,), (7,)), ((3, 1), (7,)), ((3, 1), (3, 7)), ((7,), (7,)), ((2,), (2,)), ((4, 7), (7,))]
each_index = pytest.mark.parametrize(("index_shape", "batch"), INDICES)


def make(**kwargs):
    """8 inputs, hidden layers of 10 and 6 units of which 5 and 3 are kept, 3 outputs; normalisations that do something."""
    net = UnitMaskedMLP(IN, OUT, num_cells=[10, 6], **{"num_subnets": N, "generator": 0, **NORMS, **kwargs}).double()
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, UnitLayerNorm):
                layer.weight.normal_()
                layer.bias.normal_()
    return net


def linear(in_units=None, out_units=None, **kwargs):
    layer = UnitLinear(3, 4, num_subnets=2, in_units=in_units, out_units=out_units, **kwargs)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 13).view(4, 3))
        if layer.bias is not None:
            layer.bias.copy_(torch.tensor([100.0, 200, 300, 400]))
    return layer


IN_UNITS, OUT_UNITS = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1, 3], [0, 1]])


# Numbers


def test_a_linear_layer_between_units_of_literal_numbers():
    layer, x = linear(IN_UNITS, OUT_UNITS), torch.tensor([[1.0, 10.0]])
    # Rows of the weight: 1 2 3, 4 5 6, 7 8 9, 10 11 12.
    assert layer(x, torch.tensor(0)).tolist() == [[4 + 60 + 200, 10 + 120 + 400]]
    assert layer(x, torch.tensor(1)).tolist() == [[2 + 30 + 100, 5 + 60 + 200]]
    layer(x, torch.tensor(1)).sum().backward()
    assert layer.weight.grad.tolist() == [[0, 1, 10], [0, 1, 10], [0, 0, 0], [0, 0, 0]]
    assert layer.bias.grad.tolist() == [1, 1, 0, 0]


def test_a_linear_layer_can_keep_all_inputs_or_all_outputs():
    x, wide = torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 10.0, 100.0]])
    assert linear(out_units=OUT_UNITS)(wide, torch.tensor(1)).tolist() == [[321 + 100, 654 + 200]]
    assert linear(in_units=IN_UNITS)(x, torch.tensor(0)).tolist() == [[31 + 100, 64 + 200, 97 + 300, 130 + 400]]
    assert linear(in_units=IN_UNITS, bias=False)(x, torch.tensor(0)).tolist() == [[31, 64, 97, 130]]
    for index in (torch.tensor(1), torch.tensor([[0], [1]])):
        layer = linear()
        assert torch.equal(layer(wide, index), F.linear(wide, layer.weight, layer.bias).expand(*index.shape[:1], 1, 4))


def test_a_gradient_adds_up_where_subnets_share_a_weight():
    layer, x = linear(IN_UNITS, OUT_UNITS), torch.tensor([[1.0, 10.0]])
    layer(x, torch.tensor([[0], [1]])).sum().backward()
    # Subnet 0 keeps rows 1 and 3 of columns 0 and 2, subnet 1 rows 0 and 1 of columns 1 and 2.
    assert layer.weight.grad.tolist() == [[0, 1, 10], [1, 1, 20], [0, 0, 0], [1, 0, 10]]
    assert layer.bias.grad.tolist() == [1, 2, 0, 1]


def test_a_layer_norm_over_kept_units_of_literal_numbers():
    layer = UnitLayerNorm(3, eps=0.0, num_subnets=2, units=IN_UNITS)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3, 5]))
        layer.bias.copy_(torch.tensor([10.0, 20, 30]))
    x = torch.tensor([[4.0, 2.0]])
    assert layer(x, torch.tensor(0)).tolist() == [[12, 25]]
    assert layer(x, torch.tensor([[0], [1]])).tolist() == [[[12, 25]], [[23, 25]]]


# What a subnetwork is


@pytest.mark.parametrize("k", range(N))
def test_a_subnet_without_normalisation_is_the_network_under_masks_of_outer_products(k):
    units = UnitMaskedMLP(IN, OUT, num_cells=[10, 6], num_subnets=N, generator=0)
    weights = MaskedMLP(IN, OUT, num_cells=[10, 6], num_subnets=N, mask_bias=True, sparsity=0.0)
    weights.load_state_dict(units.state_dict(), strict=False)
    before = torch.ones(IN, dtype=torch.bool)
    for i in (0, 2):
        kept = torch.zeros(weights[i].out_features, dtype=torch.bool).index_fill(0, units[i].out_units[k], True)
        weights[i].masks[k], weights[i].bias_masks[k] = torch.outer(kept, before), kept
        before = kept  # tanh(0) = 0: a unit without weights and bias is silent
    weights[4].masks[k] = before.expand(OUT, -1)
    x = torch.randn(7, IN)
    torch.testing.assert_close(units(x, torch.tensor(k)), weights(x, torch.tensor(k)))


@pytest.mark.parametrize("kwargs", [{}, {"norm_class": None, "norm_kwargs": None}, {"sparsity": [0.0, 0.8]}, {"dropout": 0.5}])
def test_an_extracted_subnet_is_a_smaller_mlp_bit_for_bit(kwargs):
    net, x = make(**kwargs), torch.randn(7, IN, dtype=torch.float64)
    for k in range(N):
        plain = net.extract(k)
        assert type(plain) is MLP
        assert plain.num_cells == ([10, 1] if "sparsity" in kwargs else [5, 3])
        assert [(m.in_features, m.out_features) for m in plain if isinstance(m, nn.Linear)][1] == tuple(plain.num_cells)
        torch.manual_seed(1)
        output = plain(x)
        torch.manual_seed(1)
        assert torch.equal(output, net(x, torch.tensor(k)))


def test_an_extracted_subnet_has_as_many_weights_as_it_computes_with():
    count = sum(p.numel() for p in make().extract(0).parameters())
    assert count == (8 * 5 + 5) + 2 * 5 + (5 * 3 + 3) + 2 * 3 + (3 * 3 + 3)


def test_linear_layers_and_their_normalisation_keep_the_same_units_and_layers_and_subnets_others():
    net = make(num_subnets=20)
    assert [tuple(net[i].out_units.shape) for i in (0, 3)] == [(20, 5), (20, 3)]
    for linear_layer, norm, following in ((net[0], net[1], net[3]), (net[3], net[4], net[6])):
        assert torch.equal(linear_layer.out_units, norm.units)
        assert torch.equal(linear_layer.out_units, following.in_units)
        assert len(linear_layer.out_units.unique(dim=0)) > 10
    assert net[0].in_units is None
    assert net[6].out_units is None


def test_units_come_from_the_generator_layer_after_layer():
    generator = torch.Generator().manual_seed(0)
    masks = [unit_masks(N, n, 0.5, generator=generator) for n in (10, 6)]
    for i, mask in zip((0, 3), masks, strict=True):
        assert torch.equal(make()[i].out_units, mask.nonzero()[:, 1].view(N, -1))


def test_units_do_not_disturb_initial_weights():
    networks = []
    for network_class, kwargs in ((MLP, {}), (UnitMaskedMLP, {}), (UnitMaskedMLP, {"generator": 1, "sparsity": 0.2})):
        torch.manual_seed(3)
        networks.append(network_class(IN, OUT, num_cells=[10, 6], **kwargs))
        networks[-1].following = torch.rand(3)
    for net in networks[1:]:
        assert torch.equal(net.following, networks[0].following)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), networks[0].parameters(), strict=True))


def test_an_activated_output_is_normalised_as_a_whole():
    norms = [*NORMS["norm_kwargs"], {"normalized_shape": OUT}]
    net = make(activate_last_layer=True, norm_kwargs=norms)
    x = torch.randn(7, IN, dtype=torch.float64)
    assert net[7].units is None
    assert torch.equal(net.extract(2)(x), net(x, torch.tensor(2)))
    torch.testing.assert_close(net(x, torch.tensor([[2], [0]]))[0], net(x, torch.tensor(2)))


# What trains


@each_index
def test_gradient_is_zero_at_the_weights_of_inactive_units(index_shape, batch):
    net, subnet = make(), torch.randint(2, index_shape)
    net(torch.randn(*batch, IN, dtype=torch.float64), subnet).square().sum().backward()
    drawn = subnet.unique()
    for layer in (net[0], net[3], net[6]):
        kept = torch.zeros_like(layer.weight, dtype=torch.bool)
        for k in drawn:
            rows = torch.arange(layer.out_features) if layer.out_units is None else layer.out_units[k]
            columns = torch.arange(layer.in_features) if layer.in_units is None else layer.in_units[k]
            kept[rows[:, None], columns] = True
        assert torch.equal(layer.weight.grad != 0, kept)
        assert torch.equal(layer.bias.grad != 0, kept.any(1))
    for layer in (net[1], net[4]):
        kept = torch.zeros_like(layer.weight, dtype=torch.bool).index_fill(0, layer.units[drawn].flatten(), True)
        assert torch.equal(layer.weight.grad != 0, kept)
        assert torch.equal(layer.bias.grad != 0, kept)


@each_index
def test_gradients_are_those_of_finite_differences(index_shape, batch):
    net, subnet = make(), torch.randint(N, index_shape)
    x = torch.randn(*batch, IN, dtype=torch.float64, requires_grad=True)
    params = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}

    def call(x, *values):
        return torch.func.functional_call(net, dict(zip(params, values, strict=True)), (x, subnet))

    assert torch.autograd.gradcheck(call, (x, *params.values()), fast_mode=True)


@each_index
def test_vmap_over_gradients_equals_a_loop(index_shape, batch):
    net, subnet, x = make(), torch.randint(N, index_shape), torch.randn(*batch, IN, dtype=torch.float64)
    params = {name: torch.randn(4, *p.shape, dtype=p.dtype) for name, p in net.named_parameters()}
    gradient = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x, subnet)).square().sum())
    stacked = torch.vmap(gradient)(params)
    for i in range(4):
        expected = gradient({name: p[i] for name, p in params.items()})
        torch.testing.assert_close({name: p[i] for name, p in stacked.items()}, expected, rtol=1e-10, atol=1e-10)


# State


def test_units_are_buffers_that_survive_moves_resets_and_optimisers():
    net = make()
    units = {name: b.clone() for name, b in net.named_buffers()}
    assert set(units) == {"0.out_units", "1.units", "3.in_units", "3.out_units", "4.units", "6.in_units"}
    assert set(net.state_dict()) == {*units, *(name for name, _ in net.named_parameters())}
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    net(torch.randn(7, IN, dtype=torch.float64), torch.tensor(0)).sum().backward()
    optimiser.step()
    for module in net.float().double().modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert {b.dtype for b in net.buffers()} == {torch.int64}
    assert all(torch.equal(b, units[name]) for name, b in net.named_buffers())
    assert len({b.data_ptr() for b in net.buffers()}) == len(units)


def test_other_units_are_loaded_and_nothing_of_the_former_is_left():
    net, other, x = make(), make(generator=1), torch.randn(7, IN, dtype=torch.float64)
    assert not torch.equal(other[0].out_units, net[0].out_units)
    other.load_state_dict(net.state_dict())
    for subnet in (torch.tensor(2), torch.tensor([[1], [4]]), torch.arange(7) % N):
        output, expected = other(x, subnet), net(x, subnet)
        assert torch.equal(output, expected)
        grads = [torch.autograd.grad(y.square().sum(), list(n.parameters())) for y, n in ((output, other), (expected, net))]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert torch.equal(other.extract(3)(x), net(x, torch.tensor(3)))


def test_a_copy_has_units_of_its_own():
    net, x = make(), torch.randn(7, IN, dtype=torch.float64)
    clone = copy.deepcopy(net)
    clone.load_state_dict(make(generator=1).state_dict())
    before = net(x, torch.tensor(1))
    clone[0].out_units.zero_()
    assert torch.equal(net(x, torch.tensor(1)), before)
    assert all(getattr(net, name) is None for name in ("layer_kwargs", "norm_kwargs"))


# Loss and update


def small(make_network, **kwargs):
    kwargs = {"num_subnets": 3, "num_cells": (16, 16), "generator": 1, **kwargs}
    return make_network(*specs(), network_class=UnitMaskedMLP, **kwargs)


def make_update(compile=False, generator=1):
    torch.manual_seed(0)
    actor, qvalue = small(make_actor, generator=generator), small(make_qvalue, generator=generator)
    loss = OMNetSACLoss(actor, qvalue)
    optims = Adam(qvalue.parameters(), lr=1e-2), Adam([*actor.parameters(), loss.log_alpha], lr=1e-2)
    return Update(loss, optims, tau=0.1, compile=compile)


def train(update, count):
    output = {}
    for i in range(count):
        batch = make_batch(8, seed=i, done=0.3)
        draws = update.loss.draw(batch, generator=torch.Generator().manual_seed(i))
        output |= critic_step(update, batch, draws)
        if i % 2:
            output |= actor_step(update, batch, draws)
    return {name: value.clone() for name, value in output.items()}


def test_actor_and_critic_extract_smaller_networks_that_answer_the_same():
    actor, qvalue, td = small(make_actor), small(make_qvalue), TensorDict(observation=torch.randn(7, OBS))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for k in range(3):
            action = actor(td.copy().set("subnet", torch.tensor(k)))["action"]
            assert torch.equal(actor.extract(k)(td.copy())["action"], action)
            asked = TensorDict(observation=td["observation"], action=torch.randn(7, ACT), subnet=torch.tensor(k))
            value = qvalue(asked.copy())["state_action_value"]
            assert torch.equal(qvalue.extract(k)(asked.exclude("subnet"))["state_action_value"], value)
    assert sum(p.numel() for p in qvalue.extract(0).parameters()) == (7 * 8 + 8) + 16 + (8 * 8 + 8) + 16 + 9


def test_the_target_has_the_units_of_the_online_network():
    loss = make_update().loss
    other = small(make_qvalue, generator=2)
    batch = make_batch(8)
    draws = loss.draw(batch)
    before = loss.compute_target(batch, draws=draws)
    for key, value in loss.qvalue_network_params.items(True, True):
        if not value.is_floating_point():
            value.copy_(dict(other.named_buffers())[".".join(key)])
    changed = loss.compute_target(batch, draws=draws)
    assert not torch.equal(changed, before)
    for value in loss.target_qvalue_network_params.values(True, True):
        if not value.is_floating_point():
            value.zero_()
    assert torch.equal(loss.compute_target(batch, draws=draws), changed)


def test_an_update_moves_only_units_that_it_drew_and_never_which_they_are():
    update = make_update()
    params = update.loss.qvalue_network_params
    before = {key: value.clone() for key, value in params.items(True, True)}
    for i in range(4):
        batch = make_batch(8, seed=i)
        critic_step(update, batch, update.loss.draw(batch).set("critic", torch.tensor([1])))
    moved = torch.zeros(16, 16, dtype=torch.bool)
    moved[before["module", "3", "out_units"][1][:, None], before["module", "3", "in_units"][1]] = True
    changed = params["module", "3", "weight"] != before["module", "3", "weight"]
    assert not changed[~moved].any()
    assert changed[moved].float().mean() > 0.9
    assert all(torch.equal(v, before[key]) for key, v in params.items(True, True) if not v.is_floating_point())


def test_disagreement_of_subnets_is_seen():
    update = make_update()
    seen = subnet_disagreement(update.loss, make_batch(8))
    assert seen["subnets/q_std"] > 0
    assert seen["subnets/action_distance"] > 0


@pytest.mark.parametrize("translated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "compiled"])
def test_compiled_and_eager_updates_agree_and_take_over_other_units(translated, monkeypatch):
    if not translated:
        monkeypatch.setattr(compiled_module, "translate", lambda graph, inputs: graph)
    eager, compiled = make_update(), make_update(compile=True)
    outputs = train(eager, 20), train(compiled, 20)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    other = make_update(generator=2)
    compiled.load_state_dict(other.state_dict())
    outputs = train(other, 10), train(compiled, 10)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.state_dict()["loss"], other.state_dict()["loss"], rtol=1e-4, atol=1e-4)


# Errors


@pytest.mark.parametrize("sparsity", [[0.5], [0.5] * 3, []])
def test_a_wrong_number_of_sparsities_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf"one per hidden layer \(2\), got {len(sparsity)}"):
        make(sparsity=sparsity)


@pytest.mark.parametrize(
    ("sparsity", "error"), [(1.0, ValueError), (-0.1, ValueError), ([0.5, 1.0], ValueError), ("h", TypeError)]
)
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity, error):
    with pytest.raises(error, match=r"sparsity.* in \[0, 1\)"):
        make(sparsity=sparsity)


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        (unit_masks(2, 3, 0.5, generator=0), TypeError, r"out_units must be an int64 tensor .*got torch.bool; see .*nonzero"),
        ([[0], [1]], TypeError, "out_units must be an int64 tensor .*got list"),
        (torch.tensor([0, 1]), ValueError, r"shape \(num_subnets=2, 1 to 4 units\), got \(2,\)"),
        (torch.tensor([[0], [1], [2]]), ValueError, r"got \(3, 1\)"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"got \(2, 0\)"),
        (torch.arange(5).expand(2, 5), ValueError, r"got \(2, 5\)"),
        (torch.tensor([[0, 1], [3, 4]]), ValueError, r"out_units must be in \[0, 4\), .*got \[\[0, 1\], \[3, 4\]\]"),
        (torch.tensor([[0, 1], [-1, 2]]), ValueError, r"must be in \[0, 4\)"),
        (torch.tensor([[0, 1], [2, 2]]), ValueError, "none twice in each row"),
        (torch.tensor([[0, 1], [2, 1]]), ValueError, "ascending"),
    ],
)
def test_units_that_do_not_fit_are_refused(units, error, message):
    with pytest.raises(error, match=message):
        UnitLinear(3, 4, num_subnets=2, out_units=units)
