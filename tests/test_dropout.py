"""Dropout whose noise is a function of a seed."""

import pytest
import torch
from conftest import make_batch, small_actor, small_qvalue, specs
from torch import nn
from torchrl.objectives import SoftUpdate

from omnet_torchrl import EnsembleMLP, OMNetSACLoss, SeededDropout, make_qvalue
from omnet_torchrl.layers import seed_dropout
from omnet_torchrl.masks import random_bits


def ensemble(p=0.5):
    return make_qvalue(*specs(), network_class=EnsembleMLP, num_subnets=2, num_cells=(16, 16), dropout=p)


def make_loss(**kwargs):
    loss = OMNetSACLoss(small_actor(), ensemble(), num_trained_subnets=None, **kwargs)
    SoftUpdate(loss, tau=0.1)
    return loss


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_elements_are_zeroed_with_probability_p_and_the_others_scaled(p):
    layer = SeededDropout(p)
    layer.dropout_seed.fill_(5)
    output = layer(torch.full((200, 500), 3.0))
    dropped = output == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 1e5) ** 0.5)
    torch.testing.assert_close(output[~dropped], torch.full_like(output[~dropped], 3 / (1 - p)))


def test_everything_is_dropped_with_probability_one_and_nothing_in_evaluation():
    layer, input = SeededDropout(1.0), torch.randn(4, 5)
    assert torch.equal(layer(input), torch.zeros(4, 5))
    assert layer.eval()(input) is input


def test_it_is_a_function_of_seed_and_stream_and_takes_no_random_number():
    input, state = torch.ones(1000), torch.get_rng_state()
    layers = [SeededDropout(0.5), SeededDropout(0.5), SeededDropout(0.5, stream=1), SeededDropout(0.5)]
    layers[3].dropout_seed.fill_(1)
    first, same, stream, seed = (layer(input) for layer in layers)
    assert torch.equal(first, same)
    for other in (stream, seed):
        assert 400 < int((first != other).sum()) < 600
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gradient_of_what_is_dropped_is_zero():
    input = torch.randn(100, requires_grad=True)
    output = SeededDropout(0.25)(input)
    output.sum().backward()
    torch.testing.assert_close(input.grad, (output != 0).float() / 0.75)


def test_each_element_of_each_network_has_noise_of_its_own():
    qvalue = ensemble()
    seed_dropout(qvalue)
    layer = qvalue.module[1]
    assert type(layer) is SeededDropout
    kept = layer(torch.ones(2, 32, 16)) != 0
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(kept, (random_bits(torch.tensor(0), 2 * 32 * 16, 0) >= 2**31).view(2, 32, 16))


def test_each_layer_gets_a_stream_of_its_own_in_the_mode_that_it_had():
    network = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2)), nn.Dropout(0.3).eval())
    seed_dropout(network)
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert [type(layer) for layer in layers] == [SeededDropout] * 3
    assert sorted(layer.stream for layer in layers) == [0, 1, 2]
    assert [layer.p for layer in layers] == [0.1, 0.2, 0.3]
    assert [layer.training for layer in layers] == [True, True, False]


def test_one_that_is_in_several_places_becomes_one_for_each():
    shared = nn.Dropout(0.5)
    network = nn.Sequential(nn.Linear(8, 8), shared, nn.ReLU(), shared)
    seed_dropout(network)
    assert [type(network[i]) for i in (1, 3)] == [SeededDropout] * 2
    assert [network[i].stream for i in (1, 3)] == [0, 1]
    assert torch.equal(network(torch.ones(4, 8)), network(torch.ones(4, 8)))


def test_other_kinds_of_dropout_are_left_with_a_warning():
    network = nn.Sequential(nn.Linear(8, 8), nn.AlphaDropout(0.5), nn.Dropout1d(0.1))
    with pytest.warns(UserWarning, match="AlphaDropout, Dropout1d draws from torch's global generator"):
        seed_dropout(network)
    assert type(network[1]) is nn.AlphaDropout
    seed_dropout(nn.Sequential(nn.AlphaDropout(0.0)))  # does nothing


def test_what_is_extracted_has_plain_dropout():
    loss = make_loss()
    plain = loss.qvalue_network.extract(1).module
    assert [type(layer) for layer in plain if isinstance(layer, nn.Dropout)] == [nn.Dropout] * 2


# In a loss


def test_a_loss_draws_a_seed_for_each_pass_where_there_is_dropout():
    batch = make_batch(8)
    draws = make_loss().draw(batch, num_updates=3)
    assert draws["dropout"].shape == (3, 5)
    assert draws["dropout"].unique().numel() == 15
    assert "dropout" not in OMNetSACLoss(small_actor(), small_qvalue()).draw(batch)


def test_the_losses_are_functions_of_the_draws():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    state = torch.get_rng_state()
    first, second = loss(batch, draws=draws), loss(batch, draws=draws)
    assert torch.equal(torch.get_rng_state(), state)
    for key in first.keys():
        assert torch.equal(first[key], second[key])
    for i, changes in enumerate(({"loss_qvalue"}, {"loss_qvalue"}, {"loss_actor"})):
        other = draws.clone()
        other["dropout"][i] += 1
        third = loss(batch, draws=other)
        assert {key for key in first.keys() if not torch.equal(first[key], third[key])} == changes


def test_the_target_has_noise_of_its_own_even_while_it_equals_the_critic():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    values = [
        loss.value(batch, batch["action"], draws["critic"], params=params, seed=draws["dropout"][i])
        for i, params in enumerate((loss.qvalue_network_params, loss.target_qvalue_network_params))
    ]
    assert not torch.equal(*values)
    draws["dropout"][1] = draws["dropout"][0]
    values = [
        loss.value(batch, batch["action"], draws["critic"], params=params, seed=draws["dropout"][i])
        for i, params in enumerate((loss.qvalue_network_params, loss.target_qvalue_network_params))
    ]
    assert torch.equal(*values)
