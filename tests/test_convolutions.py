"""Convolutions under masks, and networks for images: every index against the plain convolutions, and DQN on images."""

import copy

import pytest
import torch
from tensordict import TensorDict
from test_update import compiler  # noqa: F401
from torch import nn
from torchrl.data import Binary, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl import (
    CompiledPolicy,
    EnsembleLinear,
    IndexedSequential,
    MaskedConv2d,
    MaskedLinear,
    MaskedMLP,
    OMNetDQNLoss,
    SubnetQValueActor,
    Update,
)
from omnet_torchrl.grids import make_grid_qvalue_actor
from omnet_torchrl.masks import bernoulli_masks

N, C, SIZE = 3, 4, 6


def conv(**kwargs):
    options = {"stride": 2, "padding": 1, **kwargs}
    return MaskedConv2d(C, 5, 3, masks=bernoulli_masks(N, (5, C, 3, 3), 0.5, generator=0), **options)


def network():
    head = MaskedLinear(5 * 3 * 3, 2, masks=bernoulli_masks(N, (2, 45), 0.5, generator=1))
    return IndexedSequential(conv(), nn.ReLU(), nn.Flatten(-3), head)


INDICES = {
    "one": (torch.tensor(1), (7,)),
    "one, with its dimension": (torch.tensor([2]), (7,)),
    "one for two dimensions of the batch": (torch.tensor([[2]]), (4, 3)),
    "one without a batch": (torch.tensor(0), ()),
    "rows of the same images": (torch.tensor([[0], [2]]), (7,)),
    "rows, one of them twice": (torch.tensor([[1], [1], [0], [2]]), (7,)),
    "rows of their own images": (torch.tensor([[0], [2]]), (2, 7)),
    "rows of two dimensions": (torch.tensor([[[0]], [[2]]]), (3, 4)),
    "each image": (torch.tensor([0, 1, 2, 0, 1, 2, 2]), (7,)),
    "each of few images": (torch.tensor([2, 0]), (2,)),
    "each image by rows": (torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]]), (4,)),
    "many of no batch": (torch.tensor([0, 1, 2, 1, 1]), ()),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("make", [conv, lambda: conv(bias=False), network], ids=["layer", "without bias", "network"])
def test_every_index_asks_the_plain_networks(name, make):
    module, (subnet, batch) = make(), INDICES[name]
    images = torch.randn(*batch, C, SIZE, SIZE, requires_grad=True)
    output = module(images, subnet)
    plain = [module.extract(k) for k in range(N)]
    whole = torch.broadcast_shapes(subnet.shape, batch)
    each = images.expand(*whole, C, SIZE, SIZE).reshape(-1, C, SIZE, SIZE)
    rows = zip(subnet.expand(whole).reshape(-1).tolist(), each.unbind(0), strict=True)
    expected = torch.stack([plain[k](image.unsqueeze(0)).squeeze(0) for k, image in rows])
    torch.testing.assert_close(output, expected.reshape(*whole, *expected.shape[1:]))
    weight = torch.randn_like(output)
    one, other = (torch.autograd.grad((y * weight.reshape(y.shape)).sum(), [images])[0] for y in (output, expected))
    torch.testing.assert_close(one, other)


def test_the_gradient_is_zero_outside_the_mask():
    layer = conv()
    layer(torch.randn(7, C, SIZE, SIZE), torch.tensor([[0], [2]])).square().sum().backward()
    kept = layer.masks[0] | layer.masks[2]
    assert not layer.weight.grad[~kept].any()
    assert layer.weight.grad[kept].all()


def test_dense_and_single_it_is_a_convolution_whose_images_may_be_boolean():
    torch.manual_seed(0)
    layer = MaskedConv2d(C, 5, 3, masks=torch.ones(1, 5, C, 3, 3, dtype=torch.bool))
    torch.manual_seed(0)
    plain, images = nn.Conv2d(C, 5, 3), torch.rand(7, C, SIZE, SIZE) < 0.5
    assert torch.equal(layer(images, 0), plain(images.float()))
    assert "num_subnets=1" in repr(layer)


