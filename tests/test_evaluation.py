"""Evaluation: deterministic episodes, counted once, and nothing else disturbed."""

from functools import partial

import pytest
import torch
from torchrl.envs import ParallelEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type

from omnet_torchrl import CompiledPolicy, OMNetSACLoss, make_actor, make_qvalue
from omnet_torchrl.training import Evaluation, evaluate, make_env
from omnet_torchrl.training.build import build
from omnet_torchrl.training.loop.environments import MAZE, recorders
from omnet_torchrl.training.loop.evaluation import evaluate_bias
from omnet_torchrl.training.options import to_config


def make(name, episodes, num_subnets=3):
    env = make_env(name, num_envs=episodes)
    actor = make_actor(
        env.observation_spec, env.action_spec, num_subnets=num_subnets, sparsity=0.2, num_cells=(16, 16), generator=1
    )
    return env, actor


def by_hand(name, actor, seed):
    """Return and length of one episode of a plain subnetwork in an environment of its own."""
    env = make_env(name)
    env.set_seed(seed)
    state, total, length = env.reset(), 0.0, 0
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        while True:
            state = env.step(actor(state))["next"]
            total, length = total + state["reward"].item(), length + 1
            if state["done"].item():
                return total, length


@pytest.mark.parametrize("name", ["InvertedPendulum-v4", "Hopper-v4"])
def test_returns_and_lengths_are_those_of_a_loop_by_hand(name):
    episodes = 5
    env, actor = make(name, episodes)
    result = evaluate(actor, env, seed=11)
    hand = [by_hand(name, actor.extract(e % 3), seed=11 + e) for e in range(episodes)]
    totals, lengths = map(torch.tensor, zip(*hand, strict=True))
    assert len(lengths.unique()) > 1, "all episodes end together: what comes after 'done' is not seen"
    assert result["eval/length"] == lengths.float().mean().item()
    torch.testing.assert_close(result["eval/return"], totals.mean().item())
    for k in range(3):
        torch.testing.assert_close(result[f"eval/return_subnet_{k}"], totals[k::3].mean().item())
    assert set(result) == {"eval/return", "eval/length", *(f"eval/return_subnet_{k}" for k in range(3))}


def test_the_episode_after_the_end_does_not_count():
    env, actor = make("InvertedPendulum-v4", 4)
    with torch.no_grad():  # falls over at once, in one environment later than in the other
        actor.module[0].network[-1].bias[0] = 5.0
    result = evaluate(actor, env, seed=0)
    assert result["eval/return"] == pytest.approx(result["eval/length"], abs=1.01)  # one per step
    assert result["eval/length"] < 30


def test_who_has_finished_takes_no_more_steps_and_all_are_awake_afterwards(monkeypatch):
    env, actor = make("Hopper-v4", 5)
    simulated, simulator = [], type(recorders(env)[0].unwrapped)
    step = simulator.step
    monkeypatch.setattr(simulator, "step", lambda self, action: simulated.append(self) or step(self, action))
    result = evaluate(actor, env, seed=11)
    assert len(simulated) == round(5 * result["eval/length"])
    state = env.reset()
    assert (env.rand_step(state)["next", "observation"] != state["observation"]).all()
    divisors = iter([1] * 30 + [0])
    monkeypatch.setattr(actor, "forward", lambda state: state.set("action", torch.zeros(5, 3) / (1 // next(divisors))))
    with pytest.raises(ZeroDivisionError):  # in the middle of an evaluation
        evaluate(actor, env, seed=11)
    assert not any(recorder.resting for recorder in recorders(env))


@pytest.mark.parametrize("kind", [SerialEnv, ParallelEnv])
def test_environments_of_other_kinds_are_evaluated_too(kind):
    _, actor = make("InvertedPendulum-v4", 2)
    env = kind(2, partial(make_env, "InvertedPendulum-v4"))
    try:
        result = evaluate(actor, env, seed=0)
        assert result["eval/return"] == pytest.approx(result["eval/length"], abs=1.01)
    finally:
        env.close()


def test_one_seed_repeats_itself_whatever_was_played_before():
    env, actor = make("InvertedPendulum-v4", 3)
    first = evaluate(actor, env, seed=5)
    other = evaluate(actor, env, seed=6)
    assert evaluate(actor, env, seed=5) == first
    assert first != other
    assert evaluate(actor, make("InvertedPendulum-v4", 3)[0], seed=5) == first


def test_without_a_seed_the_start_states_go_on():
    env, actor = make("InvertedPendulum-v4", 3)
    first = evaluate(actor, env, seed=5)
    assert evaluate(actor, env) != first


@pytest.mark.parametrize("training", [True, False])
def test_the_actor_its_mode_the_exploration_and_the_random_numbers_are_left_alone(training):
    env, actor = make("InvertedPendulum-v4", 3)
    actor.train(training)
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    numbers = torch.get_rng_state()
    with set_exploration_type(ExplorationType.RANDOM):
        evaluate(actor, env, seed=5)
        assert exploration_type() is ExplorationType.RANDOM
    assert torch.equal(torch.get_rng_state(), numbers)
    assert actor.training is training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in actor.parameters())
    assert all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())


@pytest.mark.parametrize("episodes", [1, 2, 4])
def test_subnetworks_that_play_no_episode_are_left_out(episodes):
    env, actor = make("InvertedPendulum-v4", episodes)
    names = {name for name in evaluate(actor, env, seed=0) if "subnet" in name}
    assert names == {f"eval/return_subnet_{k}" for k in range(min(episodes, 3))}


def test_the_newest_weights_play():
    env, actor = make("InvertedPendulum-v4", 2)
    before = evaluate(actor, env, seed=0)
    with torch.no_grad():
        actor.module[0].network[-1].bias[0] += 2.0
    assert evaluate(actor, env, seed=0) != before


def test_a_run_evaluates_the_compiled_policy(monkeypatch):
    config = to_config(
        {"env": "InvertedPendulum-v4", "network": {"num_cells": [16, 16], "sparsity": 0.2}, "eval": {"episodes": 4}}
    )
    env = make_env(config.env)
    parts = build(config, env.observation_spec, env.action_spec)
    policy = CompiledPolicy(parts.actor)
    plain, compiled = (Evaluation(config, each, parts.loss) for each in (parts.actor, policy))
    assert compiled(1_000) == plain(1_000)  # not prepared: the actor's own actions
    plain.prepare()
    compiled.prepare()
    expected = plain(1_000)
    monkeypatch.setattr(parts.actor, "forward", lambda *_: pytest.fail("the actor was asked"))
    assert compiled(1_000) == pytest.approx(expected, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Hopper-v4", MAZE])
def test_an_actor_on_a_gpu_plays_in_environments_of_the_cpu(name):
    env, actor = make(name, 5)
    result = evaluate(actor.to("cuda"), env, seed=11)
    assert {f"eval/return_subnet_{k}" for k in range(3)} < set(result)
    qvalue = make_qvalue(env.observation_spec, env.action_spec, num_cells=(16, 16), device="cuda")
    assert evaluate_bias(OMNetSACLoss(actor, qvalue), env)["bias/pairs"] > 0
