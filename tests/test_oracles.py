"""Equivalences that cross rooms: the loss against TorchRL's SACLoss, and against the paper's equations in plain torch."""

import copy
import math
import warnings

import pytest
import torch
from conftest import ACT, make_batch, small_actor, small_qvalue, specs
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.objectives import SACLoss, SoftUpdate

from omnet_torchrl import EnsembleMLP, OMNetSACLoss, make_actor, make_qvalue

GAMMA, TAU = 0.9, 0.1


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sac_loss(actor, qvalues, **kwargs):
    # A list of one network leaves SACLoss without critic parameters to train; a single one it draws anew, so they are put back.
    weights = TensorDict.from_modules(*qvalues).data.clone()
    networks = qvalues if len(qvalues) > 1 else qvalues[0]
    loss = SACLoss(actor, networks, num_qvalue_nets=len(qvalues), deactivate_vmap=True, **kwargs)
    updater = SoftUpdate(loss, tau=TAU)
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        params.data.update_(weights)
    loss.make_value_estimator(gamma=GAMMA)
    return loss, updater


def omnet_loss(actor, qvalue, **kwargs):
    loss = OMNetSACLoss(actor, qvalue, **kwargs)
    loss.make_value_estimator(gamma=GAMMA)
    return loss, SoftUpdate(loss, tau=TAU)


def steps(loss, updater, num=4):
    """Losses and priorities of several optimiser steps, each on a batch of its own."""
    optim, history = torch.optim.Adam(loss.parameters(), lr=1e-2), []
    for i in range(num):
        batch = make_batch(32, seed=i, done=0.2)
        torch.manual_seed(100 + i)  # SACLoss takes its noise from the global generator
        output = loss(batch)
        optim.zero_grad()
        sum(output[key] for key in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
        optim.step()
        updater.step()
        history.append([*(output[key].item() for key in sorted(output.keys())), *batch["td_error"].tolist()])
    return torch.tensor(history)


def one_subnet():
    actor, qvalue = small_actor(1, 0.0), small_qvalue(1, 0.0)
    return actor.extract(0), [qvalue.extract(0)], actor, qvalue


@pytest.mark.parametrize("loss_function", ["l2", "smooth_l1"])
def test_one_dense_subnet_is_sac_with_one_critic_exactly_over_several_steps(loss_function):
    plain_actor, plain_qvalues, actor, qvalue = one_subnet()
    expected = steps(*sac_loss(plain_actor, plain_qvalues, loss_function=loss_function))
    actual = steps(*omnet_loss(actor, qvalue, num_target_subnets=1, loss_function=loss_function))
    assert torch.equal(actual, expected)


def test_two_separate_critics_are_sac_and_only_the_actor_takes_the_mean():
    qvalue = make_qvalue(*specs(), network_class=EnsembleMLP, num_subnets=2, num_cells=(16, 16))
    actor = small_actor(1, 0.0)
    plain = [qvalue.extract(k) for k in range(2)]
    everything = {"num_trained_subnets": None, "num_target_subnets": None}
    sac, _ = sac_loss(copy.deepcopy(actor.extract(0)), plain, loss_function="l2")
    mean, _ = omnet_loss(actor, qvalue, **everything)
    least, _ = omnet_loss(actor, qvalue, **everything, value_reduction="min")
    batch = make_batch(32, done=0.2)
    outputs = []
    for loss in (sac, mean, least):
        torch.manual_seed(7)
        outputs.append((loss(batch), batch["td_error"]))
    for output, td_error in outputs[1:]:
        torch.testing.assert_close(output["loss_qvalue"], outputs[0][0]["loss_qvalue"])
        torch.testing.assert_close(td_error, outputs[0][1])
    torch.testing.assert_close(outputs[2][0], outputs[0][0])

    # The mean, written out: SAC's own actor loss for each critic alone, averaged.
    alone = []
    for k in range(2):
        single, _ = sac_loss(actor.extract(0), [qvalue.extract(k)])
        torch.manual_seed(7)
        torch.randn(batch["action"].shape)  # the noise of the next action, which the critic's loss took
        alone.append(single.actor_loss(batch)[0])
    torch.testing.assert_close(outputs[1][0]["loss_actor"], torch.stack(alone).mean())


def test_two_separate_critics_train_as_sac_over_several_steps():
    qvalue = make_qvalue(*specs(), network_class=EnsembleMLP, num_subnets=2, num_cells=(16, 16))
    actor = small_actor(1, 0.0)
    expected = steps(*sac_loss(actor.extract(0), [qvalue.extract(k) for k in range(2)], loss_function="l2"))
    actual = steps(*omnet_loss(actor, qvalue, num_trained_subnets=None, num_target_subnets=None, value_reduction="min"))
    torch.testing.assert_close(actual, expected)


def test_two_masked_views_have_the_target_and_the_critic_losses_of_sac_on_those_views():
    actor, qvalue = small_actor(1, 0.0), small_qvalue(2, 0.5)
    sac, _ = sac_loss(actor.extract(0), [qvalue.extract(k) for k in range(2)], loss_function="l2")
    omnet, _ = omnet_loss(actor, qvalue)
    batch = make_batch(32, done=0.2)
    draws = omnet.draw(batch)
    torch.manual_seed(3)
    expected = sac(batch)["loss_qvalue"]
    torch.manual_seed(3)
    draws["next_noise"] = torch.randn(batch["action"].shape)
    each = []
    for k in range(2):
        draws["critic"], draws["target"] = torch.tensor([k]), torch.tensor([1, 0])
        loss, data = omnet.qvalue_loss(batch, draws=draws)
        each.append(loss)
        torch.manual_seed(3)
        torch.testing.assert_close(data["target_value"], sac._compute_target_v2(batch))
    torch.testing.assert_close(sum(each), expected)


# The paper's equations 4 and 5 in plain torch, from its text alone ------------------------------------------------------


def masked_mlp(params, masks, k, x):
    """Linear, LayerNorm, ReLU twice, then Linear, with theta * m_k for every weight matrix."""
    (w1, b1, g1, c1), (w2, b2, g2, c2), (w3, b3) = params
    for w, b, g, c, m in ((w1, b1, g1, c1, masks[0]), (w2, b2, g2, c2, masks[1])):
        x = x @ (w * m[k]).T + b
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = (x * g + c).clamp(min=0)
    return x @ (w3 * masks[2][k]).T + b3


def policy(params, masks, k, state, noise, low, high):
    """A tanh-squashed Gaussian action within [low, high] and its log-probability, by change of variables."""
    mean, log_std = masked_mlp(params, masks, k, state).chunk(2, -1)
    std = log_std.clamp(-20, 2).exp()
    u = mean + std * noise
    log_prob = -0.5 * noise**2 - std.log() - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u)) - torch.log((high - low) / 2)
    return low + (high - low) * (torch.tanh(u) + 1) / 2, log_prob.sum(-1)


