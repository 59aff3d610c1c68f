"""The primer: one subnet for each episode, in every kind of environment and collector, from a visible source of randomness."""

import copy
import itertools
import multiprocessing.process
import pickle
from contextlib import closing, contextmanager
from functools import partial

import pytest
import torch
from conftest import ACT, OBS, small_actor
from scipy import stats
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import multiprocessing as mp
from torch import nn
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import Binary, Bounded, Composite, LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    EnvCreator,
    GymEnv,
    GymWrapper,
    InitTracker,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TensorDictPrimer,
    TransformedEnv,
    check_env_specs,
    step_mdp,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl import SubnetPrimer

# From Python 3.12 on, forking warns wherever there is a thread, and torch always has some; TorchRL's workers are used to it.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

LENGTHS = (2, 3, 5)
# So many that two independent draws are never equal: as many different indices as episodes means that each drew its own.
MANY = 10**9


class CountingEnv(EnvBase):
    """Observes the number of steps of the episode, which ends after ``lengths`` of them: an int, or one an environment."""

    def __init__(self, lengths=3, autoreset=False):
        lengths = torch.as_tensor(lengths)
        super().__init__(batch_size=lengths.shape)
        self.lengths, self.autoreset, self.seed = lengths[..., None], autoreset, None
        self.observation_spec = Composite(observation=Unbounded((*self.batch_size, OBS)), shape=self.batch_size)
        self.action_spec = Bounded(-1, 1, (*self.batch_size, ACT))
        self.reward_spec = Unbounded((*self.batch_size, 1))
        self.count = torch.zeros_like(self.lengths)

    def _observe(self, done):
        observation = self.count.float().expand(*self.batch_size, OBS)
        out = TensorDict(observation=observation, done=done, terminated=done.clone(), batch_size=self.batch_size)
        return out.to(self.device) if self.device else out

    def _reset(self, tensordict, **kwargs):
        reset = tensordict.get("_reset", None) if tensordict is not None else None
        self.count = torch.zeros_like(self.count) if reset is None else self.count.masked_fill(reset.cpu(), 0)
        return self._observe(torch.zeros_like(self.count, dtype=torch.bool))

    def _step(self, tensordict):
        self.count = self.count + 1
        done = self.count >= self.lengths
        if self.autoreset:
            self.count = self.count.masked_fill(done, 0)
        out = self._observe(done)
        return out.set("reward", torch.ones_like(self.lengths, dtype=torch.float32, device=out.device))

    def _set_seed(self, seed):
        self.seed = seed


class Agents(EnvBase):
    """Three agents, whose observations and dones live in a group of their own; agent i ends after i + 1 steps."""

    def __init__(self, batch=(), agents_end_alone=False):
        super().__init__(batch_size=batch)
        group, self.alone = (*batch, 3), agents_end_alone
        self.observation_spec = Composite(agents=Composite(observation=Unbounded((*group, OBS)), shape=group), shape=batch)
        self.action_spec = Composite(agents=Composite(action=Bounded(-1, 1, (*group, ACT)), shape=group), shape=batch)
        self.reward_spec = Composite(agents=Composite(reward=Unbounded((*group, 1)), shape=group), shape=batch)
        ends = group if self.alone else batch
        done = Composite(done=Binary(shape=(*ends, 1), dtype=torch.bool), shape=ends)
        self.done_spec = Composite(agents=done, shape=batch) if self.alone else done
        self.count = torch.zeros((*group, 1), dtype=torch.int64)

    def _observe(self, done):
        zero = self.full_observation_spec.zero()
        zero["agents", "observation"] += self.count
        return zero.update(TensorDict(agents=done) if self.alone else done)

    def _reset(self, tensordict, **kwargs):
        reset = tensordict.get(("agents", "_reset") if self.alone else "_reset", None) if tensordict is not None else None
        self.count = torch.zeros_like(self.count) if reset is None else self.count.masked_fill(reset, 0)
        return self._observe({})

    def _step(self, tensordict):
        self.count = self.count + 1
        done = self.count > torch.arange(3)[:, None]
        return self._observe({"done": done if self.alone else done.all(-2)}).update(self.full_reward_spec.zero())

    def _set_seed(self, seed):
        pass


def record(observation, subnet):
    """Acts nothing and keeps the index that the policy saw."""
    return torch.zeros(*observation.shape[:-1], ACT), subnet.clone()


def recorder():
    return TensorDictModule(record, in_keys=["observation", "subnet"], out_keys=["action", "played"])


def primed(lengths=3, num_subnets=MANY, **kwargs):
    return TransformedEnv(CountingEnv(lengths), SubnetPrimer(num_subnets, **kwargs))


def make_env(layout, lengths=LENGTHS, num_subnets=MANY, **kwargs):
    """Environments with episodes of ``lengths``, batched in one of many ways, with a primer outside or in each of them."""
    where, kind, *start_method = layout.split()
    if kind == "native":
        return primed(lengths, num_subnets, **kwargs)
    inner = partial(primed, num_subnets=num_subnets, **kwargs) if where == "inside" else CountingEnv
    workers = [{"lengths": length} for length in lengths]
    if kind == "serial":
        env = SerialEnv(len(lengths), inner, create_env_kwargs=workers)
    else:
        env = ParallelEnv(len(lengths), inner, create_env_kwargs=workers, mp_start_method=start_method[0])
    return TransformedEnv(env, SubnetPrimer(num_subnets, **kwargs)) if where == "outside" else env


SERIAL = ["outside native", "outside serial", "inside serial"]
FORKED = ["outside parallel fork", "inside parallel fork"]
SPAWNED = [pytest.param(f"{where} parallel spawn", marks=pytest.mark.slow) for where in ("outside", "inside")]
LAYOUTS = [*SERIAL, *FORKED, *SPAWNED]


def play(env, frames=12, **kwargs):
    """Play on through the ends of the episodes."""
    return env.rollout(frames, recorder(), break_when_any_done=False, **kwargs)


