"""Environments as their authors write them: each gives the numbers of a plain rollout, or one line that says why not."""

import contextlib
import csv
import gc
import os
import random
import re
import sys
import weakref
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import FlattenObservation, NormalizeObservation, NormalizeReward, TimeLimit
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from tensordict import TensorDict
from test_resume import differing, result, session, untimed

from omnet_torchrl import make_actor
from omnet_torchrl.training import Trainer, evaluate, load_policy, make_env
from omnet_torchrl.training.command_line import register
from omnet_torchrl.training.loop import rollout
from omnet_torchrl.training.loop.environments import MAZE, check_env, make_gymnasium, recorders
from omnet_torchrl.training.record.reporter import Reporter

EXAMPLES = Path(__file__).parent.parent / "examples"
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
    observation = np.asarray(env.reset()[0]).astype(np.float32)
    for action in actions:
        following, reward, terminated, truncated, _ = env.step(action.astype(env.action_space.dtype))
        following = np.asarray(following).astype(np.float32).reshape(observation.shape)
        steps.append((observation, action, following, np.float32(np.asarray(reward).item()), bool(terminated), bool(truncated)))
        observation = following
        if terminated or truncated:
            observation = np.asarray(env.reset()[0]).astype(np.float32).reshape(observation.shape)
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
    border.resting, seen = True, border.step(np.ones(1, "f"))[0]
    border.unwrapped.shown[:] = 7
    assert (border.step(np.ones(1, "f"))[0] == seen).all()
    assert (seen != 0).all()


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


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_run_that_draws_from_global_generators_repeats_itself_and_is_resumed_exactly(num_envs, tmp_path):
    name, runs = named(DrawsGlobally), []
    for i, stops in enumerate([(), (), (13, 27, 44)]):
        rows = []
        for stop in (*stops, 10**9):
            np.random.seed(i)  # noqa: NPY002, whatever the process did before
            random.seed(i)
            session(tmp_path / str(i), rows, stop, name, num_envs=num_envs, utd_ratio=1, init_random_frames=20)
        runs.append((result(tmp_path / str(i)), untimed(rows)))
    for other in runs[1:]:
        assert other[1] == runs[0][1]
        assert differing(other[0], runs[0][0]) == []


def test_an_environment_leaves_the_global_generators_of_others_alone():
    env = make_env(named(DrawsGlobally), seed=0)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    torch.manual_seed(1)
    expected = np.random.uniform(), random.random(), torch.rand(()).item()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    torch.manual_seed(1)
    ours(env, some_actions(20))
    assert (np.random.uniform(), random.random(), torch.rand(()).item()) == expected  # noqa: NPY002


class DrawsByItself(Cart):
    """By a generator of its own kind, which no seed reaches."""

    word = 1

    def draw(self, count):
        self.word = (1103515245 * self.word + 12345) % 2**31
        return np.full(count, self.word / 2**31 - 0.5)


class DrawsFromTheSystem(Cart):
    def __init__(self):
        self.system = random.SystemRandom()

    def draw(self, count):
        return np.array([self.system.uniform(-0.5, 0.5) for _ in range(count)])


@pytest.mark.parametrize("kind", [DrawsByItself, DrawsFromTheSystem])
def test_what_no_seed_reaches_is_said_and_a_resumed_run_goes_on_inexactly(kind, tmp_path):
    name = named(kind)
    (note,) = check_env(name)
    assert note.startswith(f"warning: two episodes of {NAME} begin differently after the same seed: it draws random numbers")
    rows = []
    session(tmp_path, rows, 43, name)
    with pytest.warns(UserWarning, match="Its episode starts anew; the run goes on, inexactly"):
        assert session(tmp_path, rows, env=name).frames == 60


# Numbers of any type, where they mean something.


class Shows(Cart):
    """Shows the result of functions of its observation and its reward."""

    def __init__(self, observe=None, reward=None, observation=None, action=None):
        self.shown_as, self.reward_as = observe or (lambda value: value), reward or (lambda value: value)
        self.observation_space = observation or Cart.observation_space
        self.action_space = action or Cart.action_space

    def observe(self):
        return self.shown_as(self.state)

    def reward(self, value):
        return self.reward_as(value)


