"""The maze: what a step does, where an episode ends, and that no step gets through a wall."""

from contextlib import closing
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, InitTracker, ParallelEnv, SerialEnv, StepCounter, TransformedEnv, check_env_specs, step_mdp

from omnet_torchrl import Maze2DEnv, SubnetPrimer, make_actor
from omnet_torchrl.envs.maze import BORDER, ENCLOSURE, GAP, HALF_THICKNESS

# From Python 3.12 on, forking warns wherever there is a thread, and torch always has some; TorchRL's workers are used to it.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

STOP = HALF_THICKNESS + GAP  # how far from the middle of a wall a step ends that meets it squarely
LEFT, RIGHT, UP, STAY = (-0.2, 0.0), (0.2, 0.0), (0.0, 0.2), (0.0, 0.0)
# Out of the enclosure, around its upper left corner, and over to the goal, which the last step reaches.
WAY = (LEFT, UP, UP, RIGHT, RIGHT, RIGHT)


def play(env, *actions, start=None):
    """The steps of an episode, of shape (*batch, T)."""
    state, steps = env.reset(), []
    if start is not None:
        env.position = torch.tensor(start)
    for action in actions:
        state["action"] = torch.tensor(action).expand(env.action_spec.shape)
        steps.append(env.step(state)["next"])
        state = step_mdp(state)
    return torch.stack(steps, -1)


def crosses(start, end, walls):
    """Whether straight ways ``(P, 2)`` touch walls ``(W, 2, 2)``: the signs of four oriented areas, in double precision."""
    start, end, walls = start.double()[:, None], end.double()[:, None], walls.double()
    first, second = walls.unbind(1)

    def area(a, b, c):
        return (b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0]

    ways = area(first, second, start) * area(first, second, end)
    ends = area(start, end, first) * area(start, end, second)
    return (ways <= 0) & (ends <= 0) & (start != end).any(-1)


# Specs and TorchRL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), 3, (3,), (2, 3)])
def test_it_keeps_its_specs(batch, dtype):
    env = Maze2DEnv(batch, dtype=dtype)
    check_env_specs(env, seed=0)
    assert env.observation_spec["observation"].shape == (*env.batch_size, 2)
    assert env.action_spec.dtype == env.reset()["observation"].dtype == env.rand_step()["next", "reward"].dtype == dtype
    assert env.action_spec.space.low.unique().item() == pytest.approx(-0.2)
    assert env.action_spec.space.high.unique().item() == pytest.approx(0.2)


