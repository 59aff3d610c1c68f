"""MinAtar's games in one environment: what each step gives, against the package's own environments, and an exact state."""

import copy
import time

import numpy as np
import pytest
import torch
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv, check_env_specs

from omnet_torchrl import SubnetPrimer
from omnet_torchrl.envs import MinAtarEnv
from omnet_torchrl.envs.minatar import GAMES, _environment_class

pytest.importorskip("minatar")


def play(env, steps, state=None, seed=0):
    """A rollout of seeded random actions over several episodes; what it gave, and the state after it."""
    generator = torch.Generator().manual_seed(seed)
    state = env.reset() if state is None else state
    steps_made = []
    for _ in range(steps):
        count = env.action_spec.space.n
        action = torch.randint(count, env.batch_size, generator=generator)
        state.set("action", action if env.action_spec.shape == env.batch_size else torch.nn.functional.one_hot(action, count))
        step, state = env.step_and_maybe_reset(state)
        steps_made.append(step)
    return torch.stack(steps_made, -1), state


@pytest.mark.parametrize("batch_size", [(), (3,), (2, 2)])
@pytest.mark.parametrize("categorical", [False, True])
def test_specs(batch_size, categorical):
    check_env_specs(MinAtarEnv("breakout", batch_size, categorical_action_encoding=categorical))


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("minimal", [False, True])
def test_each_game_is_the_packages_own(game, minimal):
    env = MinAtarEnv(game, 2, minimal_actions=minimal, categorical_action_encoding=True)
    env.set_seed(7)
    data, _ = play(env, 400)
    for i in range(2):
        plain = _environment_class()(game)
        plain.seed(7 + i)
        actions = plain.minimal_action_set() if minimal else range(6)
        plain.reset()
        assert env.action_spec.space.n == len(actions)
        for t in range(400):
            step = data[i, t]
            np.testing.assert_array_equal(step["observation"].numpy(), plain.state())
            reward, ended = plain.act(actions[step["action"]])
            assert step["next", "reward"].item() == reward
            assert step["next", "done"].item() == step["next", "terminated"].item() == ended
            np.testing.assert_array_equal(step["next", "observation"].numpy(), plain.state())
            if ended:
                plain.reset()


@pytest.mark.parametrize("game", GAMES)
def test_a_game_goes_on_exactly_from_its_state(game):
    env = TransformedEnv(MinAtarEnv(game, 3), StepCounter(150))
    env.set_seed(1)
    _, state = play(env, 333)
    kept, at = {name: value.clone() for name, value in env.base_env.state_dict().items()}, state.clone()
    expected, _ = play(env, 400, state, seed=5)
    other = TransformedEnv(MinAtarEnv(game, 3), StepCounter(150))
    play(other, 50)
    other.base_env.load_state_dict(kept)
    got, _ = play(other, 400, at, seed=5)
    assert (expected == got).all()


def test_a_copy_goes_on_by_itself():
    env = MinAtarEnv("breakout", 2)
    _, state = play(env, 20)
    other, at = copy.deepcopy(env), state.clone()
    expected, _ = play(env, 50, state)
    got, _ = play(other, 50, at)
    assert (expected == got).all()


def test_a_state_is_tensors_that_load_without_pickle(tmp_path):
    env = MinAtarEnv("seaquest")
    torch.save(env.state_dict(), tmp_path / "state.pt")
    env.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize(("game", "count"), [("asterix", 2), ("seaquest", 3)])
def test_a_state_of_other_games_is_refused(game, count):
    with pytest.raises(ValueError, match="2 games of 'seaquest'"):
        MinAtarEnv("seaquest", 2).set_extra_state(MinAtarEnv(game, count).get_extra_state())


def test_seeds():
    def observations(*seeds):
        env = MinAtarEnv("asterix", 4)
        for seed in seeds:
            env.set_seed(seed)
        return play(env, 100)[0]["observation"]

    assert torch.equal(observations(3), observations(3))
    assert not torch.equal(observations(3), observations(4))
    torch.manual_seed(0)
    first = observations()
    assert not torch.equal(first, observations())
    torch.manual_seed(0)
    assert torch.equal(first, observations())
    each = observations(3)
    assert not torch.equal(each[0], each[1])


def test_an_observation_stays_what_it_was():
    env = MinAtarEnv("breakout", 2)
    data, state = play(env, 5)
    before = data.clone()
    play(env, 20, state)
    assert (data == before).all()


def test_sticky_actions_and_ramping_reach_the_games():
    env = MinAtarEnv("space_invaders", 2, sticky_action_prob=0.0, difficulty_ramping=False)
    assert all(game.sticky_action_prob == 0 and not game.env.ramping for game in env.games)
    defaults = MinAtarEnv("space_invaders")
    assert defaults.games[0].sticky_action_prob == 0.1
    assert defaults.games[0].env.ramping


def test_a_subnetwork_is_drawn_for_each_game():
    env = TransformedEnv(MinAtarEnv("breakout", 5), SubnetPrimer(3, generator=0))
    data, _ = play(env, 200)
    for i in range(5):
        same = data["subnet"][i, 1:] == data["subnet"][i, :-1]
        assert (same | data["next", "done"][i, :-1, 0]).all()


def test_render_shows_the_topmost_channel():
    env = MinAtarEnv("breakout", 2)
    env.reset()
    frames = env.render(scale=3)
    assert frames.shape == (2, 30, 30, 3)
    assert frames.dtype == torch.uint8
    paddle, brick = frames[0, 29, 13].tolist(), frames[0, 4, 0].tolist()
    assert paddle != brick
    assert frames[0, 12, 15].tolist() not in (paddle, brick)


@pytest.mark.parametrize(("game", "message"), [("brekout", "'breakout'"), ("Pong", "one of asterix"), (3, "one of asterix")])
def test_an_unknown_game(game, message):
    with pytest.raises(ValueError, match=message):
        MinAtarEnv(game)


def test_a_probability_out_of_range():
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        MinAtarEnv("breakout", sticky_action_prob=1.5)


def test_the_package_may_be_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minatar.environment", None)
    with pytest.raises(ImportError, match=r"pip install minatar .*GPL-3\.0"):
        MinAtarEnv("breakout")


def test_faster_than_wrapped_games_by_far():
    """The bar is five, measured on a machine at rest by ``benchmarks/speed/games.py``; here others may be at work."""
    import minatar.gym

    minatar.gym.register_envs()
    ours = MinAtarEnv("breakout", 8)
    wrapped = SerialEnv(8, lambda: GymEnv("MinAtar/Breakout-v1"))

    def seconds(env):
        env.rollout(10, break_when_any_done=False)
        start = time.perf_counter()
        env.rollout(50, break_when_any_done=False)
        return time.perf_counter() - start

    assert min(seconds(wrapped) for _ in range(3)) > 2.5 * min(seconds(ours) for _ in range(3))