def episodes(data):
    """For each environment, the subnet of each of its episodes; raises where a step of an episode plays another."""
    done = data["next", "done"].squeeze(-1)
    assert torch.equal(data["played"], data["subnet"])
    assert torch.equal(data["next", "subnet"][~done], data["subnet"][~done])
    result = []
    for subnet, ends in zip(data["subnet"].reshape(-1, data.shape[-1]), done.reshape(-1, data.shape[-1]), strict=True):
        parts = [part for part in subnet.tensor_split((ends.nonzero()[:, 0] + 1).tolist()) if part.numel()]
        assert all((part == part[0]).all() for part in parts)
        result.append([int(part[0]) for part in parts])
    return result


def flat(rows):
    return list(itertools.chain.from_iterable(rows))


def trajectories(batches):
    """The subnet of each trajectory of a collector; raises where a step of it plays another."""
    subnets = {}
    for data in batches:
        done = data["next", "done"].squeeze(-1)
        assert torch.equal(data["played"], data["subnet"])
        assert torch.equal(data["next", "subnet"][~done], data["subnet"][~done])
        for trajectory, subnet in torch.stack([data["collector", "traj_ids"], data["subnet"]]).flatten(1).T.tolist():
            assert subnets.setdefault(trajectory, subnet) == subnet
    return subnets


def all_different(values):
    values = list(values)
    return len(set(values)) == len(values) > 1


def itself(env):
    return env


def resets(env, times=6):
    return torch.stack([env.reset()["subnet"] for _ in range(times)])


@contextmanager
def collecting(cls, *args, **kwargs):
    kwargs = {"frames_per_batch": 24, "total_frames": 72, "auto_register_policy_transforms": False, **kwargs}
    collector = cls(*args, **kwargs)
    try:
        yield collector
    finally:
        collector.shutdown()


@pytest.fixture
def start_method(request):
    """Collectors start their workers by the global method: set it, and back."""
    before = mp.get_start_method(allow_none=True)
    mp.set_start_method(request.param, force=True)
    yield request.param
    mp.set_start_method(before, force=True)


fork_and_spawn = pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)], indirect=True)
fork = pytest.mark.parametrize("start_method", ["fork"], indirect=True)
multi_collectors = pytest.mark.parametrize("cls", [MultiSyncCollector, MultiAsyncCollector])