WORKS = {
    "float16": {"observe": np.float16, "observation": Box(-9, 9, (2,), np.float16)},
    "float64": {"observe": np.float64, "observation": Box(-9, 9, (2,), np.float64)},
    "int64": {"observe": lambda x: (x * 99).astype(np.int64), "observation": Box(-999, 999, (2,), np.int64)},
    "uint8": {"observe": lambda x: (x * 99).clip(0, 255).astype(np.uint8), "observation": Box(0, 255, (2,), np.uint8)},
    "a list": {"observe": lambda x: x.tolist()},
    "a tensor": {"observe": torch.from_numpy},
    "a column": {"observe": lambda x: x[:, None]},
    "bounds that say nothing": {"observation": Box(-3.4e38, 3.4e38, (2,), np.float32)},
    "a constant": {"observe": np.sign, "observation": Box(np.array([-1, 1], "f"), np.array([1, 1], "f"))},
    "reward of shape (1,)": {"reward": lambda x: np.array([x])},
    "reward of shape (1, 1)": {"reward": lambda x: torch.tensor([[x]])},
    "NumPy reward": {"reward": np.float32},
    "int reward": {"reward": lambda x: round(9 * x)},
    "NumPy int reward": {"reward": lambda x: np.int8(9 * x)},
    "bool reward": {"reward": lambda x: x > -0.5},
    "float64 actions": {"action": Box(-0.1, 0.1, (1,), np.float64)},
    "float16 actions": {"action": Box(-1, 1, (1,), np.float16)},
}


@pytest.mark.parametrize("num_envs", [None, 2])
@pytest.mark.parametrize("how", WORKS.values(), ids=WORKS)
def test_numbers_of_other_types_are_those_of_a_plain_rollout(how, num_envs):
    assert check_env(named(Shows, **how)) == []
    for seed in (0, 5, 11):
        assert_plain(Shows, num_envs, seed=seed, **how)


def test_float32_actions_lie_within_float64_bounds_and_arrive_as_the_environments_type():
    class Strict(Cart):
        action_space = Box(-0.1, 0.1, (1,), np.float64)

        def step(self, action):
            assert self.action_space.contains(action)
            return super().step(action)

    env = make_env(named(Strict), seed=0)
    for bound in (env.action_spec.space.low, env.action_spec.space.high):
        env.step(env.reset().set("action", bound))


REFUSED = {
    "no reward": ({"reward": lambda x: None}, "can't be stepped: reward of a step of .* must be one number, got None"),
    "reward of text": ({"reward": str}, "reward of a step .* must be one number, got '-"),
    "complex reward": ({"reward": complex}, r"reward of a step .* must be one number, got \("),
    "two rewards": ({"reward": lambda x: np.array([x, x])}, r"reward of a step .* must be one number, got array\(\["),
    "reward of a dict": ({"reward": lambda x: {"a": x}}, "reward of a step .* must be one number, got {'a'"),
    "nan reward": ({"reward": lambda x: np.nan}, "the reward of env must be finite, got nan"),
    "infinite reward": ({"reward": lambda x: -np.inf}, "the reward of env must be finite, got -inf"),
    "no observation": ({"observe": lambda x: None}, "can't be reset: an observation of .* must be 2 numbers, .* got None"),
    "another size": (
        {"observe": lambda x: np.zeros(3)},
        "an observation .* must be 2 numbers, as .*_space says, got",
    ),
    "texts": ({"observe": lambda x: ["a", "b"]}, r"an observation .* must be 2 numbers, .* got \['a', 'b'\]"),
    "ragged": ({"observe": lambda x: [[1], [1, 2]]}, "can't be reset: .*inhomogeneous"),
    "nan": ({"observe": lambda x: x * np.nan}, "the observation of env must be finite, got"),
    "complex": ({"observe": lambda x: x * 1j}, "an observation .* must be 2 numbers"),
    "too large": ({"observe": lambda x: x * 1e300}, "the observation of env must be finite, got"),
}


