"""The observation's offset: one for each episode, in every kind of environment, from a visible source of randomness."""

import copy
import pickle
from contextlib import closing
from functools import partial

import pytest
import torch
from conftest import ACT, OBS, small_actor
from scipy import stats
from tensordict import TensorDict
from test_transforms import LENGTHS, Agents, CountingEnv, make_gym_env, primers_of
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    GymWrapper,
    InitTracker,
    ParallelEnv,
    PendulumEnv,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
    step_mdp,
)

from omnet_torchrl import Maze2DEnv, ObservationOffset, SubnetPrimer

# From Python 3.12 on, forking warns wherever there is a thread, and torch always has some; TorchRL's workers are used to it.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

SCALE = 0.25
LAYOUTS = [f"{where} {kind}" for where in ("outside", "inside") for kind in ("serial", "parallel")] + ["outside native"]


def noisy(lengths=3, scale=SCALE, **kwargs):
    return TransformedEnv(CountingEnv(lengths), ObservationOffset(scale, **kwargs))


def make_env(layout, lengths=LENGTHS, **kwargs):
    """Environments with episodes of ``lengths``, batched in one of many ways, with an offset outside or in each of them."""
    where, kind = layout.split()
    if kind == "native":
        return noisy(lengths, **kwargs)
    batched = SerialEnv if kind == "serial" else partial(ParallelEnv, mp_start_method="fork")
    make = partial(noisy, **kwargs) if where == "inside" else CountingEnv
    env = batched(len(lengths), [partial(make, length) for length in lengths])
    return env if where == "inside" else TransformedEnv(env, ObservationOffset(SCALE, **kwargs))


def resets(env, times=6):
    return torch.stack([env.reset()["observation_offset"] for _ in range(times)])


def all_different(values):
    return values.unique().numel() == values.numel()


def offsets_of_episodes(data):
    """One row per episode; raises where a step's observation isn't the true one and its episode's offset."""
    first, offset, count = [], data["observation_offset"], data["observation"] - data["observation_offset"]
    torch.testing.assert_close(data["next", "observation"] - data["next", "observation_offset"], count.round() + 1)
    torch.testing.assert_close(count, count.round())
    assert torch.equal(data["next", "observation_offset"], offset)
    starts = count.round()[..., 0] == 0
    for env in range(data.shape[0]):
        steps = starts[env].nonzero()[:, 0].tolist()
        for begin, end in zip(steps, [*steps[1:], data.shape[1]], strict=True):
            assert (offset[env, begin:end] == offset[env, begin]).all()
            first.append(offset[env, begin])
    return torch.stack(first)


# One offset an episode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_dimension", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_env_keeps_its_specs(layout, per_dimension):
    with closing(make_env(layout, per_dimension=per_dimension)) as env:
        check_env_specs(env, seed=0)