# What TorchRL asks of every transform ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [None, 2])
@pytest.mark.parametrize("lengths", [3, LENGTHS, ((2, 3), (4, 5))])
def test_a_primed_env_keeps_its_specs(lengths, fixed):
    check_env_specs(primed(lengths, 5, fixed=fixed), seed=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_primer_outside_and_inside_a_batched_env_keeps_its_specs(layout):
    with closing(make_env(layout, num_subnets=5)) as env:
        check_env_specs(env, seed=0)
        spec = env.full_observation_spec["subnet"]
        assert (spec.shape, spec.dtype, spec.space.n) == ((3,), torch.int64, 5)
        assert env.reset()["subnet"].shape == (3,)
        assert env.rollout(2)["next", "subnet"].shape == (3, 2)


def test_without_an_environment_it_draws_for_each_element():
    td = SubnetPrimer(MANY, generator=0)(TensorDict(a=torch.zeros(4, 2), batch_size=[4, 2]))
    assert td["subnet"].shape == (4, 2)
    assert td["subnet"].dtype == torch.int64
    assert all_different(td["subnet"].flatten().tolist())
    assert SubnetPrimer(5)(TensorDict())["subnet"].shape == ()


def test_it_works_inside_a_compose_without_an_environment():
    td = Compose(SubnetPrimer(5, generator=0), SubnetPrimer(MANY, key="other", generator=0))(TensorDict(batch_size=[3]))
    assert td["subnet"].max() < 5
    assert all_different(td["other"].tolist())


def test_it_works_before_a_module_that_reads_the_index():
    actor = small_actor(3)
    td = nn.Sequential(SubnetPrimer(3, generator=0), actor)(TensorDict(observation=torch.randn(64, OBS), batch_size=[64]))
    assert td["subnet"].unique().tolist() == [0, 1, 2]
    for k in range(3):
        torch.testing.assert_close(td["loc"][td["subnet"] == k], actor.extract(k)(td.clone())["loc"][td["subnet"] == k])


@pytest.mark.parametrize("cls", [ReplayBuffer, TensorDictReplayBuffer])
def test_in_a_replay_buffer_it_redraws_the_samples_and_leaves_what_is_stored(cls):
    buffer = cls(storage=LazyTensorStorage(100), batch_size=32)
    buffer.append_transform(SubnetPrimer(5, generator=0))
    buffer.extend(TensorDict(a=torch.zeros(100), subnet=torch.full((100,), 7), batch_size=[100]))
    sample = buffer.sample()
    assert sample["subnet"].shape == (32,)
    assert sample["subnet"].unique().tolist() == [0, 1, 2, 3, 4]
    assert (buffer.storage[:]["subnet"] == 7).all()


def test_its_inverse_is_the_identity():
    td = TensorDict(action=torch.zeros(3), subnet=torch.arange(3), batch_size=[3])
    assert (SubnetPrimer(5).inv(td) == td).all()


def test_a_reset_of_a_real_env_draws_and_a_step_carries():
    env = TransformedEnv(GymEnv("Pendulum-v1"), SubnetPrimer(MANY, generator=0))
    first = env.reset()
    assert first["subnet"].shape == ()
    stepped = env.rand_step(first)
    assert stepped["next", "subnet"] == first["subnet"]
    assert env.rand_step(step_mdp(stepped))["next", "subnet"] == first["subnet"]
    assert env.reset()["subnet"] != first["subnet"]


@pytest.mark.slow
def test_it_keeps_the_specs_and_episodes_of_spawned_mujoco_envs():
    def make():
        return TransformedEnv(GymEnv("Hopper-v4"), Compose(DoubleToFloat(), StepCounter(), SubnetPrimer(MANY, generator=0)))

    with closing(ParallelEnv(2, make, mp_start_method="spawn")) as env:
        check_env_specs(env, seed=0)
        data = env.rollout(100, break_when_any_done=False)
    data["played"] = data["subnet"]
    assert data["next", "done"].sum() > 2
    assert all_different(flat(episodes(data)))


# One subnet an episode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_episode_of_each_env_plays_one_subnet_of_its_own(layout):
    with closing(make_env(layout)) as env:
        subnets = episodes(play(env))
    assert [len(row) for row in subnets] == [6, 4, 3]
    assert all_different(flat(subnets))


def test_each_episode_of_a_single_env_plays_one_subnet_of_its_own():
    (subnets,) = episodes(play(primed(3)))
    assert len(subnets) == 4
    assert all_different(subnets)


def test_episodes_that_are_cut_play_one_subnet_each():
    make = [partial(TransformedEnv, CountingEnv(100), StepCounter(max_steps)) for max_steps in LENGTHS]
    env = TransformedEnv(SerialEnv(3, make), SubnetPrimer(MANY))
    data = play(env)
    assert not data["next", "terminated"].any()
    subnets = episodes(data)
    assert [len(row) for row in subnets] == [6, 4, 3]
    assert all_different(flat(subnets))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_partial_reset_leaves_the_other_envs_their_subnet(layout):
    with closing(make_env(layout)) as env:
        before = step_mdp(env.rand_step(env.reset()))
        kept = before["subnet"].clone()
        reset = torch.tensor([[False], [True], [False]])
        after = env.reset(before.set("_reset", reset))["subnet"]
    assert torch.equal(after != kept, reset[:, 0])


@pytest.mark.parametrize("layout", ["outside native", "outside serial"])
def test_the_draws_do_not_depend_on_who_is_reset(layout):
    def last_reset(mask):
        with closing(make_env(layout, generator=0)) as env:
            td = env.reset()
            env.reset(td.set("_reset", torch.tensor(mask)[:, None]))
            return env.reset()["subnet"]

    assert torch.equal(last_reset([True, False, False]), last_reset([False, True, True]))


@pytest.mark.parametrize("layout", ["outside native", "inside serial", "inside parallel fork"])
def test_a_rollout_until_all_are_done_keeps_the_subnets(layout):
    with closing(make_env(layout)) as env:
        data = env.rollout(10, recorder(), break_when_any_done=False, break_when_all_done=True)
    assert data.shape == (3, 5)
    assert (data["subnet"] == data["subnet"][:, :1]).all()
    assert all_different(data["subnet"][:, 0].tolist())


def test_a_rollout_goes_on_with_the_subnet_of_the_given_reset():
    env = primed(LENGTHS)
    first = env.reset()
    data = env.rollout(2, recorder(), auto_reset=False, tensordict=first.clone())
    assert torch.equal(data["subnet"], first["subnet"][:, None].expand(3, 2))


def test_a_step_ignores_the_next_index_of_an_earlier_step():
    env = primed(3)
    stepped = env.rand_step(env.reset())
    stepped["subnet"] = stepped["subnet"] + 1
    assert env.step(stepped)["next", "subnet"] == stepped["subnet"]


def test_an_env_without_batch_lock_carries_the_index_of_any_batch():
    class Unlocked(CountingEnv):
        batch_locked = False

        def _step(self, tensordict):
            zero = torch.zeros(*tensordict.shape, 1)
            out = {"observation": tensordict["observation"] + 1, "reward": zero, "done": zero.bool(), "terminated": zero.bool()}
            return TensorDict(out, batch_size=tensordict.shape)

    env = TransformedEnv(Unlocked(), SubnetPrimer(5))
    check_env_specs(env, seed=0)
    td = TensorDict(observation=torch.zeros(4, OBS), action=torch.zeros(4, ACT), subnet=torch.arange(4), batch_size=[4])
    assert torch.equal(env.step(td)["next", "subnet"], torch.arange(4))


def test_an_env_that_resets_itself_draws_at_each_end():
    base = CountingEnv(LENGTHS, autoreset=True)
    base._torchrl_native_autoreset = True
    env = TransformedEnv(base, Compose(InitTracker(), SubnetPrimer(MANY, generator=0)))
    data, td = [], env.reset()
    for _ in range(12):
        step, td = env.step_and_maybe_reset(recorder()(td))
        data.append(step)
    data = torch.stack(data, -1)
    assert torch.equal(data["is_init"][:, 1:], data["next", "done"][:, :-1])
    subnets = episodes(data)
    assert [len(row) for row in subnets] == [6, 4, 3]
    assert all_different(flat(subnets))


def make_gym_env(length):
    gymnasium = pytest.importorskip("gymnasium")

    class Count(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 100, (OBS,))
        action_space = gymnasium.spaces.Box(-1, 1, (ACT,))

        def reset(self, seed=None, options=None):
            self.count = 0
            return self.observation_space.low, {}

        def step(self, action):
            self.count += 1
            return self.observation_space.low + self.count, 1.0, self.count >= length, False, {}

    return Count()


@pytest.mark.parametrize("mode", ["DISABLED", "SAME_STEP"])
def test_each_episode_of_a_gymnasium_vector_env_plays_one_subnet_of_its_own(mode):
    vector = pytest.importorskip("gymnasium.vector")
    envs = vector.SyncVectorEnv([partial(make_gym_env, n) for n in LENGTHS], autoreset_mode=vector.AutoresetMode[mode])
    env = TransformedEnv(GymWrapper(envs), SubnetPrimer(MANY), auto_unwrap=True)
    data = play(env)
    subnets = episodes(data)
    assert torch.equal(data["observation"][:, 1:, 0] == 0, data["next", "done"][:, :-1, 0])
    assert [len(row) for row in subnets] == [6, 4, 3]
    assert all_different(flat(subnets))
    check_env_specs(env, seed=0)


# Uniform and independent -------------------------------------------------------------------------------------------------


def pvalue(x, y):
    """Of the hypothesis that two sequences of indices are independent."""
    return stats.chi2_contingency(torch.stack([x, y]).unique(dim=1, return_counts=True)[1].reshape(5, 5).numpy()).pvalue


@pytest.mark.parametrize("generator", [None, 0])
@pytest.mark.parametrize("layout", ["outside native", "outside serial"])
def test_draws_are_uniform_and_independent_between_envs_and_episodes(layout, generator):
    draws = resets(make_env(layout, (2, 3), 5, generator=generator), 1000)
    for env in range(2):
        assert stats.chisquare(draws[:, env].bincount(minlength=5).numpy()).pvalue > 0.01
        assert pvalue(draws[:-1, env], draws[1:, env]) > 0.01
    assert pvalue(draws[:, 0], draws[:, 1]) > 0.01


@pytest.mark.parametrize("generator", [None, 0, "shared"])
def test_draws_are_uniform_and_independent_between_forked_workers(generator):
    generator = torch.Generator().manual_seed(0) if generator == "shared" else generator
    with closing(make_env("inside parallel fork", (2, 3), 5, generator=generator)) as env:
        draws = resets(env, 500)
    # A worker's stream depends on its process, so that these are other numbers in each run. Equal streams have one of 1e-100.
    for worker in range(2):
        assert stats.chisquare(draws[:, worker].bincount(minlength=5).numpy()).pvalue > 1e-5
    assert pvalue(draws[:, 0], draws[:, 1]) > 1e-5


def test_every_subnet_plays_and_none_else():
    assert resets(primed((1,) * 50, 3, generator=0)).unique().tolist() == [0, 1, 2]
    assert not resets(primed((1,) * 50, 1)).any()


# Where the randomness comes from -----------------------------------------------------------------------------------------


def test_an_integer_repeats_the_draws_and_another_does_not():
    first = resets(primed(LENGTHS, generator=0))
    torch.manual_seed(1)
    assert torch.equal(resets(primed(LENGTHS, generator=0)), first)
    assert (resets(primed(LENGTHS, generator=1)) != first).all()


def test_without_a_generator_the_global_seed_repeats_the_draws():
    def draws(seed):
        torch.manual_seed(seed)
        return resets(primed(LENGTHS))

    assert torch.equal(draws(0), draws(0))
    assert (draws(0) != draws(1)).all()


@pytest.mark.parametrize("generator", [0, torch.Generator().manual_seed(0)])
def test_a_seeded_primer_leaves_the_global_generator_alone(generator):
    before = torch.get_rng_state()
    env = primed(LENGTHS, generator=generator)
    play(env)
    env.load_state_dict(env.state_dict())
    copy.deepcopy(env).reset()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fixed_primer_draws_nothing():
    before = torch.get_rng_state()
    play(primed(LENGTHS, fixed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_primers_that_share_a_generator_draw_from_one_stream():
    generator = torch.Generator().manual_seed(0)
    first, second = primed(3, generator=generator), primed(3, generator=generator)
    mixed = [first.reset()["subnet"], second.reset()["subnet"], first.reset()["subnet"]]
    assert torch.equal(torch.stack(mixed), resets(primed(3, generator=torch.Generator().manual_seed(0)), 3))


def test_primers_with_one_integer_repeat_each_other_in_one_process():
    draws = resets(make_env("inside serial", generator=0))
    assert (draws == draws[:, :1]).all()


def test_primers_in_one_process_differ_without_a_seed_and_with_a_shared_generator():
    for generator in (None, torch.Generator().manual_seed(0)):
        assert all_different(resets(make_env("inside serial", generator=generator)).flatten().tolist())


def primed_in_a_seeded_process(*args, **kwargs):
    """For spawned workers, whose global generators otherwise start anywhere; all workers get the same seed."""
    torch.manual_seed(0)
    return primed(*args, **kwargs)


@pytest.fixture
def program(monkeypatch):
    """Start to count processes anew, as in a program that is run again: ``program()``, with ``generator``'s source."""

    def start(generator):
        torch.manual_seed(0)
        monkeypatch.setattr(multiprocessing.process, "_process_counter", itertools.count(1))
        return torch.Generator().manual_seed(0) if generator == "shared" else generator

    return start


def sources(*spawned):
    """Of randomness: all in forked workers, and a few in spawned ones."""
    slow = [pytest.param("spawn", generator, marks=pytest.mark.slow) for generator in spawned]
    return [("fork", None), ("fork", 0), ("fork", "shared"), *slow]


@pytest.mark.parametrize(("method", "generator"), sources(None, "shared"))
def test_workers_differ_and_repeat_themselves_when_the_program_does(program, method, generator):
    def draws():
        make = partial(primed_in_a_seeded_process, 3, generator=program(generator))
        with closing(ParallelEnv(2, make, mp_start_method=method)) as env:
            return resets(env)

    first = draws()
    assert all_different(first.flatten().tolist())
    assert torch.equal(draws(), first)


def test_workers_draw_otherwise_from_another_generator(program):
    def draws(seed):
        program(None)
        generator = torch.Generator().manual_seed(seed)
        with closing(ParallelEnv(2, partial(primed, 3, generator=generator), mp_start_method="fork")) as env:
            return resets(env)

    assert all_different([*draws(0).flatten().tolist(), *draws(1).flatten().tolist()])


@pytest.mark.slow
def test_spawned_workers_without_any_seed_differ():
    with closing(ParallelEnv(2, partial(primed, 3), mp_start_method="spawn")) as env:
        assert all_different(resets(env).flatten().tolist())


def test_forked_workers_differ_from_a_parent_that_drew_already():
    env = primed(3, generator=0)
    parent = resets(env)
    with closing(ParallelEnv(2, partial(itself, env), mp_start_method="fork")) as workers:
        draws = resets(workers)
    assert all_different([*parent.tolist(), *draws.flatten().tolist()])


@pytest.mark.parametrize(("start_method", "generator"), sources(0), indirect=["start_method"])
def test_workers_of_a_collector_differ_and_repeat_themselves_when_the_program_does(start_method, program, generator):
    def draws():
        make = [partial(primed_in_a_seeded_process, 1, generator=program(generator))] * 2
        with collecting(MultiSyncCollector, make, recorder(), total_frames=24) as collector:
            return next(iter(collector))["subnet"]

    first = draws()
    assert all_different(first.flatten().tolist())
    assert torch.equal(draws(), first)


def test_workers_of_an_env_creator_differ():
    creator = EnvCreator(partial(primed, 3))
    with closing(ParallelEnv(2, creator, mp_start_method="fork")) as env:
        assert all_different(resets(env).flatten().tolist())


# State -------------------------------------------------------------------------------------------------------------------


def load(receiver, env, state):
    receiver.load_state_dict(state)
    if isinstance(env, ParallelEnv):
        # TorchRL 0.14.1 leaves the workers' flags up, and then reads their next answers too early (pytorch/rl#4341).
        env._shm_done_flags[:] = [0] * env.num_workers


@pytest.mark.parametrize("layout", [*SERIAL, *FORKED])
def test_a_state_dict_repeats_the_draws_that_follow(layout):
    with closing(make_env(layout)) as env:
        resets(env)
        state = copy.deepcopy(env.state_dict())
        following = resets(env)
        assert (resets(env) != following).all()
        load(env, env, state)
        assert torch.equal(resets(env), following)
    with closing(make_env(layout)) as other:
        load(other, other, state)
        assert torch.equal(resets(other), following)


def test_a_state_dict_survives_a_checkpoint_without_pickle(tmp_path):
    env = primed(LENGTHS)
    torch.save(env.state_dict(), tmp_path / "state.pt")
    following = resets(env)
    env.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resets(env), following)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("compose", [False, True])
def test_a_copied_env_starts_its_seeded_stream_anew(copied, compose):
    primer = SubnetPrimer(MANY, generator=0)
    env = TransformedEnv(CountingEnv(LENGTHS), Compose(StepCounter(), primer) if compose else primer)
    first = resets(env)
    other = copied(env)
    check_env_specs(other, seed=0)
    assert torch.equal(resets(copied(env)), first)
    assert (resets(env) != first).all()


def test_a_copied_env_without_a_seed_draws_on_its_own():
    env = primed(3)
    env.reset()
    draws = [*resets(env).tolist(), *resets(copy.deepcopy(env)).tolist(), *resets(pickle.loads(pickle.dumps(env))).tolist()]
    assert all_different(draws)


def test_a_serial_env_of_one_env_draws_for_each_copy():
    env = primed(3)
    assert all_different(resets(SerialEnv(3, partial(itself, env))).flatten().tolist())


def sources_of_a_stream():
    return {"int": 0, "generator": torch.Generator().manual_seed(0), "none": None}


@pytest.mark.parametrize("source", ["int", "generator", "none"])
@pytest.mark.parametrize("compose", [False, True])
def test_a_clone_in_another_env_draws_from_a_stream_of_its_own(source, compose):
    def play(evaluate):
        torch.manual_seed(0)
        primer = SubnetPrimer(MANY, generator=sources_of_a_stream()[source])
        env = TransformedEnv(CountingEnv(3), Compose(StepCounter(), primer) if compose else primer)
        draws, evaluations = [], []
        for _ in range(4):
            if evaluate:
                other = TransformedEnv(CountingEnv(3), env.transform.clone())
                evaluations += resets(other, 2).tolist()
                other.state_dict()
            draws += resets(env, 2).tolist()
        return draws, evaluations, torch.get_rng_state()

    draws, evaluations, state = play(evaluate=True)
    alone, _, state_alone = play(evaluate=False)
    assert draws == alone
    assert torch.equal(state, state_alone)
    assert all_different([*draws, *evaluations])
    assert play(evaluate=True)[1] == evaluations


def test_clones_of_two_primers_draw_on_their_own():
    env = TransformedEnv(CountingEnv(3), Compose(SubnetPrimer(MANY), SubnetPrimer(MANY, key="other")))
    td = TransformedEnv(CountingEnv(3), env.transform.clone()).reset()
    assert td["subnet"] != td["other"]


def test_a_clone_of_a_primer_without_an_env_draws_from_a_stream_of_its_own():
    primer = SubnetPrimer(MANY, generator=0)
    clones = [primer.clone(), Compose(primer).clone()[0], primer.clone().clone()]
    envs = [TransformedEnv(CountingEnv(3), each) for each in (primer, *clones, copy.deepcopy(primer.clone()))]
    assert all_different(flat(resets(env).tolist() for env in envs[:-1]))
    assert (resets(envs[-1]) != resets(primed(3, generator=0))).all()


@pytest.mark.parametrize("generator", [0, None, torch.Generator().manual_seed(0)])
def test_a_seeded_primer_draws_what_one_built_with_the_seed_does(generator):
    env = primed(3, generator=generator)
    resets(env)
    env.set_seed(7)
    env.transform.set_seed(7)
    first = resets(env)
    assert torch.equal(first, resets(primed(3, generator=7)))
    other = TransformedEnv(CountingEnv(3), env.transform.clone())
    other.transform.set_seed(7)
    assert torch.equal(resets(other), first)
    with pytest.raises(TypeError, match=r"must be a torch\.Generator, an int or None, got 'seven'"):
        env.transform.set_seed("seven")


def test_a_clone_in_the_env_of_its_original_goes_on_with_the_stream():
    env = primed(3, generator=0)
    env.insert_transform(0, StepCounter())
    assert torch.equal(resets(env), resets(primed(3, generator=0)))
    env = primed(3, generator=0)
    wrapped = TransformedEnv(env, StepCounter(), auto_unwrap=True)
    draws = [env.reset()["subnet"], wrapped.reset()["subnet"], env.reset()["subnet"]]
    assert torch.equal(torch.stack(draws), resets(primed(3, generator=0), 3))
    check_env_specs(wrapped, seed=0)


def test_a_primer_moves_to_an_env_of_another_batch_size():
    env = primed(LENGTHS)
    check_env_specs(env, seed=0)
    other = TransformedEnv(CountingEnv((2, 3)), env.transform.clone())
    check_env_specs(other, seed=0)
    assert other.reset()["subnet"].shape == (2,)


# Collectors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_trajectory_of_a_collector_plays_one_subnet_of_its_own(layout):
    with collecting(Collector, make_env(layout), recorder()) as collector:
        batches = list(collector)
    assert torch.cat(batches, 1).shape == (3, 24)
    subnets = trajectories(batches)
    assert len(subnets) == 12 + 8 + 5
    assert all_different(subnets.values())
    assert sorted(flat(episodes(torch.cat(batches, 1)))) == sorted(subnets.values())


@fork_and_spawn
@multi_collectors
def test_each_trajectory_of_a_multi_collector_plays_one_subnet_of_its_own(cls, start_method):
    with collecting(cls, [partial(primed, 2), partial(primed, 5)], recorder()) as collector:
        subnets = trajectories(collector)
    assert len(subnets) > 72 / 5
    assert all_different(subnets.values())


@fork
def test_each_trajectory_of_workers_with_serial_envs_plays_one_subnet_of_its_own(start_method):
    make = [partial(make_env, "outside serial", LENGTHS, generator=0), partial(make_env, "inside serial", LENGTHS)]
    with collecting(MultiSyncCollector, make, recorder(), cat_results="stack") as collector:
        batches = list(collector)
    assert batches[0].shape == (2, 3, 4)
    subnets = trajectories(batches)
    assert len(subnets) == 2 * (6 + 4 + 3)
    assert all_different(subnets.values())


@pytest.mark.parametrize("layout", ["outside native", "outside serial", "inside parallel fork"])
def test_a_collector_resumes_the_draws_from_its_state_dict(layout):
    with collecting(Collector, make_env(layout, (1, 1)), recorder()) as first:
        batches = iter(first)
        next(batches)
        state = copy.deepcopy(first.state_dict())
        following = next(batches)["subnet"]
    with collecting(Collector, make_env(layout, (1, 1)), recorder(), total_frames=96) as second:
        load(second, second.env, state)
        resumed = next(iter(second))["subnet"]
    # The first episode was drawn when the collector was built.
    assert torch.equal(resumed[:, 1:], following[:, 1:])


@fork
def test_a_multi_collector_resumes_the_draws_of_each_worker_from_its_state_dict(start_method):
    make = [partial(primed, 1)] * 2
    with collecting(MultiSyncCollector, make, recorder()) as first:
        batches = iter(first)
        next(batches)
        state = copy.deepcopy(first.state_dict())
        following = next(batches)["subnet"]
    with collecting(MultiSyncCollector, make, recorder(), total_frames=96) as second:
        second.load_state_dict(state)
        resumed = next(iter(second))["subnet"]
    assert torch.equal(resumed[:, 1:], following[:, 1:])


# The primer that an actor offers -----------------------------------------------------------------------------------------


def primers_of(env):
    transforms = env.transform if isinstance(env.transform, Compose) else [env.transform]
    return [transform for transform in transforms if isinstance(transform, TensorDictPrimer)]


def assert_acts_by_the_index(actor, data):
    """The collected deterministic action is the one of the collected subnet, for every subnet."""
    assert data["subnet"].unique().tolist() == list(range(actor.num_subnets))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for k in range(actor.num_subnets):
            played = data["subnet"] == k
            torch.testing.assert_close(data["action"][played], actor.extract(k)(data.select("observation"))["action"][played])


COLLECT_ACTOR = {
    "frames_per_batch": 120,
    "total_frames": 120,
    "auto_register_policy_transforms": True,
    "exploration_type": ExplorationType.DETERMINISTIC,
}


def test_a_collector_adds_the_primer_that_the_actor_offers():
    actor = small_actor()
    with collecting(Collector, CountingEnv(LENGTHS), actor, **COLLECT_ACTOR) as collector:
        (primer,) = primers_of(collector.env)
        assert isinstance(primer, SubnetPrimer)
        data = next(iter(collector))
    assert_acts_by_the_index(actor, data)
    assert (data["subnet"][:, 1:] == data["subnet"][:, :-1])[~data["is_init"][:, 1:, 0]].all()
    assert data["is_init"].sum() == 20 + 14 + 8


@fork_and_spawn
@multi_collectors
def test_multi_collectors_add_the_primer_that_the_actor_offers(cls, start_method):
    actor = small_actor()
    with collecting(cls, [partial(CountingEnv, 2), partial(CountingEnv, 3)], actor, **COLLECT_ACTOR) as collector:
        data = next(iter(collector))
    assert_acts_by_the_index(actor, data)
    steps = data["collector", "traj_ids"].diff(dim=-1) == 0
    assert (data["subnet"].diff(dim=-1)[steps] == 0).all()


@pytest.mark.parametrize("layout", ["outside serial", "inside serial"])
def test_a_collector_adds_no_primer_where_there_is_one(layout):
    with collecting(Collector, make_env(layout, num_subnets=3, fixed=2), small_actor(3), **COLLECT_ACTOR) as collector:
        assert len(primers_of(collector.env)) == (layout == "outside serial")
        assert (next(iter(collector))["subnet"] == 2).all()


def test_the_offered_primer_takes_the_actors_number_and_key():
    primer = small_actor(4, subnet_key=("agents", "subnet")).make_tensordict_primer(generator=0, fixed=3)
    assert (primer.num_subnets, primer.key, primer.fixed) == (4, ("agents", "subnet"), 3)
    assert SubnetPrimer(4, key=("subnet",)).key == "subnet"


# Fixed -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*SERIAL, *FORKED])
def test_a_fixed_index_plays_every_episode(layout):
    with closing(make_env(layout, fixed=4)) as env:
        assert set(flat(episodes(play(env)))) == {4}


@pytest.mark.parametrize("layout", ["outside native", "outside serial", "outside parallel fork"])
def test_a_fixed_tensor_plays_one_subnet_in_each_env(layout):
    with closing(make_env(layout, fixed=torch.tensor([2, 0, 1]))) as env:
        data = play(env)
    assert torch.equal(data["subnet"], torch.tensor([2, 0, 1])[:, None].expand(3, 12))
    assert torch.equal(data["next", "subnet"], data["subnet"])


def test_fixed_is_set_and_unset_later_and_then_holds_from_the_next_reset():
    env = primed(LENGTHS, generator=0)
    td = env.reset()
    env.transform.fixed = 3
    assert torch.equal(env.rand_step(td)["next", "subnet"], td["subnet"])
    assert env.reset()["subnet"].tolist() == [3, 3, 3]
    env.transform.fixed = torch.tensor([0, 1, 2])
    assert env.reset()["subnet"].tolist() == [0, 1, 2]
    env.transform.fixed = None
    assert all_different(env.reset()["subnet"].tolist())


def test_a_partial_reset_changes_to_the_fixed_index_only_who_is_reset():
    env = primed(LENGTHS, fixed=1)
    td = env.reset()
    env.transform.fixed = 2
    assert env.reset(td.set("_reset", torch.tensor([[True], [False], [False]])))["subnet"].tolist() == [2, 1, 1]


def test_writing_into_a_reset_changes_neither_the_fixed_index_nor_other_envs():
    fixed = torch.tensor(1)
    env = primed(LENGTHS, fixed=fixed)
    env.reset()["subnet"][0] = 7
    assert env.reset()["subnet"].tolist() == [1, 1, 1]
    assert fixed == 1


def test_an_evaluation_with_a_fixed_index_plays_that_subnet():
    actor = small_actor()
    env = primed(LENGTHS, 3)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for k in range(3):
            env.transform.fixed = k
            data = env.rollout(6, actor, break_when_any_done=False)
            plain = CountingEnv(LENGTHS).rollout(6, actor.extract(k), break_when_any_done=False)
            torch.testing.assert_close(data["action"], plain["action"])
            assert (data["subnet"] == k).all()


# Environments ------------------------------------------------------------------------------------------------------------


def test_the_specs_and_the_fake_tensordict_hold_the_index():
    env = primed(LENGTHS, 5)
    assert "subnet" in env.specs["output_spec", "full_observation_spec"]
    fake = env.fake_tensordict()
    assert fake["subnet"].shape == fake["next", "subnet"].shape == (3,)
    assert fake["subnet"].dtype == torch.int64
    assert env.full_observation_spec["subnet"].is_in(env.reset()["subnet"])


def test_it_can_be_appended_and_inserted_anywhere():
    others = [InitTracker, partial(RewardSum, in_keys=["reward"]), StepCounter]
    draws = []
    for place in range(4):
        env = TransformedEnv(CountingEnv(LENGTHS), Compose(*(make() for make in others)))
        env.observation_spec  # noqa: B018 the specs are cached, and must be made anew
        primer = SubnetPrimer(MANY, generator=0)
        env = env.append_transform(primer) if place == 3 else env.insert_transform(place, primer)
        draws.append(play(env)["subnet"])
        check_env_specs(env, seed=0)
    assert all(torch.equal(draw, draws[0]) for draw in draws)


def test_a_cast_of_all_observations_leaves_the_index_an_integer():
    env = TransformedEnv(CountingEnv(LENGTHS), Compose(SubnetPrimer(5), DoubleToFloat()))
    assert env.reset()["subnet"].dtype == env.full_observation_spec["subnet"].dtype == torch.int64


def test_an_env_moves_to_a_device_with_its_primer():
    env = primed(LENGTHS, generator=0).to("cpu")
    assert env.reset()["subnet"].device == torch.device("cpu")
    assert env.full_observation_spec["subnet"].device == env.full_state_spec["subnet"].device == torch.device("cpu")
    check_env_specs(env, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("generator", [None, 0, "cuda"])
def test_an_env_on_a_gpu_plays_there(generator):
    generator = torch.Generator("cuda").manual_seed(0) if generator == "cuda" else generator
    env = primed(LENGTHS, generator=generator).to("cuda")
    check_env_specs(env, seed=0)
    policy = TensorDictModule(lambda o, k: (o[..., :ACT] * 0, k.clone()), ["observation", "subnet"], ["action", "played"])
    data = env.rollout(12, policy, break_when_any_done=False)
    assert data["subnet"].is_cuda
    assert all_different(flat(episodes(data)))
    state = env.state_dict()
    following = resets(env)
    env.load_state_dict({key: value.cuda() for key, value in state.items()})
    assert torch.equal(resets(env), following)


@pytest.mark.parametrize("fixed", [None, 2])
@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("agents_end_alone", [False, True])
def test_a_nested_key_draws_for_each_agent(batch, agents_end_alone, fixed):
    key = ("agents", "subnet")
    env = TransformedEnv(Agents(batch, agents_end_alone), SubnetPrimer(MANY, key=key, fixed=fixed, generator=0))
    check_env_specs(env, seed=0)
    first = env.reset()[key]
    assert first.shape == (*batch, 3)
    assert first.dtype == torch.int64
    if fixed is None:
        assert all_different(first.flatten().tolist())
    else:
        assert (first == fixed).all()


@pytest.mark.parametrize("reset_key", [None, ("agents", "_reset")])
def test_a_key_outside_the_group_whose_episodes_end_is_refused(reset_key):
    env = TransformedEnv(Agents(agents_end_alone=True), SubnetPrimer(MANY, reset_key=reset_key))
    with pytest.raises(ValueError, match=r"'subnet' would be drawn once and never again: .* Use key=\('agents', 'subnet'\)"):
        env.rollout(3)
    env = TransformedEnv(Agents(agents_end_alone=True), SubnetPrimer(MANY, key=("agents", "subnet"), reset_key=reset_key))
    assert len(env.rollout(12, break_when_any_done=False)["agents", "subnet"].unique()) > 12


def test_agents_that_end_alone_draw_alone():
    key = ("agents", "subnet")
    env = TransformedEnv(Agents((4,), agents_end_alone=True), SubnetPrimer(MANY, key=key, generator=0))
    data = env.rollout(6, break_when_any_done=False)
    subnet, done = data[key], data["next", "agents", "done"][..., 0]
    assert torch.equal(subnet[:, 1:] != subnet[:, :-1], done[:, :-1])
    assert done.sum((0, 1)).tolist() == [24, 12, 8]
    assert torch.equal(data["next", "agents", "subnet"][~done], subnet[~done])


def test_agents_that_end_together_draw_together():
    key = ("agents", "subnet")
    env = TransformedEnv(SerialEnv(2, Agents), SubnetPrimer(MANY, key=key, generator=0))
    data = env.rollout(6, break_when_any_done=False)
    subnet, done = data[key], data["next", "done"]
    assert torch.equal(subnet[:, 1:] != subnet[:, :-1], done[:, :-1].expand(2, 5, 3))
    assert subnet[:, ::3].unique().numel() == 12


def test_a_nested_key_in_an_env_without_that_group_has_the_batch_of_the_env():
    env = TransformedEnv(CountingEnv(LENGTHS), SubnetPrimer(5, key=("policy", "subnet")))
    check_env_specs(env, seed=0)
    assert env.rollout(2)["policy", "subnet"].shape == (3, 2)
    assert SubnetPrimer(5, key=("policy", "subnet"))(TensorDict(batch_size=[4]))["policy", "subnet"].shape == (4,)


def test_without_an_environment_a_nested_key_draws_for_each_element_of_its_group():
    td = TensorDict(agents=TensorDict(observation=torch.zeros(4, 3, OBS), batch_size=[4, 3]), batch_size=[4])
    assert SubnetPrimer(5, key=("agents", "subnet"))(td)["agents", "subnet"].shape == (4, 3)


def test_two_primers_in_one_env_draw_on_their_own():
    transforms = Compose(SubnetPrimer(MANY, generator=0), SubnetPrimer(MANY, key="critic", generator=1))
    env = TransformedEnv(CountingEnv(LENGTHS), transforms)
    check_env_specs(env, seed=0)
    td = env.reset()
    assert all_different([*td["subnet"].tolist(), *td["critic"].tolist()])


# Errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_subnets", [0, -1, True, 2.5, "5", None])
def test_a_number_of_subnets_that_is_none_raises(num_subnets):
    with pytest.raises(ValueError, match=f"num_subnets must be an int of at least 1, got {num_subnets!r}"):
        SubnetPrimer(num_subnets)


@pytest.mark.parametrize("fixed", [-1, 3, torch.tensor([0, 3]), torch.tensor([[-1], [0]])])
def test_a_fixed_index_out_of_range_raises_where_it_is_set(fixed):
    with pytest.raises(ValueError, match=r"fixed must be in \[0, num_subnets=3\), got"):
        SubnetPrimer(3, fixed=fixed)
    primer = SubnetPrimer(3, fixed=1)
    with pytest.raises(ValueError, match=r"fixed must be in \[0, num_subnets=3\), got"):
        primer.fixed = fixed
    assert primer.fixed == 1


@pytest.mark.parametrize("fixed", [1.0, True, torch.tensor(1.0), torch.tensor([0, 1], dtype=torch.int32)])
def test_a_fixed_index_that_is_not_int64_raises(fixed):
    with pytest.raises(TypeError, match="fixed must be an int or an int64 tensor, got torch"):
        SubnetPrimer(3, fixed=fixed)


@pytest.mark.parametrize("layout", ["outside native", "outside serial", "inside serial"])
def test_fixed_indices_of_another_batch_shape_raise_and_say_both_shapes(layout):
    env = make_env(layout, fixed=torch.tensor([0, 1]))
    shape = r"\(\)" if layout.startswith("inside") else r"\(3,\)"
    with pytest.raises(ValueError, match=rf"one per environment, of shape {shape}, got shape \(2,\)"):
        env.reset()


@pytest.mark.parametrize("generator", ["0", 1.0, True, [0]])
def test_a_generator_of_another_type_raises(generator):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, an int or None, got"):
        SubnetPrimer(3, generator=generator)


def test_a_step_without_the_index_says_where_it_comes_from():
    env = primed(3)
    with pytest.raises(KeyError, match="no 'subnet', which is drawn at reset"):
        env.rand_step(env.base_env.reset())


def test_several_reset_keys_ask_for_the_one_to_use():
    class TwoDones(CountingEnv):
        def __init__(self):
            super().__init__(3)
            done = Binary(shape=(1,), dtype=torch.bool)
            self.done_spec = Composite(done=done, a=Composite(done=done.clone()))

        def _observe(self, done):
            return super()._observe(done).update({"a": {"done": done.clone(), "terminated": done.clone()}})

    with pytest.raises(RuntimeError, match="providing the reset key"):
        TransformedEnv(TwoDones(), SubnetPrimer(5)).reset()
    check_env_specs(TransformedEnv(TwoDones(), SubnetPrimer(5, reset_key="_reset")), seed=0)


def test_its_repr_tells_what_it_draws():
    primer = SubnetPrimer(5, fixed=torch.tensor([1, 2]))
    assert repr(primer) == "SubnetPrimer(num_subnets=5, key='subnet', fixed=[1, 2])"
