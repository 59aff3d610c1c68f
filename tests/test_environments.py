"""Environments of a run: batches of them, and episodes brought back in their middle."""

import io
import json
import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from omnet_torchrl import SubnetPrimer
from omnet_torchrl.training import make_env
from omnet_torchrl.training.loop.border import Border, ReplayError
from omnet_torchrl.training.loop.environments import check_env, recorders

TASKS = ["Hopper-v4", "Humanoid-v4", "InvertedPendulum-v4"]


class Counter(gymnasium.Env):
    """Counts its episodes, which no seed and no action tells: a hidden state."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, shown="observation", length=10):
        self.shown, self.length, self.episodes, self.steps = shown, length, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.steps = self.episodes + 1, 0
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        reward = float(self.episodes) if self.shown == "reward" else 0.0
        return self._observation(), reward, False, self.steps == self.length + (self.shown == "end") * self.episodes, {}

    def _observation(self):
        return np.array([self.steps, self.episodes if self.shown == "observation" else 0], dtype=np.float32)


def actions(env, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = env.action_spec.space.low, env.action_spec.space.high
    return low + (high - low) * torch.rand(count, *env.action_spec.shape, generator=generator)


def play(env, acts, state):
    """Transitions of ``acts``, and the state after them."""
    steps = []
    for action in acts:
        step, state = env.step_and_maybe_reset(state.set("action", action))
        steps.append(step.clone())
    return torch.stack(steps), state


def solo(name, seed=None):
    return Border(gymnasium.make(name, disable_env_checker=True))


def play_gym(env, count, rng):
    seen = []
    for _ in range(count):
        observation, reward, terminated, truncated, _ = env.step(rng.uniform(-0.4, 0.4, env.action_space.shape).astype("f"))
        seen.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            seen.append(env.reset())
    return seen


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x[0], y[0])
        assert x[1:] == y[1:] or isinstance(x[1], dict)


@pytest.mark.parametrize("num_envs", [None, 1, 3])
@pytest.mark.parametrize("name", ["Hopper-v4", "InvertedPendulum-v4"])
def test_specs_and_batch_size(name, num_envs):
    env = make_env(name, SubnetPrimer(3, generator=0), num_envs=num_envs, seed=0)
    batch = () if num_envs is None else (num_envs,)
    assert env.batch_size == batch
    check_env_specs(env, seed=None)
    first = env.reset()
    assert first["observation"].dtype == torch.float32
    assert first["subnet"].shape == batch
    assert len(recorders(env)) == (num_envs or 1)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_each_environment_of_a_batch_plays_as_one_alone_with_its_seed(num_envs):
    batch = make_env("InvertedPendulum-v4", num_envs=num_envs, seed=7)
    acts = actions(batch, 60)
    together, _ = play(batch, acts, batch.reset())
    assert together["next", "done"].any(0).all(), "no episode ended: the test shows nothing"
    for i in range(num_envs):
        env = make_env("InvertedPendulum-v4", seed=7 + i)
        alone, _ = play(env, acts[:, i], env.reset())
        for key in alone.keys(True, True):
            assert torch.equal(together[:, i].get(key), alone.get(key)), (i, key)


def test_the_end_of_an_episode_is_the_environments_own_last_observation():
    env = make_env("InvertedPendulum-v4", num_envs=2, seed=0)
    steps, _ = play(env, actions(env, 40), env.reset())
    done = steps["next", "done"][:-1, :, 0]
    after = steps["observation"][1:]
    assert torch.equal(steps["next", "observation"][:-1][~done], after[~done])
    assert (steps["next", "observation"][:-1][done].abs()[:, 1] > 0.2).all()  # the pole's angle beyond the limit
    assert (after[done].abs() < 0.02).all()  # a start state


def test_returns_and_lengths_are_of_each_episode():
    env = make_env("InvertedPendulum-v4", num_envs=3, seed=0)
    steps, _ = play(env, actions(env, 60), env.reset())
    for i in range(3):
        total, length = 0.0, 0
        for step in steps[:, i]["next"]:
            total, length = total + step["reward"].item(), length + 1
            assert step["episode_reward"].item() == total
            assert step["step_count"].item() == length
            if step["done"].item():
                total, length = 0.0, 0


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("steps", [0, 1, 7, 60])
def test_an_episode_is_brought_back_in_its_middle_bit_for_bit(name, steps):
    original, rng = solo(name), np.random.default_rng(0)
    original.reset(seed=3)
    play_gym(original, steps, rng)
    stored = io.BytesIO()
    torch.save(original.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)

    used = solo(name)  # one that has played something else, and one that has done nothing
    used.reset(seed=11)
    play_gym(used, 13, np.random.default_rng(1))
    after = rng.bit_generator.state
    expected = play_gym(original, 200, rng)
    for again in (used, solo(name)):
        again.load_state_dict(state)
        rng.bit_generator.state = after
        assert_same(expected, play_gym(again, 200, rng))
    assert len(expected) > 200, "no episode ended: the random numbers of resets are not seen"


def test_an_episode_right_after_its_reset_is_brought_back():
    original = solo("Hopper-v4")
    original.reset(seed=0)
    seen = original.step(np.zeros(3, "f"))
    while not (seen[2] or seen[3]):
        seen = original.step(np.ones(3, "f"))
    observation, _ = original.reset()
    again = solo("Hopper-v4")
    again.load_state_dict(original.state_dict())
    assert np.array_equal(again.state_dict()["observation"].float(), observation)
    assert_same(play_gym(original, 80, np.random.default_rng(2)), play_gym(again, 80, np.random.default_rng(2)))


def test_an_episode_that_was_brought_back_can_be_brought_back_again():
    original = solo("Hopper-v4")
    original.reset(seed=0)
    play_gym(original, 50, np.random.default_rng(0))
    states = [original.state_dict()]
    for _ in range(2):
        again = solo("Hopper-v4")
        again.load_state_dict(states[-1])
        states.append(again.state_dict())
    for state in states[1:]:
        assert state["rng"] == states[0]["rng"]
        assert state["seed"] == states[0]["seed"]
        assert torch.equal(state["actions"], states[0]["actions"])
        assert torch.equal(state["observation"], states[0]["observation"])


def test_the_state_is_a_copy():
    env = solo("Hopper-v4")
    env.reset(seed=0)
    env.step(np.zeros(3, "f"))
    state = env.state_dict()
    before = state["observation"].clone(), state["actions"].clone()
    play_gym(env, 10, np.random.default_rng(0))
    assert torch.equal(state["observation"], before[0])
    assert torch.equal(state["actions"], before[1])


def test_the_actions_kept_are_those_of_their_time():
    """A caller may use one array for all actions."""
    env = solo("Hopper-v4")
    env.reset(seed=0)
    action = np.zeros(3, "f")
    for value in (0.1, 0.2, 0.3):
        action[:] = value
        env.step(action)
    again = solo("Hopper-v4")
    again.load_state_dict(env.state_dict())


def test_a_batch_is_brought_back_in_the_middle_of_its_episodes():
    env = make_env("InvertedPendulum-v4", num_envs=3, seed=7)
    acts = actions(env, 90)
    _, state = play(env, acts[:50], env.reset())
    carried, saved = state.clone(), [recorder.state_dict() for recorder in recorders(env)]
    expected, _ = play(env, acts[50:], state)
    again = make_env("InvertedPendulum-v4", num_envs=3, seed=99)
    again.reset()
    for recorder, episode in zip(recorders(again), saved, strict=True):
        recorder.load_state_dict(episode)
    found, _ = play(again, acts[50:], carried)
    assert (expected == found).all()
    assert expected["next", "done"].any()


def test_an_episode_of_a_checkpoint_from_before_other_generators_were_kept_is_brought_back():
    """Which has the state of gymnasium's own generator, or none where the reset had a seed."""
    original = solo("Hopper-v4")
    original.reset(seed=0)
    seeded = {**original.state_dict(), "rng": None}
    rng = json.dumps(original.unwrapped.np_random.bit_generator.state)
    original.reset()
    original.step(np.zeros(3, "f"))
    for state in (seeded, {**original.state_dict(), "rng": rng}):
        again = solo("Hopper-v4")
        again.load_state_dict(state)
        assert torch.equal(again.state_dict()["observation"], state["observation"])