@pytest.mark.parametrize(("how", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_number_is_one_line_before_anything_is_made(how, message):
    with pytest.raises(ValueError, match=message) as raised:
        check_env(named(Shows, **how))
    assert "\n" not in str(raised.value)
    assert re.match(f"env '{NAME}' can't be (reset|stepped): |the (reward|observation) of env must be", str(raised.value))


class OfTheOldKind(Cart):
    def step(self, action):
        return super().step(action)[:4]


class WithoutInfo(Cart):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class WithoutSeed(Cart):
    def reset(self):
        return super().reset()


class Breaks(Cart):
    def step(self, action):
        raise RuntimeError("the robot\nis off")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OfTheOldKind, r"can't be stepped: step .* must return a tuple \(observation, reward, .* got a tuple of 4"),
        (WithoutInfo, r"can't be reset: reset .* must return a tuple \(observation, info\), got a ndarray of 2"),
        (WithoutSeed, "can't be reset: TypeError: .*'seed'"),
        (Breaks, "can't be stepped: RuntimeError: the robot is off"),
    ],
)
def test_an_interface_that_is_not_gymnasiums_is_one_line(kind, message, monkeypatch):
    closed = []
    monkeypatch.setattr(kind, "close", lambda self: closed.append(self))
    with pytest.raises(ValueError, match=message) as raised:
        check_env(named(kind))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"env '{NAME}' can't be ")
    assert str(raised.value).count("can't") == 1
    assert len(closed) == 1


def test_what_goes_wrong_later_names_the_environment():
    rewards = iter([1.0, None])
    env = make_env(named(Shows, reward=lambda x: next(rewards)), seed=0)
    state = env.rand_step(env.reset())["next"]
    with pytest.raises(ValueError, match=f"reward of a step of {NAME} must be one number, got None: mend the environment"):
        env.rand_step(state)


# How long an episode lasts.


class Endless(Cart):
    length = 10**9

    def step(self, action):
        observation, reward, *_, info = super().step(action / 100)
        self.state = self.state.clip(-0.9, 0.9)
        return observation, reward, False, False, info


@pytest.mark.parametrize("num_envs", [None, 2])
def test_an_episode_lasts_no_longer_than_max_episode_steps(num_envs):
    actions = some_actions(num_envs=num_envs)
    env = make_env(named(Endless), num_envs=num_envs, seed=5, max_episode_steps=9)
    found = ours(env, actions)
    for i in range(num_envs or 1):
        right = plain(lambda: TimeLimit(Endless(), 9), actions if num_envs is None else actions[:, i], 5 + i)
        for mine, expected in zip(found, right, strict=True):
            np.testing.assert_array_equal((mine if num_envs is None else mine[:, i]).reshape(expected.shape), expected)
    assert found[-1].sum() == 4 * (num_envs or 1)
    assert not found[-2].any()


@pytest.mark.parametrize("limit", [7, 300])
def test_max_episode_steps_takes_the_place_of_the_ids_own(limit):
    steps = make_env("Pendulum-v1", seed=0, max_episode_steps=limit).rollout(400)  # its own number is 200
    assert steps["next", "truncated"].nonzero()[0, 0] == limit - 1


def test_the_maze_has_max_episode_steps_too():
    assert make_env(MAZE, seed=0, max_episode_steps=3).rollout(50)["next", "truncated"].flatten().tolist() == [
        False,
        False,
        True,
    ]


def test_an_evaluation_that_does_not_end_says_which_option_ends_it(monkeypatch):
    monkeypatch.setattr(rollout, "LONG", 20)
    said = []
    for limit in (19, 60):
        env = make_env(named(Endless), num_envs=2, max_episode_steps=limit)
        actor = make_actor(env.observation_spec, env.action_spec, num_cells=(8,), num_subnets=2, sparsity=0.0)
        metrics = evaluate(actor, env, seed=0, say=said.append)
        assert metrics["eval/length"] == limit
        assert len(said) == (limit > 20)
    assert re.search("an evaluation has played 20 steps, .* max_episode_steps=1000 ends .* eval.episodes=0 plays none", said[0])


# The main job.


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Does what examples/omnet_sac.py does, in this process; its lines of text, and the run's folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import omnet_sac

    register()

    def run(*overrides, folder="run"):
        class Composed:
            class overrides:
                task = []

            class job:
                name = ""

            mode = None

        sizes = ["network.num_cells=[8,8]", "network.num_subnets=3", "network.sparsity=0.1", "network.dense_input=true"]
        quick = ["optim.batch_size=8", "compile=false", "progress=false", "eval.episodes=2"]
        frames = ["total_frames=60", "init_random_frames=30", "eval.interval=30", "utd_ratio=1", "policy_update_delay=1"]
        monkeypatch.setattr(HydraConfig, "get", lambda: Composed)
        with initialize_config_dir(str(EXAMPLES), version_base="1.3"):
            config = compose("omnet_sac", [*sizes, *quick, *frames, f"folder={tmp_path / folder}", *overrides])
        omnet_sac.main.__wrapped__(config)
        return tmp_path / folder

    return run