def leaves(network):
    layers = [layer for layer in network if any(True for _ in layer.parameters())]
    tensors = [[p.detach().clone().requires_grad_() for p in layer.parameters()] for layer in layers]
    params = [(*tensors[0], *tensors[1]), (*tensors[2], *tensors[3]), tuple(tensors[4])]
    return params, [layer.masks for layer in layers if hasattr(layer, "masks")]


@pytest.mark.parametrize("seed", range(8))
def test_losses_and_gradients_are_those_of_the_papers_equations(seed):
    random = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=random))

    num, num_actor, batch_size = pick(2, 6), pick(1, 6), pick(1, 20)
    sparsity, cells, alpha = 0.8 * float(torch.rand((), generator=random)), (pick(8, 20), pick(8, 20)), 0.3
    obs, act = specs()
    act = act.clone()
    act.space.low, act.space.high = torch.full((ACT,), -0.4), torch.tensor([0.4, 1.5])
    kwargs = {"num_cells": cells, "sparsity": sparsity, "generator": seed}
    with warnings.catch_warnings():  # units without inputs are part of the draw here
        warnings.simplefilter("ignore")
        actor = make_actor(obs, act, num_subnets=num_actor, **kwargs)
        qvalue = make_qvalue(obs, act, num_subnets=num, **kwargs)
    loss, updater = omnet_loss(actor, qvalue, alpha_init=alpha)
    with torch.no_grad():  # the target network differs from the online one
        for p in qvalue.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=random))
    updater.step()
    batch = make_batch(batch_size, seed=seed, done=0.3)
    draws = loss.draw(batch, random)
    output = loss(batch, draws=draws)
    output["loss_qvalue"].backward()
    output["loss_actor"].backward()
    output["loss_alpha"].backward()

    phi, actor_masks = leaves(actor.module[0].network)
    theta, masks = leaves(qvalue.module)
    held = loss.target_qvalue_network_params["module"]
    weights = [(held[str(i)]["weight"], held[str(i)]["bias"]) for i in (0, 1, 3, 4, 6)]
    target = [(*weights[0], *weights[1]), (*weights[2], *weights[3]), weights[4]]
    low, high = act.space.low, act.space.high

    def critic(params, k, s, a):
        return masked_mlp(params, masks, k, torch.cat([s, a], -1)).squeeze(-1)

    i, (j1, j2) = int(draws["critic"]), draws["target"].tolist()
    following = batch["next"]
    with torch.no_grad():
        a, log_prob = policy(
            phi, actor_masks, int(draws["next_actor"]), following["observation"], draws["next_noise"], low, high
        )
        lesser = torch.minimum(*(critic(target, j, following["observation"], a) for j in (j1, j2)))
        going_on = (~following["terminated"]).double().squeeze(-1)
        y = following["reward"].squeeze(-1) + GAMMA * going_on * (lesser - alpha * log_prob)
    error = y - critic(theta, i, batch["observation"], batch["action"])
    loss_qvalue = (error**2).mean()
    a, log_prob = policy(phi, actor_masks, int(draws["actor"]), batch["observation"], draws["noise"], low, high)
    frozen = [tuple(p.detach() for p in layer) for layer in theta]
    mean_q = sum(critic(frozen, k, batch["observation"], a) for k in range(num)) / num
    loss_actor = (alpha * log_prob - mean_q).mean()
    log_alpha = torch.tensor(math.log(alpha), requires_grad=True)
    loss_alpha = (-log_alpha * (log_prob.detach() - ACT)).mean()
    (loss_qvalue + loss_actor + loss_alpha).backward()

    torch.testing.assert_close(output["loss_qvalue"], loss_qvalue)
    torch.testing.assert_close(output["loss_actor"], loss_actor)
    torch.testing.assert_close(output["loss_alpha"], loss_alpha)
    torch.testing.assert_close(batch["td_error"], error.abs())
    torch.testing.assert_close(loss.log_alpha.grad, log_alpha.grad)
    for network, params in ((qvalue, theta), (actor, phi)):
        expected = [p.grad for layer in params for p in layer]
        actual = [p.grad for p in network.parameters()]
        assert len(actual) == len(expected) == 10
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