def test_a_generator_that_is_another_by_now_cannot_be_brought_back():
    envs = []
    for kind in (np.random.PCG64, np.random.Philox):
        envs.append(Border(Counter()))
        envs[-1].unwrapped.own = np.random.Generator(kind(0))
        envs[-1].reset(seed=0)
    with pytest.raises(ReplayError, match=r"the random generators of Counter can't be brought back: 0\.own\."):
        envs[1].load_state_dict(envs[0].state_dict())


@pytest.mark.parametrize("shown", ["observation", "reward", "end"])
def test_a_hidden_state_is_found_out(shown):
    env = Border(Counter(shown, length=3))
    env.reset(seed=0)
    for _ in range(2):
        for _ in range(3):
            env.step(np.zeros(1, "f"))
        env.reset()
    steps = 5 if shown == "end" else 2
    for _ in range(steps):
        env.step(np.zeros(1, "f"))
    with pytest.raises(ReplayError, match=f"{steps} steps"):
        Border(Counter(shown, length=3)).load_state_dict(env.state_dict())


@pytest.mark.parametrize("shown", ["observation", "reward", "end"])
def test_a_hidden_state_is_found_out_between_two_episodes_too(shown):
    """Where nothing of the episode in progress could tell: the one before is played again."""
    env = Border(Counter(shown, length=3))
    for episode in range(3):
        env.reset(seed=0 if episode == 0 else None)
        for _ in range(3 + (shown == "end") * env.unwrapped.episodes):
            env.step(np.zeros(1, "f"))
    env.reset()
    with pytest.raises(ReplayError, match="played again for"):
        Border(Counter(shown, length=3)).load_state_dict(env.state_dict())