@pytest.mark.parametrize("make", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")])
def test_it_keeps_its_specs_in_batched_envs(make):
    with closing(make(2, partial(Maze2DEnv, 3))) as env:
        check_env_specs(env, seed=0)
        assert env.rollout(4)["observation"].shape == (2, 3, 4, 2)


def test_it_moves_to_a_device_with_all_it_has():
    env = Maze2DEnv(3, device="cpu")
    assert env.device == env.reset().device == env.action_spec.device == env.full_done_spec.device == torch.device("cpu")
    check_env_specs(Maze2DEnv(3).to("cpu"), seed=0)


@pytest.mark.gpu
def test_it_plays_on_a_gpu_as_on_the_cpu():
    env = Maze2DEnv(100, device="cuda")
    check_env_specs(env, seed=0)
    actions = [tuple(action) for action in ((torch.rand(20, 2) - 0.5) * 0.4).tolist()]
    torch.testing.assert_close(play(env, *actions)["observation"].cpu(), play(Maze2DEnv(100), *actions)["observation"])


def test_a_seed_changes_nothing():
    env = Maze2DEnv(2)
    env.set_seed(1)
    first = play(env, *WAY)
    env.set_seed(2)
    assert (play(env, *WAY) == first).all()


def test_a_collector_plays_thousands_at_once_with_a_subnet_for_each_episode():
    base = Maze2DEnv(2000)
    actor = make_actor(base.observation_spec, base.action_spec, num_cells=(16,), sparsity=[0.0, 0.5], generator=0)
    env = TransformedEnv(base, Compose(InitTracker(), actor.make_tensordict_primer(generator=0)))
    check_env_specs(env, seed=0)
    collector = Collector(env, actor, frames_per_batch=2000 * 60, total_frames=2000 * 60, auto_register_policy_transforms=False)
    (data,) = list(collector)
    collector.shutdown()
    assert data["subnet"].unique().tolist() == [0, 1, 2, 3, 4]
    done, subnet = data["next", "done"][..., 0], data["subnet"]
    assert torch.equal(subnet[:, 1:][~done[:, :-1]], subnet[:, :-1][~done[:, :-1]])
    assert (data["observation"][:, 1:][done[:, :-1]] == 0.5).all()
    assert data["is_init"].sum() == 2000 + done[:, :-1].sum()
    assert data["action"].abs().max() <= 0.2


# A step ------------------------------------------------------------------------------------------------------------------


def test_it_starts_in_the_middle_and_moves_by_the_action():
    env = Maze2DEnv()
    assert env.reset()["observation"].tolist() == [0.5, 0.5]
    torch.testing.assert_close(play(env, (0.1, -0.05))["observation"][0], torch.tensor([0.6, 0.45]))


def test_an_action_out_of_bounds_is_clipped():
    torch.testing.assert_close(play(Maze2DEnv(), (-5.0, 0.0))["observation"][0], torch.tensor([0.3, 0.5]))


def test_a_step_ends_in_front_of_a_wall_and_the_rest_of_it_is_lost():
    seen = play(Maze2DEnv(), (0.2, 0.05), (0.2, 0.0), LEFT)["observation"]
    # The path is as long as (0.2, 0.05) is, and its last GAP is left out.
    fraction = (1 / 6 - HALF_THICKNESS) / 0.2 - GAP / (0.2**2 + 0.05**2) ** 0.5
    torch.testing.assert_close(seen[0], torch.tensor([0.5 + 0.2 * fraction, 0.5 + 0.05 * fraction]))
    torch.testing.assert_close(seen[1], torch.stack([torch.tensor(2 / 3 - STOP), seen[0, 1]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[2], seen[1] - torch.tensor([0.2, 0.0]))


@pytest.mark.parametrize(("action", "axis", "end"), [((0.0, 0.2), 1, 1 - STOP), ((0.0, -0.2), 1, STOP), (LEFT, 0, STOP)])
def test_a_step_ends_in_front_of_the_border(action, axis, end):
    seen = play(Maze2DEnv(), LEFT, *[action] * 6)["observation"]
    torch.testing.assert_close(seen[-1, axis], torch.tensor(end))
    torch.testing.assert_close(seen[-1, 1 - axis], torch.tensor(0.3 if axis else 0.5))


def test_the_enclosure_is_open_to_the_left_only():
    env = Maze2DEnv()
    for action, inside in ((LEFT, False), (RIGHT, True), (UP, True), ((0.0, -0.2), True)):
        x, y = play(env, action, action)["observation"][-1].tolist()
        assert (1 / 3 < x < 2 / 3 and 1 / 3 < y < 2 / 3) == inside


def test_points_of_a_batch_do_not_meet():
    actions = (torch.rand(40, 3, 2) - 0.5) * 0.4
    together = play(Maze2DEnv(3), *actions.tolist())["observation"]
    for i in range(3):
        assert torch.equal(play(Maze2DEnv(), *actions[:, i].tolist())["observation"], together[i])


# Episodes ----------------------------------------------------------------------------------------------------------------


def test_the_goal_ends_an_episode_with_a_hundred():
    seen = play(Maze2DEnv(2), *WAY)
    assert seen["reward"][0, :, 0].tolist() == [0, 0, 0, 0, 0, 100]
    assert seen["terminated"][0, :, 0].tolist() == [False] * 5 + [True]
    assert torch.equal(seen["done"], seen["terminated"])
    assert not seen["truncated"].any()
    torch.testing.assert_close(seen["observation"][:, -1], torch.full((2, 2), 0.9))


@pytest.mark.parametrize(("distance", "there"), [(0.0999, True), (0.1001, False)])
def test_the_goal_is_less_than_a_tenth_away(distance, there):
    seen = play(Maze2DEnv(), STAY, start=[5 / 6 - distance, 5 / 6])
    assert seen["terminated"].item() == there
    assert seen["reward"].item() == 100 * there


def test_to_pass_the_goal_within_a_step_is_not_to_reach_it():
    seen = play(Maze2DEnv(), (0.2, 0.2), start=[5 / 6 - 0.1, 5 / 6 - 0.1])
    assert not seen["terminated"].any()


def test_an_episode_is_cut_after_fifty_steps():
    seen = play(Maze2DEnv(2), *[STAY] * 50)
    assert seen["truncated"][0, :, 0].tolist() == [False] * 49 + [True]
    assert torch.equal(seen["done"], seen["truncated"])
    assert not seen["terminated"].any()
    assert not seen["reward"].any()
    assert play(Maze2DEnv(max_steps=2), STAY, STAY)["truncated"][:, 0].tolist() == [False, True]


def test_a_partial_reset_leaves_the_others_where_they_are():
    env = Maze2DEnv(3)
    state = step_mdp(env.step(env.reset().set("action", torch.full((3, 2), 0.1))))
    seen = env.reset(state.set("_reset", torch.tensor([[False], [True], [False]])))["observation"]
    torch.testing.assert_close(seen, torch.tensor([[0.6, 0.6], [0.5, 0.5], [0.6, 0.6]]))
    assert env.steps.flatten().tolist() == [1, 0, 1]


def test_those_that_wait_for_the_others_stay_where_they_are():
    def policy(td):
        return td.set("action", torch.tensor([WAY[min(int(env.steps.max()), 5)], STAY]))

    env = Maze2DEnv(2)
    data = env.rollout(60, policy, break_when_any_done=False, break_when_all_done=True)
    assert data.shape == (2, 50)
    torch.testing.assert_close(env.position, torch.tensor([[0.9, 0.9], [0.5, 0.5]]))
    assert env.steps.flatten().tolist() == [6, 50]


def test_writing_into_an_observation_moves_nobody():
    env = Maze2DEnv()
    env.reset()["observation"].zero_()
    assert env.position.tolist() == [0.5, 0.5]


def test_a_state_dict_holds_the_middle_of_an_episode():
    env, other = Maze2DEnv(max_steps=3), Maze2DEnv(max_steps=3)
    play(env, LEFT)
    other.load_state_dict(env.state_dict())
    action = TensorDict(action=torch.tensor(UP))
    assert (env.step(action.clone()) == other.step(action.clone())).all()
    assert other.rand_step(action)["next", "truncated"]


def test_a_primer_and_a_step_counter_count_with_it():
    env = TransformedEnv(Maze2DEnv(4), Compose(StepCounter(), SubnetPrimer(3, generator=0)))
    data = env.rollout(120, break_when_any_done=False)
    done = data["next", "done"]
    assert ((data["next", "step_count"] == 50) == data["next", "truncated"])[~data["next", "terminated"]].all()
    assert done.any()


# Walls -------------------------------------------------------------------------------------------------------------------

LAYOUTS = {"the paper's": ENCLOSURE, "none": (), "crossing": (((0.2, 0.1), (0.9, 0.8)), ((0.1, 0.7), (0.8, 0.05)))}


def layouts():
    generator = torch.Generator().manual_seed(0)
    # Random ones, away from the start: those that lie on it are refused.
    corners = torch.tensor([[0.0, 0.0], [0.6, 0.0], [0.0, 0.6], [0.6, 0.6]])
    walls = torch.rand(3, 4, 2, 2, 2, generator=generator) * 0.4 + corners[:, None, None]
    return [*LAYOUTS.values(), *walls.flatten(1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(6))
def test_no_step_of_whatever_length_crosses_a_wall(case, dtype):
    env = Maze2DEnv(1000, walls=layouts()[case], dtype=dtype)
    walls = torch.cat([env.walls, torch.tensor(BORDER, dtype=dtype)])
    generator = torch.Generator().manual_seed(case)
    bumps = 0
    for i in range(100):
        step = torch.randn(1000, 2, generator=generator, dtype=dtype) * 10.0 ** (i % 7 - 4)
        if i % 3 == 0:  # straight along an axis, as a wall may lie
            step[:, i // 3 % 2] = 0
        if i % 5 == 0:  # straight at the end of a wall, or beyond it
            step = (walls[i % len(walls), 0] - env.position) * (1 + i % 2)
        before, wanted = env.position, env.position + step
        env.position = env.move(before, step)
        assert not crosses(before, env.position, walls).any()
        bumps += int((env.position - wanted).abs().amax(-1).gt(1e-6).sum())
    assert ((env.position > 0) & (env.position < 1)).all()
    assert bumps > 10_000


def test_a_way_is_free_in_both_directions():
    env = Maze2DEnv(2000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        before = env.position
        env.position = env.move(before, torch.randn(2000, 2, generator=generator) * 0.2)
        torch.testing.assert_close(env.move(env.position, before - env.position), before, atol=2e-3, rtol=0)


def test_a_long_walk_along_the_walls_gets_stuck_nowhere():
    env = Maze2DEnv(1000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        env.position = env.move(env.position, torch.randn(1000, 2, generator=generator) * 0.1)
    ways = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 1.0]], [[0.0, -1.0]]]) * 0.01
    moved = (env.move(env.position, ways) - env.position).norm(dim=-1)
    assert (moved.amax(0) > 0.009).all()


def test_the_oracle_of_these_tests_sees_a_wall_that_is_crossed():
    start, end = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.9, 0.5], [0.6, 0.5], [0.1, 0.5]])
    assert crosses(start, end, torch.tensor(ENCLOSURE)).any(-1).tolist() == [True, False, False]


