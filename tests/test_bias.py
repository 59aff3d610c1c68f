"""Value bias of a run's critic: against returns that are known, and against episodes that are played again by hand."""

import pytest
import torch
from conftest import small_actor, small_qvalue
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_transforms import CountingEnv
from torch import nn
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.objectives import SoftUpdate

from omnet_torchrl import EnsembleMLP, Maze2DEnv, OMNetSACLoss, make_actor, make_qvalue
from omnet_torchrl.training.loop.evaluation import evaluate_bias
from omnet_torchrl.training.loop.stopping import DivergenceError

LENGTHS = (2, 3, 5)


class Constants(nn.Module):
    """A critic of two subnetworks that say 5 and 7, whatever is asked."""

    num_subnets = 2

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.tensor([5.0, 7.0]))

    def forward(self, observation, action, subnet):
        return self.values[subnet].expand(torch.broadcast_shapes(subnet.shape, observation.shape[:-1])).unsqueeze(-1)


def make_loss(actor=None, qvalue=None, alpha=0.0):
    module = TensorDictModule(Constants(), in_keys=["observation", "action", "subnet"], out_keys=["state_action_value"])
    loss = OMNetSACLoss(small_actor() if actor is None else actor, module if qvalue is None else qvalue)
    SoftUpdate(loss, tau=0.005)  # without an updater the loss warns
    loss.log_alpha.data.fill_(alpha).log_()
    return loss


def expected(returns):
    """Of a critic that says 5 and 7."""
    returns = torch.tensor(returns)
    return {
        "bias/mean": (6 - returns).mean(),
        "bias/std": returns.std(correction=0),
        "bias/normalised_mean": (6 - returns).mean() / returns.mean().abs(),
        "bias/normalised_std": returns.std(correction=0) / returns.mean().abs(),
        "bias/min_mean": (5 - returns).mean(),
        "bias/min_std": returns.std(correction=0),
        "bias/return": returns.mean(),
        "bias/pairs": len(returns),
    }


def test_a_reward_that_is_not_finite_is_named_and_the_critic_is_left_as_it_was(monkeypatch):
    def broken(self, state, step=CountingEnv._step):
        out = step(self, state)
        out["reward"][1] = torch.nan
        return out

    monkeypatch.setattr(CountingEnv, "_step", broken)
    loss = make_loss()
    with pytest.raises(DivergenceError, match=r"reward of environment 1 is not finite at step 1 of an .* bias: \[nan\]"):
        evaluate_bias(loss, CountingEnv(LENGTHS))
    assert loss.qvalue_network.training


def test_returns_of_terminal_episodes_are_the_discounted_rewards():
    # A reward of 1 each step: one pair with n steps to go is worth 1, 1.5, 1.75, 1.875, 1.9375 for n from 1 on.
    bias = evaluate_bias(make_loss(), CountingEnv(LENGTHS), gamma=0.5)
    worth = [1.5, 1.0, 1.75, 1.5, 1.0, 1.9375, 1.875, 1.75, 1.5, 1.0]
    assert bias == pytest.approx({name: float(value) for name, value in expected(worth).items()})


def test_only_the_first_steps_of_an_episode_count():
    bias = evaluate_bias(make_loss(), CountingEnv(LENGTHS), gamma=0.5, first_steps=2)
    worth = [1.5, 1.0, 1.75, 1.5, 1.9375, 1.875]
    assert bias == pytest.approx({name: float(value) for name, value in expected(worth).items()})


@pytest.mark.parametrize(("bootstrap", "worth"), [(True, [3.0, 4.0]), (False, [1.5, 1.0])])
def test_a_truncated_episode_is_bootstrapped_with_the_critic_or_cut(bootstrap, worth):
    # Cut after 2 steps: the last one is worth 1 + 0.5 * 6 with the critic's mean of 6, or 1.
    env = TransformedEnv(CountingEnv((100,)), StepCounter(2))
    bias = evaluate_bias(make_loss(), env, gamma=0.5, bootstrap=bootstrap)
    assert bias["bias/return"] == pytest.approx(sum(worth) / 2)
    assert bias["bias/mean"] == pytest.approx(6 - sum(worth) / 2)


