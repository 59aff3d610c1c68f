"""Environments as their authors write them: each gives the numbers of a plain rollout, or one line that says why not."""

import random

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from omnet_torchrl.training import make_env
from omnet_torchrl.training.loop.environments import check_env, recorders

NAME, STEPS = "Foreign-v0", 40


class Cart(gymnasium.Env):
    """A point on a line that is pushed, and blown about by the wind. An episode ends at 1, or after ``length`` steps."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)
    length = 12

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed(seed)
        self.state, self.steps = self.draw(2), 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        push = np.array(action, np.float64)
        self.state = self.state + np.array([self.state[1], push[0]]) / 4 + 0.1 * self.draw(2)
        end = abs(self.state[0]) > 1
        return self.observe(), self.reward(-float(np.abs(self.state).sum())), bool(end), self.steps >= self.length, {}

    def seed(self, seed):
        """Of generators beside gymnasium's."""

    def draw(self, count):
        return self.np_random.uniform(-0.5, 0.5, count)

    def observe(self):
        return self.state.astype(np.float32)

    def reward(self, value):
        return value


@pytest.fixture(autouse=True)
def _registry():
    before = dict(gymnasium.registry)
    yield
    for name in gymnasium.registry.keys() - before.keys():
        del gymnasium.registry[name]


def named(kind, **kwargs):
    gymnasium.registry.pop(NAME, None)
    gymnasium.register(NAME, kind, kwargs=kwargs, disable_env_checker=True)
    return NAME


def some_actions(count=STEPS, *, num_envs=None, seed=0):
    shape = (count, 1) if num_envs is None else (count, num_envs, 1)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def plain(make, actions, seed):
    """What a loop over gymnasium's own interface sees, copied at once: arrays of each transition's parts."""
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    torch.manual_seed(seed)
    env, steps = make(), []
    env.reset(seed=seed)  # as a run does: one reset seeds, another one begins the first episode
    observation = np.array(env.reset()[0], np.float32)
    for action in actions:
        following, reward, terminated, truncated, _ = env.step(action.copy())
        following = np.array(following, np.float32).reshape(observation.shape)
        steps.append((observation, action, following, np.float32(np.asarray(reward).item()), bool(terminated), bool(truncated)))
        observation = following
        if terminated or truncated:
            observation = np.array(env.reset()[0], np.float32).reshape(observation.shape)
    return [np.stack(part) for part in zip(*steps, strict=True)]


KEYS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated"), ("next", "truncated"))


def ours(env, actions):
    """The same of an environment of a run. Steps are stacked at the end: what the environment changes by then is seen."""
    state, steps = env.reset(), []
    for action in torch.from_numpy(actions):
        step, state = env.step_and_maybe_reset(state.set("action", action.clone()))
        steps.append(step)
    return [torch.stack([step.get(key) for step in steps]).numpy() for key in KEYS]


def assert_plain(kind, num_envs=None, *, seed=5, options=None, **kwargs):
    """Each environment of a run sees what the loop by hand sees."""
    actions = some_actions(num_envs=num_envs)
    env = make_env(named(kind, **kwargs), num_envs=num_envs, seed=seed, sum_episodes=False, **(options or {}))
    found = ours(env, actions)
    for i in range(num_envs or 1):
        expected = plain(lambda: kind(**kwargs), actions if num_envs is None else actions[:, i], seed + i)
        for key, mine, right in zip(KEYS, found, expected, strict=True):
            mine = mine if num_envs is None else mine[:, i]
            np.testing.assert_array_equal(mine.reshape(right.shape), right, err_msg=str(key))
        assert expected[4].any() or expected[5].any(), "no episode ended"
    assert (found[0] != found[2]).any()
    env.close()


# What crosses the border is copied.


class KeepsItsArray(Cart):
    """Returns its own state, and goes on changing it."""

    def observe(self):
        if self.steps == 0:
            self.shown = np.empty(2, np.float32)
        self.shown[:] = self.state
        return self.shown


class ChangesTheAction(Cart):
    def step(self, action):
        outcome = super().step(action)
        action *= 100
        return outcome


class KeepsItsReward(Cart):
    shown = np.zeros(1)

    def reward(self, value):
        self.shown[0] = value
        return self.shown


class ChangesWhatItReturned(Cart):
    """By the next step, the observation and the info it returned hold other things."""

    last = None

    def step(self, action):
        if self.last is not None:
            self.last[0][:] = np.nan
            self.last[-1]["x"] = None
        self.last = super().step(action)
        self.last[-1]["x"] = self.last[0]
        return self.last