def test_masks_are_live_and_survive_a_reset_and_a_copy():
    layer, images = conv(init_fn=nn.init.ones_), torch.randn(7, C, SIZE, SIZE)
    masks = layer.masks.clone()
    layer.reset_parameters()
    assert layer.weight.eq(1).all()
    assert not layer.bias.any()
    assert torch.equal(copy.deepcopy(layer).masks, masks)
    assert "masks" in layer.state_dict()
    layer.masks.copy_(masks.roll(1, 0))
    torch.testing.assert_close(layer(images, 0), layer.extract(0)(images))
    assert torch.equal(layer.masks[1], masks[0])


def dqn(compile):
    torch.manual_seed(0)
    loss = OMNetDQNLoss(SubnetQValueActor(network(), OneHot(2)))
    return Update(loss, lr=1e-2, tau=1.0, target_update_interval=2, compile=compile)


def image_batch(*batch):
    generator = torch.Generator().manual_seed(0)

    def images():
        return torch.rand(*batch, C, SIZE, SIZE, generator=generator) < 0.3

    action = nn.functional.one_hot(torch.randint(2, batch, generator=generator), 2)
    end = torch.rand(*batch, 1, generator=generator) < 0.2
    following = {"observation": images(), "reward": torch.randn(*batch, 1, generator=generator)}
    return TensorDict(
        {"observation": images(), "action": action, "next": {**following, "done": end, "terminated": end.clone()}}, batch
    )


def test_dqn_trains_on_images_eagerly_and_traced_alike(compiler):  # noqa: F811
    updates = [dqn(compile) for compile in (False, True)]
    metrics = [
        [float(update(image_batch(3, 8), generator=torch.Generator().manual_seed(i))["loss"]) for i in range(12)]
        for update in updates
    ]
    assert metrics[0] == metrics[1]
    assert sum(metrics[0][-3:]) < sum(metrics[0][:3])


@pytest.mark.slow
def test_dqn_trains_on_images_compiled():
    updates = [dqn(compile) for compile in (False, True)]
    for update in updates:
        for i in range(3):
            update(image_batch(3, 8), generator=torch.Generator().manual_seed(i))
    for name, value in updates[0].loss.state_dict().items():
        torch.testing.assert_close(updates[1].loss.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_policies_of_images_act_by_subnetwork_and_by_the_mean():
    actor, td = SubnetQValueActor(network(), OneHot(2)), image_batch(9).select("observation")
    alone = torch.stack([actor.extract(k)(td.clone().float())["action_value"] for k in range(N)])
    subnet = torch.arange(9) % N
    torch.testing.assert_close(actor(td.clone().set("subnet", subnet))["action_value"], alone[subnet, torch.arange(9)])
    torch.testing.assert_close(actor.mean_policy()(td.clone())["action_value"], alone.mean(0))


def test_mistakes_are_refused_where_they_enter():
    with pytest.raises(ValueError, match=r"masks must have shape \(num_subnets, 5, 4, 3, 3\)"):
        MaskedConv2d(C, 5, 3, masks=torch.ones(2, 5, C, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="masks must be a boolean tensor"):
        MaskedConv2d(C, 5, 3, masks=torch.ones(2, 5, C, 3, 3))
    with pytest.raises(ValueError, match="has no groups"):
        conv(groups=2)
    with pytest.raises(TypeError, match="int64"):
        conv()(torch.zeros(1, C, SIZE, SIZE), torch.zeros(1))
    with pytest.raises(ValueError, match=r"one number of subnetworks, got \[2, 3\]"):
        IndexedSequential(conv(), EnsembleLinear(3, 3, num_subnets=2))
    with pytest.raises(ValueError, match="one number of subnetworks, got none"):
        IndexedSequential(nn.ReLU())
    assert IndexedSequential(conv(), nn.Flatten(-3), MaskedMLP(45, 2, num_subnets=N, num_cells=[4])).num_subnets == N


@pytest.mark.parametrize("games", [(), (1,), (3,)])
def test_a_compiled_policy_of_a_grid_answers_as_the_network(games):
    """Of one image too, whose order of dimensions tells nothing."""
    spec = Binary(shape=(*games, 10, 10, 4), dtype=torch.bool)
    actor = make_grid_qvalue_actor(spec, OneHot(3), channels=4, num_cells=(8,), num_subnets=2, sparsity=0.3, generator=0)
    batch = TensorDict(observation=spec.rand(), subnet=torch.ones(games, dtype=torch.int64), batch_size=games)
    policy = CompiledPolicy(actor)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        policy.prepare(batch)
        assert len(policy._code) == 1
        assert torch.equal(policy(batch.clone())["action"], actor(batch.clone())["action"])
