"""Tasks side by side: TasksEnv, the names of tasks, HalfCheetah's gaits, and Meta-World where it is installed."""

import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import Compose, DoubleToFloat, RewardScaling, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from omnet_torchrl import SubnetPrimer
from omnet_torchrl.envs import TasksEnv, make_half_cheetah, make_task, task_names
from omnet_torchrl.envs.suites import MT10, half_cheetah_reward
from omnet_torchrl.training.loop.border import Border
from omnet_torchrl.training.loop.generators import OwnGlobals
from omnet_torchrl.training.loop.resumption import collection_state, load_collection


class Count(gymnasium.Env):
    """Counts its steps up to ``length``; the reward is the task's number, the start the seed."""

    def __init__(self, number=1, length=3, success_at=None, action=(2,), bound=1.0, observation=(2,)):
        self.number, self.length, self.success_at, self.seeds, self.closed = number, length, success_at, [], False
        self.observation_space = Box(-np.inf, np.inf, observation, np.float64)
        self.action_space = Box(-bound, bound, action, np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.steps = 0
        return self._seen(), {}

    def _seen(self):
        return np.array([self.number, self.steps], dtype=np.float64)

    def step(self, action):
        self.steps += 1
        self.action = np.array(action)
        done = self.steps == self.length
        return (
            self._seen(),
            self.number,
            done and self.number % 2,
            done and not self.number % 2,
            {"success": float(self.steps == self.success_at)},
        )

    def close(self):
        self.closed = True


def test_specs_and_partial_resets():
    envs = [Count(1, 2), Count(2, 3), Count(3, 5)]
    env = TasksEnv(envs)
    check_env_specs(env)
    env.set_seed(7)
    data = env.rollout(6, break_when_any_done=False)
    assert [each.seeds[-4:].count(7 + i) for i, each in enumerate(envs)] == [1, 1, 1]  # seeded once, at the next reset
    following = data["next"]
    assert following["observation"][..., 1].tolist() == [[1, 2, 1, 2, 1, 2], [1, 2, 3, 1, 2, 3], [1, 2, 3, 4, 5, 1]]
    assert data["observation"][..., 1].tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]]
    assert following["reward"].squeeze(-1).tolist() == [[t] * 6 for t in (1, 2, 3)]
    assert following["terminated"].sum(1).flatten().tolist() == [3, 0, 1]
    assert following["truncated"].sum(1).flatten().tolist() == [0, 2, 0]
    assert torch.equal(following["done"], following["terminated"] | following["truncated"])


def test_actions_reach_their_environment_and_what_was_returned_stays():
    envs = [Count(1), Count(2)]
    env = TasksEnv(envs)
    state = env.reset()
    action = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    first = env.step(state.set("action", action))["next"]
    kept = first.clone()
    assert np.allclose([each.action for each in envs], action)
    env.step(state.set("action", action))
    assert (first == kept).all()


def test_what_waits_for_others_is_not_stepped():
    envs = [Count(1), Count(2)]
    env = TasksEnv(envs)
    state = env.reset().set("action", torch.zeros(2, 2))
    env.step(state.set("_step", torch.tensor([True, False])))
    assert [each.steps for each in envs] == [1, 0]


def test_success_is_of_the_episode_so_far():
    env = TasksEnv([Count(1, 4, success_at=2), Count(2, 4)], success=True)
    check_env_specs(env)
    success = env.rollout(8, break_when_any_done=False)["next", "success"].squeeze(-1)
    assert success.tolist() == [[False, True, True, True] * 2, [False] * 8]


