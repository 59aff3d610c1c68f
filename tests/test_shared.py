"""Dense networks that all tasks share: told the task, or with an output layer for each."""

import pytest
import torch
from conftest import make_batch, specs
from torch import nn
from torch.nn import functional as F

from omnet_torchrl import OMNetSACLoss, Update, make_actor, make_qvalue
from omnet_torchrl.layers import SharedMLP

T, G, B = 3, 2, 4
SIZES = {"in_features": 5, "out_features": 2, "num_cells": [8, 8]}


def plain(network, subnet, x):
    """What a network with layers of its own does, told its task by a one-hot vector where it has no heads."""
    task, own = divmod(subnet, network_count(network))
    for layer in network:
        if isinstance(layer, nn.Module) and hasattr(layer, "task"):
            if layer.task == "input":
                x = torch.cat([x, F.one_hot(torch.tensor(task), T).float().expand(*x.shape[:-1], T)], -1)
            place = subnet if layer.task == "output" else own
            x = F.linear(x, layer.weight[place], layer.bias[place])
        elif hasattr(layer, "num_networks"):
            x = F.layer_norm(x, x.shape[-1:], layer.weight[own], layer.bias[own], layer.eps)
        else:
            x = layer(x)
    return x


def network_count(network):
    return network[0].num_networks


@pytest.fixture(params=[(1, False), (1, True), (2, False), (2, True)], ids=["task", "heads", "two, task", "two, heads"])
def network(request):
    networks, heads = request.param
    options = {"num_subnets": T * networks, "num_networks": networks, "heads": heads, "activation_class": nn.ReLU}
    made = SharedMLP(**SIZES, **options, norm_class=nn.LayerNorm)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_each_subnetwork_is_a_plain_network_that_knows_its_task(network):
    x = torch.randn(B, 5)
    for k in range(network.num_subnets):
        expected = plain(network, k, x)
        for got in (network(x, k), network(x, torch.full((B,), k)), network.extract(k)(x)):
            torch.testing.assert_close(got, expected)
    every = network(x, torch.arange(network.num_subnets)[:, None])
    torch.testing.assert_close(every, torch.stack([plain(network, k, x) for k in range(network.num_subnets)]))


def test_tasks_share_all_but_their_own_part(network):
    count = network_count(network)
    network(torch.randn(B, 5), torch.tensor(1)).sum().backward()  # task 0 of the second network, or task 1 of one
    task, own = divmod(1, count)
    for layer in (each for each in network if hasattr(each, "task")):
        touched = layer.weight.grad.abs().amax((1, 2)) > 0
        assert touched.tolist() == [k == (1 if layer.task == "output" else own) for k in range(len(touched))]
        if layer.task == "input":
            assert (layer.weight.grad[own, :, 5:].abs().amax(0) > 0).tolist() == [t == task for t in range(T)]


def test_numbers_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="multiple of num_networks=2, got 3"):
        SharedMLP(**SIZES, num_subnets=3, num_networks=2)
    with pytest.raises(ValueError, match="no other normalisation than LayerNorm"):
        SharedMLP(**SIZES, num_subnets=2, norm_class=nn.BatchNorm1d)


@pytest.mark.parametrize("heads", [False, True])
def test_it_is_trained_as_pathways_are(heads):
    options = {"network_class": SharedMLP, "heads": heads, "num_cells": (16, 16)}
    actor = make_actor(*specs(), num_subnets=T, **options)
    qvalue = make_qvalue(*specs(), num_subnets=2 * T, num_networks=2, **options)
    loss = OMNetSACLoss(actor, qvalue, choose="batch")
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    update = Update(loss, lr=1e-2, compile=False)
    batch = make_batch(5, T, B).set("subnet", torch.arange(T)[:, None].expand(5, T, B))
    assert all(value.isfinite().all() for value in update(batch).values())
    same = {name for name, value in loss.state_dict().items() if torch.equal(value, before[name])}
    assert not {name for name in same if "weight" in name or "log_alpha" in name}