def test_it_equals_the_episodes_played_again_by_hand():
    specs = Maze2DEnv().observation_spec, Maze2DEnv().action_spec
    kwargs = {"num_subnets": 2, "sparsity": [0.0, 0.5], "num_cells": (16,)}
    loss = make_loss(make_actor(*specs, **kwargs, generator=0), make_qvalue(*specs, **kwargs, generator=1), alpha=0.3)
    with torch.no_grad():
        bias = evaluate_bias(loss, Maze2DEnv(2, max_steps=6), gamma=0.9, seed=3)
        generator, env = torch.Generator().manual_seed(3), Maze2DEnv(2, max_steps=6)
        state, log_probs, values = env.reset(), [], []
        for _ in range(7):
            noise = torch.randn(2, 2, generator=generator)
            rows = []
            for k in range(2):  # subnetwork k of the actor plays environment k
                base = loss.actor_network.extract(k).get_dist(state[k]).base_dist.base_dist
                pre = base.loc + base.scale * noise[k]
                action = 0.2 * pre.tanh()
                # The density of the squashed action: tanh and the scale of 0.2 are both its derivative's.
                log_prob = base.log_prob(pre).sum() - (0.2 * (1 - pre.tanh() ** 2)).log().sum()
                td = TensorDict(observation=state["observation"][k], action=action)
                rows.append((action, log_prob, [loss.qvalue_network.extract(j)(td)["state_action_value"] for j in range(2)]))
            log_probs.append(torch.stack([row[1] for row in rows]))
            values.append(torch.tensor([row[2] for row in rows]))
            state = env.step(state.set("action", torch.stack([row[0] for row in rows])))["next"]
    following, off, low = values[6].mean(-1) - 0.3 * log_probs[6], [], []
    for t in reversed(range(6)):
        returns = 0.9 * following  # nobody is at the goal within 6 steps: no reward
        off.append(values[t].mean(-1) - returns)
        low.append(values[t].amin(-1) - returns)
        following = returns - 0.3 * log_probs[t]
    assert bias["bias/pairs"] == 12
    assert bias["bias/mean"] == pytest.approx(float(torch.stack(off).mean()), abs=1e-5)
    assert bias["bias/std"] == pytest.approx(float(torch.stack(off).std(correction=0)), abs=1e-5)
    assert bias["bias/min_mean"] == pytest.approx(float(torch.stack(low).mean()), abs=1e-5)


def test_a_seed_repeats_it_and_neither_the_loss_nor_the_global_generator_changes():
    loss, env = make_loss(qvalue=small_qvalue(), alpha=0.1), CountingEnv(LENGTHS)
    before, random = {k: v.clone() for k, v in loss.state_dict().items()}, torch.get_rng_state()
    first = evaluate_bias(loss, env, seed=1)
    assert evaluate_bias(loss, env, seed=1) == first
    assert evaluate_bias(loss, env, seed=2) != first
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_a_dense_actor_plays_every_episode():
    bias = evaluate_bias(make_loss(small_actor(1, 0.0)), CountingEnv(LENGTHS), gamma=0.5)
    assert bias["bias/pairs"] == 10


def test_the_bias_of_a_critic_with_dropout_is_without_its_noise():
    env = Maze2DEnv(2, max_steps=5)
    qvalue = make_qvalue(env.observation_spec, env.action_spec, network_class=EnsembleMLP, num_cells=(16, 16), dropout=0.5)
    actor = make_actor(env.observation_spec, env.action_spec, num_subnets=2, sparsity=0.0, num_cells=(16, 16))
    loss = make_loss(actor, qvalue, alpha=0.1)
    noisy = evaluate_bias(loss, env, seed=3)
    assert loss.qvalue_network.training
    qvalue.eval()
    assert evaluate_bias(loss, env, seed=3) == noisy
    assert not loss.qvalue_network.training
