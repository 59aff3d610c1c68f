"""Masks that are a function of their index, of which there are 2^31."""

import pytest
import torch
from conftest import make_batch, specs
from scipy import stats
from torch import nn
from torchrl.envs import GymEnv, TransformedEnv, check_env_specs
from torchrl.objectives import SoftUpdate

from omnet_torchrl import MaskedMLP, OMNetSACLoss, RedrawnMLP, SubnetPrimer, hashed_masks, make_actor, make_qvalue
from omnet_torchrl.masks import mask_density, mask_iou, random_bits

KEY = torch.tensor(12345)


def lowbias32(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize(("seed", "key"), [(0, 0), (1, 0), (2**31 - 1, 7), (2**32 - 1, 2**32 - 1)])
def test_the_bits_are_those_of_the_hash_in_python_integers(seed, key):
    start = lowbias32(lowbias32(seed) ^ key)
    assert random_bits(torch.tensor(seed), 50, key).tolist() == [lowbias32((start + i) % 2**32) for i in range(50)]


def test_the_bits_are_uniform_and_those_of_neighbouring_seeds_are_independent():
    bits = random_bits(torch.arange(16), 2**14)
    assert stats.kstest(bits.flatten().double() / 2**32, "uniform").pvalue > 1e-3
    ones = torch.stack([(bits >> i) & 1 for i in range(32)]).double().mean((1, 2))
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 2**9
    correlation = torch.corrcoef(bits.double())
    assert correlation.fill_diagonal_(0).abs().max() < 5 / 2**7
    assert bits.unique().numel() > 0.99995 * bits.numel()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_masks_are_bernoulli_and_independent(sparsity):
    index = torch.tensor([0, 1, 2, 2**31 - 1])
    masks = hashed_masks(index, (128, 100), sparsity, KEY)
    other = hashed_masks(index, (128, 100), sparsity, KEY + 1)
    assert masks.shape == (4, 128, 100)
    deviation = (sparsity * (1 - sparsity) / 12_800) ** 0.5
    assert (mask_density(masks) - (1 - sparsity)).abs().max() <= 5 * deviation
    overlap = mask_iou(torch.cat([masks, other])).fill_diagonal_((1 - sparsity) / (1 + sparsity))
    assert (overlap - (1 - sparsity) / (1 + sparsity)).abs().max() < 0.05


def test_the_same_index_brings_a_mask_back():
    both = hashed_masks(torch.tensor([3, 9, 3]), (8, 5), 0.5, KEY)
    assert torch.equal(both[0], both[2])
    assert torch.equal(hashed_masks(torch.tensor([9]), (8, 5), 0.5, KEY)[0], both[1])


def test_a_network_under_an_index_is_the_masked_network_of_that_mask():
    net = RedrawnMLP(
        5, 2, num_cells=[16, 8], generator=0, norm_class=nn.LayerNorm, norm_kwargs=[{"normalized_shape": n} for n in (16, 8)]
    )
    index, x = torch.tensor([7, 2_000_000_000]), torch.randn(6, 5)
    like = MaskedMLP(
        5,
        2,
        num_cells=[16, 8],
        num_subnets=2,
        sparsity=0.0,
        norm_class=nn.LayerNorm,
        norm_kwargs=[{"normalized_shape": n} for n in (16, 8)],
    )
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("key")}
    masks = {f"{i}.masks": hashed_masks(index, net[i].weight.shape, 0.5, net[i].key) for i in (0, 3, 6)}
    like.load_state_dict({**state, **masks})
    torch.testing.assert_close(net(x, index[:, None]), like(x, torch.arange(2)[:, None]))
    torch.testing.assert_close(net(x, index.repeat(3)), like(x, torch.arange(2).repeat(3)))
    torch.testing.assert_close(net.extract(7)(x), net(x, index[:1]))
    assert len({int(net[i].key) for i in (0, 3, 6)}) == 3


def test_keys_are_in_the_state_and_stay_when_weights_are_drawn_anew():
    net = RedrawnMLP(5, 2, num_cells=[16], generator=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert "0.key" in before
    for layer in (net[0], net[2]):
        layer.reset_parameters()
    assert torch.equal(net[0].key, before["0.key"])
    assert not torch.equal(net[0].weight, before["0.weight"])


def test_a_loss_draws_new_masks_at_each_call_and_an_episode_keeps_its_own():
    kwargs = {"network_class": RedrawnMLP, "num_cells": (16, 16), "generator": 0}
    actor, qvalue = make_actor(*specs(), **kwargs), make_qvalue(*specs(), **kwargs)
    loss = OMNetSACLoss(actor, qvalue, num_value_subnets=5, replacement=True)
    SoftUpdate(loss, tau=0.1)
    draws = loss.draw(make_batch(4), num_updates=20)
    assert {name: draws[name].shape[1:] for name in ("critic", "target", "value")} == {
        "critic": (1,),
        "target": (2,),
        "value": (5,),
    }
    assert torch.cat([draws["critic"], draws["target"], draws["value"]], 1).unique().numel() == 160
    assert loss(make_batch(4), draws=draws[0])["loss_qvalue"].isfinite()

    env = TransformedEnv(GymEnv("Pendulum-v1"), SubnetPrimer(actor.num_subnets, generator=0))
    check_env_specs(env)
    indices = [env.rollout(5)["subnet"] for _ in range(3)]
    assert all(index.unique().numel() == 1 for index in indices)
    assert torch.stack(indices).unique().numel() == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_value_subnets": 5}, "num_target_subnets must not be 2 of 2147483648 different subnetworks: give a number, and"),
        ({"num_target_subnets": 1}, "num_value_subnets must not be all of 2147483648"),
        ({"replacement": True}, "num_value_subnets must not be all of 2147483648"),
    ],
)
def test_a_loss_that_would_ask_or_order_all_of_them_is_refused(options, message):
    kwargs = {"network_class": RedrawnMLP, "num_cells": (16, 16), "generator": 0}
    with pytest.raises(ValueError, match=message):
        OMNetSACLoss(make_actor(*specs(), **kwargs), make_qvalue(*specs(), **kwargs), **options)