class Counted(Cart):
    """Knows how many of its kind were made and are open; only ``most`` may be."""

    made, open, most = 0, 0, 99

    def __init__(self):
        if Counted.open >= self.most:
            raise OSError("the simulator is in use")
        Counted.made, Counted.open = Counted.made + 1, Counted.open + 1

    def close(self):
        Counted.open -= 1


@pytest.fixture
def counted(monkeypatch):
    for name in ("made", "open", "most"):
        monkeypatch.setattr(Counted, name, getattr(Counted, name))
    return named(Counted)


def test_a_simulator_of_which_one_instance_may_exist_is_trained(job, counted, monkeypatch, capsys):
    monkeypatch.setattr(Counted, "most", 1)
    with pytest.raises(SystemExit):
        job(f"env={counted}", folder="two")
    assert f"failed: ValueError: env '{NAME}' can't be made: OSError: the simulator is in use\n" in capsys.readouterr().err
    assert Counted.open == 0, "what was made before the error is still open"
    folder = job(f"env={counted}", "eval.episodes=0")
    assert f"environments that are made of {NAME}: 1 to train in\n" in capsys.readouterr().err
    assert Counted.open == 0
    assert "eval/return" not in (folder / "metrics.csv").read_text()
    assert load_policy(folder, subnet=0)(TensorDict(observation=torch.zeros(2)))["action"].shape == (1,)


def test_how_many_environments_are_made_is_said_before(job, counted, capsys):
    job(f"env={counted}", "num_envs=2", "eval.bias_episodes=3", "total_frames=40")
    said = f"environments that are made of {NAME}: 2 to train in, 2 to evaluate in, 3 to measure the bias in\n"
    assert capsys.readouterr().err.startswith(said)
    assert Counted.made == 1 + 2 + 2 + 3


def boom(*args, **kwargs):
    raise RuntimeError("boom")


@pytest.mark.parametrize("end", ["finished", "failed", "diverged", "before training"])
def test_environments_and_buffers_are_let_go_whatever_ends_the_run(end, job, counted, monkeypatch):
    import omnet_sac

    storages, make = [], omnet_sac.GatherStorage
    monkeypatch.setattr(omnet_sac, "GatherStorage", lambda *args, **kw: kept(storages, make(*args, **kw)))
    for i in range(3):
        with monkeypatch.context() as patch:
            if end == "failed":
                patch.setattr(Trainer, "_train", boom)
            if end == "before training":
                patch.setattr(omnet_sac, "Trainer", boom)
            if end == "diverged":
                patch.setattr(Counted, "reward", lambda self, value: value if self.steps < 9 else float("nan"))
            with contextlib.suppress(SystemExit, RuntimeError):
                job(f"env={counted}", folder=str(i))
        if end != "before training":
            assert Counted.open == 0
        assert sum(storage() is not None for storage in storages) <= 1
    gc.collect()
    assert Counted.open == 0
    assert [storage() for storage in storages] == [None, None, None]


def kept(references, value):
    references.append(weakref.ref(value))
    return value


class FailsToClose(Cart):
    def close(self):
        raise OSError("no answer")


def test_an_environment_that_cannot_be_closed_is_refused():
    with pytest.raises(ValueError, match=f"env '{NAME}' can't be closed: OSError: no answer"):
        check_env(named(FailsToClose))


# A wrapper with a state.


@pytest.mark.parametrize("wrapper", [NormalizeObservation, NormalizeReward])
def test_statistics_that_a_wrapper_keeps_are_said(wrapper):
    (note,) = check_env(named(Cart), wrappers=[f"gymnasium.wrappers.{wrapper.__name__}"])
    assert note.startswith(f"warning: {wrapper.__name__} around {NAME} keeps running statistics: ")
    assert ("normalize_observations=true has one set for all" in note) == (wrapper is NormalizeObservation)


# Environments of one's own.

MODULE = """
import gymnasium
import numpy as np
import torch
from test_foreign_environments import Cart, Pair
from torchrl.envs import GymWrapper


class Long(Cart):
    def __init__(self, length=12):
        self.length = length


class Louder(gymnasium.Wrapper):
    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        return observation, reward * 10, *rest


def make(length=12):
    return Long(length)


def torchrl(length=12):
    return GymWrapper(Long(length))


def pair():
    return Pair()


def nothing():
    return 3


def demanding(length):
    return Long(length)


gymnasium.register("Own-v0", Long)
gymnasium.register("Made-v0", make)
gymnasium.register("Short-v0", Long, max_episode_steps=6)
"""