def test_each_environment_plays_its_own_subnetwork_and_has_its_own_episodes():
    env = TransformedEnv(
        TasksEnv([Count(1, 2), Count(2, 3)]),
        Compose(
            RewardSum(),
            StepCounter(),
            SubnetPrimer(2, fixed=torch.arange(2)),
            RewardScaling(0.0, torch.tensor([[10.0], [1.0]])),
        ),
    )
    data = env.rollout(6, break_when_any_done=False)
    assert data["subnet"].tolist() == [[0] * 6, [1] * 6]
    assert data["next", "episode_reward"].squeeze(-1).tolist() == [[1, 2] * 3, [2, 4, 6] * 2]
    assert data["next", "reward"].squeeze(-1).tolist() == [[10] * 6, [2] * 6]  # returns are not scaled
    collector = Collector(env, frames_per_batch=4, total_frames=8)
    assert [each["next", "step_count"].flatten().tolist() for each in collector] == [[1, 2, 1, 2], [1, 2, 3, 1]]
    collector.shutdown()


def test_closing_closes_all():
    envs = [Count(1), Count(2)]
    TasksEnv(envs).close()
    assert all(each.closed for each in envs)


@pytest.mark.parametrize(
    ("envs", "names", "message"),
    [
        ([], None, "at least two, got none"),
        ([Count()], ["run"], "at least two, got 'run' alone: train a single task as an environment without tasks"),
        ([Count(), Count()], ["run"], "one for each of 2 environments, got 1"),
        ([Count(), Count(observation=(3,))], ["a", "b"], "observation of 'a' is 2 numbers, that of 'b' is 3 numbers"),
        ([Count(), Count(action=(3,))], ["a", "b"], r"action of 'a' is 2 numbers in \[-1\] to \[1\], that of 'b' is 3 numbers"),
        ([Count(), Count(bound=2.0)], ["a", "b"], r"action of 'a' is .* to \[1\], that of 'b' is .* to \[2\]"),
        ([Count(), Count(observation=(2, 2))], ["a", "b"], "must be vectors, .* from 'b'"),
        ([SimpleNamespace(observation_space=Box(0, 1, (2,)), action_space=Discrete(2)), Count()], ["a", "b"], "vectors, .*'a'"),
    ],
)
def test_tasks_that_do_not_fit_together_are_refused(envs, names, message):
    with pytest.raises(ValueError, match=message):
        TasksEnv(envs, names)


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("Hopper-v4", ["Hopper-v4"]),
        ("MinAtar/breakout", ["MinAtar/breakout"]),
        ("HalfCheetah/forward+backward", ["HalfCheetah/forward", "HalfCheetah/backward"]),
        ("HalfCheetah/forward+HalfCheetah/jump", ["HalfCheetah/forward", "HalfCheetah/jump"]),
        ("Hopper-v4+my_module:Hopper-v4", ["Hopper-v4", "my_module:Hopper-v4"]),
        ("Meta-World/reach-v3+push-v3", ["Meta-World/reach-v3", "Meta-World/push-v3"]),
        ("Meta-World/MT10", [f"Meta-World/{name}" for name in MT10]),
    ],
)
def test_a_name_says_its_tasks(name, tasks):
    assert list(task_names(name)) == tasks


@pytest.mark.parametrize(("name", "got"), [("a+a", "'a' twice"), ("a+", "an empty name")])
def test_names_of_tasks_are_checked(name, got):
    with pytest.raises(ValueError, match=got):
        task_names(name)


@pytest.mark.parametrize(
    ("task", "reward"),
    [
        ("forward", 4.0 - 0.5),
        ("backward", -4.0 - 0.5),
        ("velocity_1.5", -2.5 - 0.5),
        ("velocity_5", -1.0 - 0.5),
        ("jump", 15 * 0.2 - 0.5),
        ("forward_jump", 3.0 + 15 * 0.2 - 0.5),
        ("backward_jump", -4.0 + 15 * 0.2 - 0.5),
    ],
)
def test_rewards_of_half_cheetahs_tasks(task, reward):
    assert half_cheetah_reward(task, 4.0, 0.2, 0.5) == pytest.approx(reward)