@pytest.mark.parametrize("num_envs", [None, 3])
@pytest.mark.parametrize("kind", [Cart, KeepsItsArray, ChangesTheAction, KeepsItsReward, ChangesWhatItReturned])
def test_what_crosses_the_border_is_copied(kind, num_envs):
    check_env(named(kind))
    assert_plain(kind, num_envs)


def test_what_a_run_changes_does_not_reach_the_environment():
    env = make_env(named(KeepsItsArray), seed=0)
    state = env.reset()
    state["observation"].zero_()
    assert (recorders(env)[0].unwrapped.shown != 0).all()
    step = env.step(state.set("action", torch.ones(1)))
    step["next", "observation"].zero_()
    border = recorders(env)[0]
    assert (border.unwrapped.shown != 0).all()
    border.resting = True
    assert (border.step(np.ones(1, "f"))[0] != 0).all()


# Random numbers.


def draws_from(make):
    """A cart whose random numbers are those of ``make(seed)``, made at a reset with a seed."""

    class Own(Cart):
        def seed(self, seed):
            if seed is not None:
                self.parts = {"wind": [make(seed)]}  # somewhere inside

        def draw(self, count):
            generator = self.parts["wind"][0]
            if isinstance(generator, torch.Generator):
                return torch.rand(count, generator=generator).numpy().astype(np.float64) - 0.5
            if isinstance(generator, np.random.Generator):
                generator.integers(9, dtype=np.int32)  # of which half a word may be left
            normal = getattr(generator, "gauss", None) or generator.normal
            return np.array([normal(0, 0.2) for _ in range(count + 1)][:count])

    return Own


GENERATORS = {
    **{kind.__name__: lambda seed, kind=kind: np.random.Generator(kind(seed)) for kind in (np.random.PCG64, np.random.MT19937)},
    **{kind.__name__: lambda seed, kind=kind: np.random.Generator(kind(seed)) for kind in (np.random.Philox, np.random.SFC64)},
    "RandomState": np.random.RandomState,
    "RandomState of Philox": lambda seed: np.random.RandomState(np.random.Philox(seed)),
    "random.Random": random.Random,
    "torch": lambda seed: torch.Generator().manual_seed(seed),
}


class DrawsGlobally(Cart):
    """From every global generator."""

    def draw(self, count):
        legacy = np.random.uniform()  # noqa: NPY002
        return np.array([legacy - 0.5, random.uniform(-0.5, 0.5) + torch.rand(()).item() / 9])


class DrawsFromItsSpaces(Cart):
    """Which have generators of their own, and belong to the class."""

    def __init__(self):
        self.observation_space = Box(-1, 1, (2,), np.float32)
        self.action_space = Box(-1, 1, (1,), np.float32)

    def seed(self, seed):
        if seed is not None:  # as a plain loop does not
            self.observation_space.seed(seed)

    def draw(self, count):
        return self.observation_space.sample().astype(np.float64) / 2


RANDOM = {
    **{name: draws_from(make) for name, make in GENERATORS.items()},
    "global": DrawsGlobally,
    "spaces": DrawsFromItsSpaces,
}


@pytest.mark.parametrize("num_envs", [None, 3])
@pytest.mark.parametrize("kind", RANDOM.values(), ids=RANDOM)
def test_random_numbers_are_those_of_a_plain_rollout(kind, num_envs):
    assert check_env(named(kind)) == []
    assert_plain(kind, num_envs)


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize("kind", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("steps", [0, 4, 17, 30])
def test_an_episode_is_brought_back_whatever_it_draws_from(kind, num_envs, steps):
    actions = torch.from_numpy(some_actions(80, num_envs=num_envs))

    def play(env, state, some):
        seen = []
        for action in some:
            step, state = env.step_and_maybe_reset(state.set("action", action))
            seen.append(step.clone())
        return seen, state

    name = named(kind)
    env = make_env(name, num_envs=num_envs, seed=3)
    _, state = play(env, env.reset(), actions[:steps])
    carried, saved = state.clone(), [border.state_dict() for border in recorders(env)]
    expected, _ = play(env, state, actions[steps:])
    again = make_env(name, num_envs=num_envs, seed=3)
    play(again, again.reset(), actions[:7])
    for border, episode in zip(recorders(again), saved, strict=True):
        border.load_state_dict(episode)
    found, _ = play(again, carried, actions[steps:])
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))