@pytest.mark.parametrize("resets", [1, 2])
def test_between_two_episodes_the_next_one_goes_on_from_the_last(resets):
    original = solo("Hopper-v4")
    original.reset(seed=3)
    for _ in range(2):
        play_gym(original, 20, np.random.default_rng(0))
        for _ in range(resets):
            original.reset()
    state = original.state_dict()
    assert len(state["actions"]) == 0
    assert len(state["last"]["actions"]) == 20
    again = solo("Hopper-v4")
    again.load_state_dict(state)
    assert np.array_equal(again.reset()[0], original.reset()[0])
    assert again.state_dict()["last"]["seen"] == state["last"]["seen"]
    original.step(np.zeros(3, "f"))
    assert "last" not in original.state_dict()


def test_the_error_names_the_environment():
    gymnasium.register("Counter-v0", Counter, disable_env_checker=True)
    try:
        env = Border(gymnasium.make("Counter-v0"))
        env.reset(seed=0)
        env.reset()
        with pytest.raises(ReplayError, match="Counter-v0"):
            Border(gymnasium.make("Counter-v0")).load_state_dict(env.state_dict())
    finally:
        del gymnasium.registry["Counter-v0"]


# What can be trained


class OfSpaces(gymnasium.Env):
    closed = 0

    def __init__(self, observation=None, action=None):
        self.observation_space = box() if observation is None else observation
        self.action_space = box() if action is None else action

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}

    def close(self):
        type(self).closed += 1


def box(*shape, bound=1.0, dtype=np.float32):
    return gymnasium.spaces.Box(-bound, bound, shape or (2,), dtype)


@pytest.fixture
def env_of():
    name = "SpacesTest-v0"

    def make(**spaces):
        gymnasium.register(name, entry_point=OfSpaces, kwargs=spaces, disable_env_checker=True)
        return name

    yield make
    gymnasium.registry.pop(name, None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["Hopper-v4", "Pendulum-v1"])
def test_a_task_with_vectors_passes_without_a_warning(name):
    check_env(name)