class Pair(Cart):
    """Observes a Dict, a part of it a choice."""

    observation_space = gymnasium.spaces.Dict(
        where=Box(-9, 9, (1, 2), np.float64), late=gymnasium.spaces.Discrete(2), speed=Box(-9, 9, (), np.float32)
    )

    def observe(self):
        return {"where": self.state[None], "late": int(self.steps > 5), "speed": np.float32(self.state[1])}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working directory, which no path leads to."""
    name = "our_environments"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name
    sys.modules.pop(name, None)


def assert_same_as(make, name, **options):
    assert check_env(name, **options) == []
    actions = some_actions()
    found = ours(make_env(name, seed=5, sum_episodes=False, **options), actions)
    for mine, right in zip(found, plain(make, actions, 5), strict=True):
        np.testing.assert_array_equal(mine.reshape(right.shape), right)


@pytest.mark.parametrize("what", ["Own-v0", "make", "Long"])
@pytest.mark.parametrize("length", [12, 4])
def test_environments_of_the_working_directory(what, length, module):
    make_gymnasium(f"{module}:{what}", env_kwargs={"length": length}).close()
    kind = sys.modules[module].Long
    assert_same_as(lambda: kind(length), f"{module}:{what}", env_kwargs={"length": length})


def test_an_environment_of_torchrl_plays_as_it_does_by_itself(module):
    from torchrl.envs import GymWrapper

    found = ours(make_env(f"{module}:torchrl", seed=5, sum_episodes=False), some_actions())
    alone = GymWrapper(sys.modules[module].Long())
    alone.set_seed(5)
    alone.reset()
    for mine, right in zip(found, ours(alone, some_actions()), strict=True):
        np.testing.assert_array_equal(mine, right)
    assert found[-1].any()


def test_wrappers_are_applied_one_after_the_other(module):
    name, wrappers = f"{module}:make", [f"{module}.Louder", f"{module}.Louder"]
    actions = some_actions(12)
    one, two = (ours(make_env(name, seed=3, wrappers=each), actions)[3] for each in ([], wrappers))
    assert (one != 0).any()
    np.testing.assert_allclose(two, 100 * one, rtol=1e-6)


@pytest.mark.parametrize("kind", [Pair])
def test_other_observations_are_flattened_by_an_option(kind):
    with pytest.raises(ValueError, match=r"got Dict\(.*: flatten_observation=true flattens it"):
        check_env(named(kind))
    actions = some_actions()
    found = ours(make_env(NAME, seed=5, flatten_observation=True, sum_episodes=False), actions)
    for mine, right in zip(found, plain(lambda: FlattenObservation(kind()), actions, 5), strict=True):
        np.testing.assert_array_equal(mine.reshape(right.shape), right)
    assert found[0].shape[-1] == 2 + 2 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_kwargs": {"lenght": 3}}, "env_kwargs of .* must be among length, got 'lenght'; did you mean 'length'?"),
        ({"wrappers": ["no_such_module.Wrapper"]}, "needs a package that can't be imported: No module named 'no_such_module'"),
        ({"wrappers": ["gymnasium.wrappers.TimeLimits"]}, "no class, function or id 'TimeLimits'; the closest are TimeLimit, "),
        ({"wrappers": ["Nothing"]}, "can't be made: .*wrappers must be module.Class, got 'Nothing'"),
        ({"wrappers": ["gymnasium.wrappers.RescaleAction"]}, "can't be made: TypeError: .*min_action"),
    ],
)
def test_arguments_and_wrappers_that_do_not_fit_are_one_line(options, message, module):
    for what in ("Own-v0", "make"):
        with pytest.raises(ValueError, match=message) as raised:
            check_env(f"{module}:{what}", **options)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "can't be made: TypeError: it must return an environment of gymnasium or TorchRL, got int"),
        ("Lon", "can't be made: our_environments has no class, function or id 'Lon'; the closest are Long, "),
        ("Ow-v0", "the closest are Own-v0, "),
        ("Mad-v0", "the closest are Made-v0, "),
        ("demanding", "needs its argument 'length': give env_kwargs.length="),
        ("Own-v7", "can't be made: .*v7"),
    ],
)
def test_what_a_module_does_not_have_is_one_line(what, message, module):
    with pytest.raises(ValueError, match=message):
        check_env(f"{module}:{what}")


ARGUMENTS = {
    "Hopper-v4": "frame_skip, observation_space",  # of the base class
    "HalfCheetah/forward": "forward_reward_weight, ",
    "MinAtar/breakout": "sticky_action_prob, ",
    "Pendulum-v1": "render_mode, g, got 'nothing'",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_argument_names_those_of_each_kind_of_environment(name):
    with pytest.raises(ValueError, match=rf"env_kwargs of '{name}' must be among .*{ARGUMENTS[name]}.*; did you mean '\w+'\?"):
        check_env(name, env_kwargs={"nothing": 1})


def test_an_error_of_the_environments_own_is_not_blamed_on_its_arguments(module):
    Path(f"{module}.py").write_text(MODULE + "\n\ndef broken(length=3):\n    return Long(lenght=length)\n")
    with pytest.raises(ValueError, match=r"can't be made: TypeError: .*'lenght'$"):
        check_env(f"{module}:broken", env_kwargs={"length": 3})


def test_a_module_that_is_not_found_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        check_env("elsewhere:Env")
    where = f"neither installed nor in {os.getcwd()}: start in the directory that has it, or install it"
    assert str(error.value).endswith(f"No module named 'elsewhere'; it is {where}")


def test_a_torchrl_environment_that_is_a_batch_is_refused(module):
    code = "\n\ndef batch():\n    from omnet_torchrl import Maze2DEnv\n    return Maze2DEnv(3)\n"
    Path(f"{module}.py").write_text(MODULE + code)
    with pytest.raises(ValueError, match=r"one environment without batch size, .* got batch size \(3,\)"):
        check_env(f"{module}:batch")


def test_the_main_job_takes_them_all(job, module, capsys):
    """As on the command line: a name in a group of names that are the environment's own needs no plus sign."""
    options = [f"env={module}:make", "env_kwargs.length=9", f"wrappers=[{module}.Louder]", "max_episode_steps=7"]
    folder = job(*options)
    lines = (folder / "metrics.csv").read_text().splitlines()
    lengths = {line.split(",")[-1] for line in lines if "train/episode_length" in line}
    assert max(map(float, lengths)) == 7
    assert {line.split(",")[-1] for line in lines if "eval/length" in line} <= {str(n / 2) for n in range(15)}
    assert "env_kwargs:\n  length: 9\n" in (folder / "config.yaml").read_text()