def test_a_single_env_keeps_its_specs():
    check_env_specs(noisy(), seed=0)
    check_env_specs(TransformedEnv(GymEnv("Pendulum-v1"), ObservationOffset(SCALE)), seed=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_episode_of_each_env_has_an_offset_of_its_own_in_each_dimension(layout):
    with closing(make_env(layout)) as env:
        offsets = offsets_of_episodes(env.rollout(12, break_when_any_done=False))
    assert offsets.shape == (6 + 4 + 3, OBS)
    assert all_different(offsets)
    assert offsets.abs().max() <= SCALE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_number_for_all_dimensions_is_an_option(layout):
    with closing(make_env(layout, per_dimension=False)) as env:
        offsets = offsets_of_episodes(env.rollout(12, break_when_any_done=False))
    assert offsets.shape == (6 + 4 + 3, 1)
    assert all_different(offsets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_partial_reset_leaves_the_other_envs_what_they_had(layout):
    with closing(make_env(layout)) as env:
        before = step_mdp(env.rand_step(env.reset()))
        kept = before.clone()
        reset = torch.tensor([[False], [True], [False]])
        after = env.reset(before.set("_reset", reset))
    for key in ("observation", "observation_offset"):
        assert torch.equal((after[key] != kept[key]).all(-1, keepdim=True), reset)
    torch.testing.assert_close(after["observation"][1], after["observation_offset"][1])


@pytest.mark.parametrize("mode", ["DISABLED", "SAME_STEP"])
def test_gymnasium_vector_envs_have_one_offset_an_episode(mode):
    vector = pytest.importorskip("gymnasium.vector")
    envs = vector.SyncVectorEnv([partial(make_gym_env, n) for n in LENGTHS], autoreset_mode=vector.AutoresetMode[mode])
    env = TransformedEnv(GymWrapper(envs), ObservationOffset(SCALE), auto_unwrap=True)
    assert all_different(offsets_of_episodes(env.rollout(12, break_when_any_done=False)))
    check_env_specs(env, seed=0)


def test_an_env_that_resets_itself_begins_each_episode_with_its_own_offset():
    base = CountingEnv(LENGTHS, autoreset=True)
    base._torchrl_native_autoreset = True
    env = TransformedEnv(base, Compose(InitTracker(), ObservationOffset(SCALE, generator=0)))
    td = env.reset()
    for _ in range(12):
        torch.testing.assert_close(td["observation"] - td["observation_offset"], td["observation"].round())
        before = td["observation_offset"]
        step, td = env.step_and_maybe_reset(td.set("action", torch.zeros(3, ACT)))
        assert torch.equal((td["observation_offset"] != before).all(-1), step["next", "done"][:, 0])
        first = td["is_init"][:, 0]
        torch.testing.assert_close(td["observation"][first], td["observation_offset"][first])


@pytest.mark.parametrize("agents_end_alone", [False, True])
def test_agents_have_an_offset_each(agents_end_alone):
    transform = ObservationOffset(SCALE, observation_key=("agents", "observation"), per_dimension=False)
    env = TransformedEnv(Agents((4,), agents_end_alone), transform)
    check_env_specs(env, seed=0)
    offset = env.reset()["agents", "observation_offset"]
    assert offset.shape == (4, 3, 1)
    assert all_different(offset)


def test_the_environment_s_own_state_is_untouched():
    base = Maze2DEnv(3)
    env = TransformedEnv(base, ObservationOffset(SCALE))
    data = env.rollout(5)
    torch.testing.assert_close(data["next", "observation"][:, -1] - data["observation_offset"][:, -1], base.position)
    assert ((base.position > 0) & (base.position < 1)).all()


def test_without_an_environment_each_element_gets_an_offset():
    td = ObservationOffset(SCALE, generator=0)(TensorDict(observation=torch.ones(4, 2, OBS), batch_size=[4, 2]))
    assert all_different(td["observation_offset"])
    torch.testing.assert_close(td["observation"] - 1, td["observation_offset"])
    td = ObservationOffset(SCALE, per_dimension=False)(TensorDict(observation=torch.ones(4, 3, 8, 8), batch_size=[4]))
    assert td["observation_offset"].shape == (4, 1, 1, 1)


def test_a_scale_of_zero_changes_nothing():
    assert torch.equal(noisy(scale=0).rollout(3)["observation"], CountingEnv().rollout(3)["observation"])


def test_a_collector_adds_the_primer_that_the_actor_offers_beside_it():
    kwargs = {"frames_per_batch": 60, "total_frames": 60, "auto_register_policy_transforms": True}
    collector = Collector(noisy(LENGTHS), small_actor(), **kwargs)
    (data,) = list(collector)
    assert [type(primer) for primer in primers_of(collector.env)] == [ObservationOffset, SubnetPrimer]
    collector.shutdown()
    offsets_of_episodes(data)
    assert data["subnet"].unique().numel() == 3


# Specs -------------------------------------------------------------------------------------------------------------------


def bounded(low, high):
    env = CountingEnv(LENGTHS)
    env.observation_spec = Composite(observation=Bounded(low, high, (3, OBS), dtype=torch.float64), shape=(3,))
    env._observe = lambda done: env.observation_spec.rand().update({"done": done, "terminated": done.clone()})
    return TransformedEnv(env, ObservationOffset(SCALE))


def test_bounds_are_widened_by_the_scale():
    env = bounded(-1.0, 2.0)
    spec = env.observation_spec["observation"]
    assert (spec.space.low == -1.25).all()
    assert (spec.space.high == 2.25).all()
    assert spec.dtype == env.reset()["observation_offset"].dtype == torch.float64
    check_env_specs(env, seed=0)


def test_an_observation_at_its_bound_stays_within_the_widened_ones():
    env = bounded(1 / 3, 1 / 3 + 1e-12)
    spec = env.observation_spec["observation"]
    assert all(spec.is_in(env.reset()["observation"]) for _ in range(200))


def test_an_observation_without_bounds_has_none_afterwards():
    spec = noisy().observation_spec["observation"]
    assert isinstance(spec, Unbounded)
    assert spec.shape == (OBS,)


def test_the_offset_is_declared_among_observations_and_inputs():
    env = noisy(LENGTHS, per_dimension=False)
    for specs in (env.full_observation_spec, env.full_state_spec):
        spec = specs["observation_offset"]
        assert spec.shape == (3, 1)
        assert (spec.space.high == SCALE).all()
    assert "observation" not in env.full_state_spec.keys()


# Randomness --------------------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_independent_between_dimensions_envs_and_episodes():
    draws = resets(noisy((2, 3), generator=0), 1000) / SCALE
    assert stats.kstest(draws.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    columns = [draws[:-1, 0, 0], draws[:-1, 0, 1], draws[:-1, 1, 0], draws[1:, 0, 0]]
    for i in range(3):
        assert abs(torch.corrcoef(torch.stack([columns[i], columns[3]]))[0, 1]) < 0.1
    assert abs(torch.corrcoef(torch.stack(columns[:3])) - torch.eye(3)).max() < 0.1


def test_an_integer_repeats_the_draws_and_another_does_not():
    first = resets(noisy(LENGTHS, generator=0))
    torch.manual_seed(1)
    assert torch.equal(resets(noisy(LENGTHS, generator=0)), first)
    assert (resets(noisy(LENGTHS, generator=1)) != first).all()


def test_without_a_generator_the_global_seed_repeats_the_draws():
    def draws(seed):
        torch.manual_seed(seed)
        return resets(noisy(LENGTHS))

    assert torch.equal(draws(0), draws(0))
    assert (draws(0) != draws(1)).all()


def test_a_seeded_offset_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    env = noisy(LENGTHS, generator=0)
    env.rollout(12, lambda td: td.set("action", torch.zeros(3, ACT)), break_when_any_done=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_draws_do_not_depend_on_who_is_reset():
    def last_reset(mask):
        env = noisy(LENGTHS, generator=0)
        env.reset(env.reset().set("_reset", torch.tensor(mask)[:, None]))
        return env.reset()["observation_offset"]

    assert torch.equal(last_reset([True, False, False]), last_reset([False, True, True]))


def test_a_primer_of_the_same_seed_draws_independently():
    env = TransformedEnv(CountingEnv((9,) * 8), Compose(SubnetPrimer(10**6, generator=0), ObservationOffset(1, generator=0)))
    states = [env.reset() for _ in range(200)]
    subnet = torch.cat([state["subnet"] for state in states]).double() / 10**6
    offset = torch.cat([state["observation_offset"][:, 0] for state in states]).double()
    assert stats.kstest(((subnet + (offset + 1) / 2) % 1).numpy(), "uniform").pvalue > 0.01
    assert abs(torch.corrcoef(torch.stack([subnet, offset]))[0, 1]) < 0.08


@pytest.mark.parametrize("generator", [None, 0])
def test_workers_differ(generator):
    with closing(make_env("inside parallel", generator=generator)) as env:
        assert all_different(resets(env))


@pytest.mark.parametrize("layout", ["outside native", "inside serial", "outside serial"])
def test_a_state_dict_repeats_the_draws_that_follow(layout):
    with closing(make_env(layout)) as env:
        resets(env)
        state = copy.deepcopy(env.state_dict())
        following = resets(env)
        env.load_state_dict(state)
        assert torch.equal(resets(env), following)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copied_env_starts_its_seeded_stream_anew(copied):
    env = noisy(LENGTHS, generator=0)
    first = resets(env)
    assert torch.equal(resets(copied(env)), first)


@pytest.mark.gpu
def test_an_env_on_a_gpu_plays_there():
    env = noisy(LENGTHS, generator=0).to("cuda")
    check_env_specs(env, seed=0)
    data = env.rollout(12, break_when_any_done=False)
    assert data["observation_offset"].is_cuda
    assert all_different(offsets_of_episodes(data.cpu()))


# Errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), True, "1", None])
def test_a_scale_that_is_none_raises(scale):
    with pytest.raises(ValueError, match=f"scale must be a finite number of at least 0, got {scale!r}"):
        ObservationOffset(scale)


def test_a_generator_of_another_type_raises():
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, an int or None, got '0'"):
        ObservationOffset(1.0, generator="0")


def test_an_env_without_that_observation_raises():
    env = TransformedEnv(CountingEnv(), ObservationOffset(1.0, observation_key="pixels"))
    for ask in (env.reset, lambda: env.observation_spec):
        with pytest.raises(KeyError, match="there is no 'pixels' to add an offset to, only"):
            ask()


def test_an_observation_that_is_an_integer_raises():
    env = CountingEnv()
    env.observation_spec = Composite(observation=Unbounded((OBS,), dtype=torch.int64))
    with pytest.raises(TypeError, match=r"'observation' must be floating point, got torch.int64: convert it before"):
        TransformedEnv(env, ObservationOffset(1.0)).observation_spec  # noqa: B018


def test_an_env_whose_state_is_its_observation_raises():
    with pytest.raises(ValueError, match="computes its next state from 'th': copy it to another key first"):
        TransformedEnv(PendulumEnv(), ObservationOffset(1.0, observation_key="th")).observation_spec  # noqa: B018


def test_a_step_without_the_offset_says_where_it_comes_from():
    env = noisy()
    with pytest.raises(KeyError, match="no 'observation_offset', which is drawn at reset"):
        env.rand_step(env.base_env.reset())


def test_its_repr_tells_what_it_draws():
    assert repr(ObservationOffset(0.5)) == "ObservationOffset(scale=0.5, per_dimension=True, key='observation_offset')"


def test_it_follows_a_cast_to_single_precision():
    env = TransformedEnv(GymEnv("Hopper-v4"), Compose(DoubleToFloat(), ObservationOffset(0.1)))
    check_env_specs(env, seed=0)
    assert env.reset()["observation"].dtype == torch.float32