def test_half_cheetah_forward_is_gymnasiums_own_and_backward_its_mirror():
    envs = [gymnasium.make("HalfCheetah-v5"), make_half_cheetah("forward"), make_task("HalfCheetah/backward")]
    for env in envs:
        env.reset(seed=3)
    for _ in range(5):
        action = envs[0].action_space.sample()
        (own, forward, backward) = [env.step(action) for env in envs]
        assert np.array_equal(own[0], backward[0])
        assert forward[1] == pytest.approx(own[1])
        assert backward[1] == pytest.approx(own[1] - 2 * own[4]["x_velocity"])
    for env in envs:
        env.close()


@pytest.mark.parametrize("task", ["forwards", "velocity_fast", "velocity_inf", ""])
def test_unknown_gaits_are_said_with_the_closest(task):
    with pytest.raises(ValueError, match=f"must be forward, .* got '{task}'; the closest is"):
        make_half_cheetah(task)


def test_what_meta_world_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'omnet-torchrl\[metaworld\]'"):
        make_task("Meta-World/reach-v3")
    monkeypatch.setitem(sys.modules, "metaworld", SimpleNamespace())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.17.0")
    with pytest.raises(ImportError, match=r"mujoco==3.3.0, got mujoco==3.17.0: pip install"):
        make_task("Meta-World/reach-v3")


@pytest.mark.filterwarnings("ignore")  # theirs
def test_meta_worlds_tasks_side_by_side():
    pytest.importorskip("metaworld")
    names = task_names("Meta-World/reach-v3+push-v3")
    env = TasksEnv([make_task(name, max_episode_steps=20) for name in names], names, success=True)
    check_env_specs(env)
    data = env.rollout(40, break_when_any_done=False)
    assert data["next", "truncated"].sum(1).flatten().tolist() == [2, 2]
    assert torch.equal(data["observation"][:, 0, -3:], data["observation"][:, 20, -3:])  # the goal is fixed
    several = make_task("Meta-World/reach-v3", num_goals=5)
    several.reset(seed=0)
    assert len({tuple(several.reset()[0][-3:]) for _ in range(20)}) > 1
    with pytest.raises(ValueError, match="closest is 'reach-v3'"):
        make_task("Meta-World/reach-v2")
    with pytest.raises(ValueError, match=r"num_goals must be in \[1, 50\], got 51"):
        make_task("Meta-World/reach-v3", num_goals=51)


def test_a_reset_takes_a_seed():
    env = TasksEnv([gymnasium.make("Pendulum-v1") for _ in range(2)])
    first, again, other = (env.reset(seed=seed)["observation"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(env.reset()["observation"], first)
    env.close()


def test_tasks_that_rest_succeed_no_more():
    envs = [Border(Count(1, 4, success_at=2), OwnGlobals(0)), Border(Count(2, 4, success_at=1), OwnGlobals(0))]
    env = TasksEnv(envs, success=True)
    env.set_seed(0)
    state = env.reset()
    for rests in (False, True):
        envs[0].resting = rests
        step = env.step(state.set("action", torch.zeros(2, 2)))
        state = step["next"].exclude("reward")
    assert step["next", "success"].flatten().tolist() == [False, True]


def test_success_goes_on_with_the_episodes():
    def make():
        env = TasksEnv([Border(Count(1, 9, success_at=2), OwnGlobals(0)), Border(Count(2, 9), OwnGlobals(0))], success=True)
        policy = TensorDictModule(torch.nn.Linear(2, 2), ["observation"], ["action"])
        env = TransformedEnv(env, Compose(DoubleToFloat(), SubnetPrimer(2, fixed=torch.arange(2))))
        env.set_seed(0)
        options = {"auto_register_policy_transforms": False, "track_traj_ids": False}
        return Collector(env, policy, frames_per_batch=2, total_frames=40, **options)

    whole, parts = make(), make()
    going, seen = iter(whole), []
    for _ in range(4):
        next(going)
    load_collection(parts, {**collection_state(whole), "frames": 8})
    for collector in (going, iter(parts)):
        seen.append([next(collector)["next", "success"].flatten().tolist() for _ in range(3)])
    assert seen[0] == seen[1] == [[True, False]] * 3