LIBRARIES = {
    "dm_control": ("shimmy:dm_control/cheetah-run-v0", "flatten_observation=true"),
    # Without a seed of its own, it draws its tasks from the operating system's entropy, which is said.
    "metaworld": ("metaworld:Meta-World/MT1", "env_kwargs={env_name:reach-v3,seed:0}"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of theirs
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_of_tasks_is_trained_and_resumed_bit_for_bit(library, job, monkeypatch, capsys):
    """Over the end of an episode: of 1,000 steps in dm_control, of 500 in Meta-World."""
    pytest.importorskip(library)
    env, option = LIBRARIES[library]
    frames = ["total_frames=2000", "checkpoint.interval=300", "eval.interval=1000", "eval.episodes=1", "utd_ratio=0.1"]
    options = [f"env={env}", option, *frames, "init_random_frames=100"]
    whole, progress = job(*options, folder="whole"), Reporter.progress

    def stop(self, frames, *rest):
        if frames == 1010:
            raise RuntimeError("killed")
        progress(self, frames, *rest)

    monkeypatch.setattr(Reporter, "progress", stop)
    with pytest.raises(SystemExit):  # said, as a job does
        job(*options, folder="halves")
    monkeypatch.setattr(Reporter, "progress", progress)
    capsys.readouterr()
    halves = whole.parent / "halves"
    job(f"resume={halves}")
    assert "the run goes on, inexactly" not in capsys.readouterr().err
    rows = [untimed_records(each / "metrics.csv") for each in (whole, halves)]
    assert rows[0] == rows[1]
    assert {"train/episode_return", "eval/return"} <= {name for _, name, _ in rows[0]}
    different = differing(result(whole / "checkpoints"), result(halves / "checkpoints"))
    assert [name for name in different if not name.startswith("/log/")] == []  # whose seconds may have another number of digits


def untimed_records(path):
    with path.open() as file:
        return [(row["frames"], row["name"], row["value"]) for row in csv.DictReader(file) if "time/" not in row["name"]]