def test_all_of_the_paper_s_maze_can_be_reached_and_nothing_behind_closed_walls():
    assert Maze2DEnv().reachable().all()
    closed = (*ENCLOSURE, ((1 / 3, 1 / 3), (1 / 3, 2 / 3)))
    reached = Maze2DEnv(walls=closed).reachable()
    assert reached.sum() == 100
    assert reached[10:20, 10:20].all()
    ahead = Maze2DEnv(walls=(((0.0, 0.8), (1.0, 0.8)),)).reachable(10)
    assert ahead.any(1).tolist() == [True] * 8 + [False] * 2


# Errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("walls", "message"),
    [
        ([[0.1, 0.2], [0.3, 0.4]], r"shape \(W, 2, 2\), x and y of both ends of each, got \(2, 2\)"),
        ([[[0.1, 0.2], [0.3, 1.4]]], r"within \[0, 1\], got"),
        ([[[0.1, 0.2], [0.1, 0.2]]], "two ends of a wall must differ, got"),
        ([[[0.3, 0.5], [0.7, 0.5]]], r"no wall may lie on the start \(0.5, 0.5\), got"),
    ],
)
def test_walls_that_are_none_raise(walls, message):
    with pytest.raises(ValueError, match=message):
        Maze2DEnv(walls=walls)


@pytest.mark.parametrize("max_steps", [0, -1, 2.5, True])
def test_a_length_that_is_none_raises(max_steps):
    with pytest.raises(ValueError, match=f"max_steps must be an int of at least 1, got {max_steps!r}"):
        Maze2DEnv(max_steps=max_steps)


def test_a_dtype_that_is_too_coarse_raises():
    with pytest.raises(ValueError, match=r"float32 or torch.float64, got torch.float16"):
        Maze2DEnv(dtype=torch.float16)