def test_what_is_opened_is_closed(env_of):
    before = OfSpaces.closed
    check_env(env_of(observation=box(bound=np.inf)))
    assert OfSpaces.closed == before + 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Hoper-v4", "env must be a gymnasium id with its version, got 'Hoper-v4'; the closest are Hopper-v4, Hopper-v5, "),
        ("Hopper", "with its version, got 'Hopper'; the closest are Hopper-v"),
        ("no_such_module:Env-v0", "env 'no_such_module:Env-v0' needs a package that can't be imported: .*no_such_module"),
        ("gymnasium.envs:Hopper-v99", "env 'gymnasium.envs:Hopper-v99' can't be made: .*`v99`"),
        ("a:b:c", "env 'a:b:c' can't be made: "),
        (":x", "env ':x' can't be made: "),
        ("Broken-v0", r"env 'Broken-v0' can't be made: FileNotFoundError: model\.xml"),
        ("CartPole-v1", r"the action of env must be a Box of floats .* got Discrete\(2\) from 'CartPole-v1'"),
        ("FrozenLake-v1", r"the observation of env must be a Box of numbers with one dimension, .* got Discrete\(16\)"),
    ],
)
def test_an_env_that_cannot_be_trained_is_refused(name, message, monkeypatch):
    def make():
        raise FileNotFoundError("model.xml")

    monkeypatch.setitem(gymnasium.registry, "Broken-v0", gymnasium.envs.registration.EnvSpec("Broken-v0", make))
    with pytest.raises(ValueError, match=message):
        check_env(name)


def test_a_missing_dependency_says_what_to_install(monkeypatch):
    def make(name):
        raise gymnasium.error.DependencyNotInstalled('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`')

    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(ValueError, match=r"'Hopper-v4' needs a package .*pip install \"gymnasium\[mujoco\]\""):
        check_env("Hopper-v4")


@pytest.mark.parametrize(
    ("kind", "space", "got"),
    [
        ("observation", gymnasium.spaces.Dict(a=box()), r"Dict\('a': Box"),
        ("observation", box(4, 4, 3), r"\(4, 4, 3\)"),
        ("observation", gymnasium.spaces.Box(-1, 1, (0,)), r"\(0,\)"),
        ("action", box(2, 2), r"\(2, 2\)"),
        ("action", gymnasium.spaces.Box(-1, 1, (0,)), r"\(0,\)"),
        ("action", gymnasium.spaces.Box(0, 9, (2,), np.int64), "int64"),
        ("action", gymnasium.spaces.MultiDiscrete([2, 3]), "MultiDiscrete"),
    ],
)
def test_spaces_that_are_not_supported_are_named(env_of, kind, space, got):
    of = "numbers" if kind == "observation" else "floats"
    with pytest.raises(ValueError, match=f"the {kind} of env must be a Box of {of} .*got .*{got}.* from 'SpacesTest-v0'"):
        check_env(env_of(**{kind: space}))


@pytest.mark.parametrize(("low", "high"), [(-np.inf, np.inf), (0, 0), (-3.4e38, 3.4e38), (1, np.inf)])
def test_bounds_between_which_no_action_lies_are_refused(env_of, low, high):
    with pytest.raises(ValueError, match=r"the action of env must have finite bounds, low < high, .* from 'SpacesTest-v0'"):
        check_env(env_of(action=gymnasium.spaces.Box(np.full(2, low, "f"), np.full(2, high, "f"))))


def unstable():
    """Hopper-v4 after a step from a state that is no number, of which MuJoCo warns."""
    env = gymnasium.make("Hopper-v4")
    data = env.unwrapped.data
    data.qpos[:] = np.nan
    mujoco.mj_step(env.unwrapped.model, data)
    return env


def test_what_mujoco_says_of_a_model_is_one_warning(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            make_env("HalfCheetah-v5").close()
        make_env(f"{__name__}:unstable").close()
    assert ["huge value in QPOS" in str(each.message) for each in said] == [True]
    assert "deprecated" not in "".join(capfd.readouterr())
    assert not list(tmp_path.iterdir())
    gymnasium.make("HalfCheetah-v5").close()
    assert "deprecated" in capfd.readouterr().err  # elsewhere it says what it always says
