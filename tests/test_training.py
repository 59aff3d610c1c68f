"""The loop: what happens at which frame, whatever else happens around it."""

import dataclasses
import math
import os
import signal
import time

import gymnasium
import numpy as np
import pytest
import torch
from torch.optim import Adam
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, PrioritizedSampler, ReplayBuffer, TensorDictReplayBuffer

from omnet_torchrl import GatherStorage, OMNetSACLoss, SubnetPrimer, Update, make_actor, make_qvalue
from omnet_torchrl.training import Trainer, evaluate, make_env
from omnet_torchrl.training.loop.stopping import check_stop
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.record.checkpoint import Checkpointer
from omnet_torchrl.updates import compiled as compiled_module

PENDULUM = "InvertedPendulum-v4"


class Diary:
    """A reporter that remembers."""

    def __init__(self):
        self.rows, self.said, self.seen = [], [], []

    def log(self, frames, seconds, metrics):
        self.rows += [(frames, name, float(value)) for name, value in metrics.items()]

    def progress(self, frames, updates, metrics):
        self.seen.append((frames, updates))

    def say(self, text):
        self.said.append(text)

    def position(self):
        return len(self.rows)

    def restore(self, position):
        del self.rows[position:]

    def frames(self, name):
        return [frames for frames, key, _ in self.rows if key == name]

    def untimed(self):
        """The rows as text, which tells nan from another number, without those of the clock."""
        return [(frames, name, repr(value)) for frames, name, value in self.rows if not name.startswith("time/")]


def make_trainer(
    path, env=PENDULUM, *, num_envs=1, seed=0, evaluation=None, diary=None, capacity=None, policy=None, buffer=None, **schedule
):
    """A trainer of small networks; ``policy(actor)`` acts in the place of the actor."""
    schedule = {
        **{"total_frames": 60, "init_random_frames": 20, "utd_ratio": 1, "policy_update_delay": 2, "batch_size": 8},
        **{"log_interval": 10, "eval_interval": 30, "checkpoint_interval": 0, "seed": seed},
        **schedule,
    }
    torch.manual_seed(seed)
    primer = SubnetPrimer(3, generator=seed)
    env = make_env(env, primer, num_envs=num_envs, seed=seed)
    sizes = {"num_subnets": 3, "sparsity": 0.2, "num_cells": (8, 8), "generator": 1}
    actor = make_actor(env.observation_spec, env.action_spec, **sizes)
    qvalue = make_qvalue(env.observation_spec, env.action_spec, **sizes)
    loss = OMNetSACLoss(actor, qvalue)
    loss.make_value_estimator(gamma=0.99)
    critic_optim = Adam(qvalue.parameters(), lr=1e-3)
    actor_optim = Adam([*actor.parameters(), loss.log_alpha], lr=1e-3)
    options = {"tau": 0.01, "policy_update_delay": schedule["policy_update_delay"], "compile": False}
    update = Update(loss, [critic_optim, actor_optim], **options)
    collector = Collector(
        env,
        actor if policy is None else policy(actor),
        frames_per_batch=num_envs or 1,
        init_random_frames=schedule["init_random_frames"],
        policy_device="cpu",
        env_device="cpu",
        storing_device="cpu",
        auto_register_policy_transforms=False,
        track_traj_ids=False,
    )
    if buffer is None:
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity or schedule["total_frames"]))
    if evaluation is None:
        evaluation = lambda frames: {"eval/return": float(frames)}  # noqa: E731
    reporter = Diary() if diary is None else diary
    for group, name in (("optim", "batch_size"), ("eval", "interval"), ("checkpoint", "interval")):
        value = schedule.pop(f"{group}_{name}" if group != "optim" else name)
        schedule[group] = dataclasses.replace(getattr(TrainConfig(), group), **{name: value})
    config = TrainConfig(**schedule)
    return Trainer(collector, buffer, update, evaluation, Checkpointer(path), reporter, config)


def spy(trainer):
    """Which steps are made at which number of frames."""
    steps, run = [], trainer.update._run

    def call(schedule, *args):
        steps.extend((trainer.frames, name) for name, _ in schedule)
        return run(schedule, *args)

    trainer.update._run = call
    return steps


def saves(trainer):
    """The frames of the checkpoints that are written."""
    frames, save = [], trainer.checkpointer.save

    def call(number, *args):
        frames.append(number)
        save(number, *args)

    trainer.checkpointer.save = call
    return frames


def transitions(trainer):
    return trainer.buffer.storage.get(slice(0, len(trainer.buffer)))


def weights(trainer):
    return {key: value.clone() for key, value in trainer.update.loss.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


# The schedule.


@pytest.mark.parametrize(
    ("utd_ratio", "num_envs", "delay"), [(20, 1, 20), (20, 1, 7), (0.5, 1, 2), (1, 3, 2), (0.5, 3, 1), (20, 3, 3), (0.3, 1, 1)]
)
def test_updates_are_due_by_the_number_of_frames(utd_ratio, num_envs, delay, tmp_path):
    frames = {"total_frames": 27, "init_random_frames": 12, "utd_ratio": utd_ratio, "policy_update_delay": delay}
    trainer = make_trainer(tmp_path, num_envs=num_envs, **frames)
    steps = spy(trainer)
    assert trainer.run() == "finished"
    assert trainer.frames == 27
    critics = [frame for frame, name in steps if name == "critic"]
    for frame in range(num_envs, 28, num_envs):
        due = math.floor(max(0, frame - 12) * utd_ratio + 1e-9)
        assert sum(at <= frame for at in critics) == due
        assert (frame, due) in trainer.reporter.seen
    # The actor follows every delay-th critic update, at once.
    expected = []
    for number, frame in enumerate(critics, 1):
        expected += [(frame, "critic")] + [(frame, "actor")] * (number % delay == 0)
    assert steps == expected


@pytest.mark.parametrize("num_envs", [1, 3])
def test_actions_are_random_first_and_the_policys_then(num_envs, tmp_path):
    trainer = make_trainer(tmp_path, num_envs=num_envs, total_frames=60, init_random_frames=30)
    for name, parameter in trainer.update.loss.named_parameters():
        if name.startswith("actor") and parameter.shape == (2,):
            parameter.data.copy_(torch.tensor([50.0, -20.0]))  # a policy that always chooses the upper bound
    trainer.config.policy_update_delay = 10**6
    trainer.run()
    actions = transitions(trainer)["action"]
    high = trainer.collector.env.action_spec.space.high.flatten()[0]
    assert (actions[:30] < 0.99 * high).all()
    assert (actions[:30].std() - high / 3**0.5).abs() < 0.3 * high  # uniform
    assert (actions[30:] > 0.99 * high).all()


@pytest.mark.parametrize(("num_envs", "expected"), [(1, [10, 20, 30]), (3, [12, 21, 30]), (4, [12, 20, 32])])
def test_rows_evaluations_and_checkpoints_come_where_their_interval_is_crossed(num_envs, expected, tmp_path):
    total = 32 if num_envs == 4 else 30
    every = {"log_interval": 10, "eval_interval": 10, "checkpoint_interval": 10, "utd_ratio": 2}
    init = 2 * num_envs if num_envs > 1 else 4
    trainer = make_trainer(tmp_path, num_envs=num_envs, total_frames=total, init_random_frames=init, **every)
    saved = saves(trainer)
    trainer.run()
    assert trainer.reporter.frames("eval/return") == expected
    logged = trainer.reporter.frames("train/loss_qvalue")
    assert logged == expected
    assert trainer.reporter.frames("train/alpha") == logged
    assert saved == expected
    assert trainer.checkpointer.load()[0]["frames"] == total


def test_an_evaluation_and_a_checkpoint_end_a_run(tmp_path):
    trainer = make_trainer(tmp_path, total_frames=35, eval_interval=20, checkpoint_interval=20)
    saved = saves(trainer)
    trainer.run()
    assert trainer.reporter.frames("eval/return") == [20, 35]
    assert saved == [20, 35]


@pytest.mark.parametrize(("utd_ratio", "delay", "init"), [(0.5, 1, 21), (0.25, 1, 20), (1, 7, 20), (0.3, 3, 20), (1, 20, 25)])
def test_rows_are_logged_also_where_no_update_falls_on_their_frame(utd_ratio, delay, init, tmp_path):
    """The first frame with an update at or after the crossing; of the actor, the newest values there are."""
    schedule = {"utd_ratio": utd_ratio, "policy_update_delay": delay, "init_random_frames": init, "total_frames": 80}
    trainer = make_trainer(tmp_path, **schedule)
    steps = spy(trainer)
    trainer.run()
    critic, actor = ([frame for frame, name in steps if name == kind] for kind in ("critic", "actor"))
    expected = sorted({min(f for f in critic if f >= n) for n in range(10, 81, 10) if critic[0] <= n <= critic[-1]})
    assert trainer.reporter.frames("train/loss_qvalue") == expected
    assert trainer.reporter.frames("subnets/q_std") == expected
    assert trainer.reporter.frames("train/loss_actor") == [frame for frame in expected if frame >= actor[0]]


def test_each_episode_that_ends_is_a_row(tmp_path):
    trainer = make_trainer(tmp_path, num_envs=3, total_frames=90, init_random_frames=60)
    trainer.run()
    data = transitions(trainer)
    returns, expected = [0.0, 0.0, 0.0], []
    for i, (reward, done) in enumerate(zip(data["next", "reward"], data["next", "done"], strict=True)):
        returns[i % 3] += reward.item()
        if done:
            expected.append((i // 3 * 3 + 3, "train/episode_return", returns[i % 3]))
            returns[i % 3] = 0.0
    assert len(expected) > 3
    assert [row for row in trainer.reporter.rows if row[1] == "train/episode_return"] == expected
    assert len(trainer.reporter.frames("train/episode_length")) == len(expected)


def test_an_episode_is_played_by_one_subnetwork(tmp_path):
    trainer = make_trainer(tmp_path, num_envs=2, total_frames=80)
    seen, collect = [], trainer._collect
    trainer._collect = lambda collected: seen.append(collect(collected)) or seen[-1]
    trainer.run()
    drawn = []
    for env in range(2):
        steps = torch.stack([data[env] for data in seen])
        assert torch.equal(steps["subnet"], steps["next", "subnet"])
        ends = steps["next", "done"][:-1, 0]
        assert torch.equal(steps["subnet"][1:][~ends], steps["subnet"][:-1][~ends])
        drawn += steps["subnet"][1:][ends].tolist()
    assert set(drawn) == {0, 1, 2}


# Random numbers.


def test_one_seed_repeats_itself_and_another_does_not(tmp_path):
    rows = []
    for i, seed in enumerate((1, 1, 2)):
        trainer = make_trainer(tmp_path / str(i), seed=seed)
        trainer.run()
        rows.append((trainer.reporter.untimed(), weights(trainer)))
    assert rows[0][0] == rows[1][0]
    assert_equal(rows[0][1], rows[1][1])
    assert rows[0][0] != rows[2][0]


def disturb_the_global_generators(trainer):
    collect = trainer._collect

    def call(collected):
        torch.rand(trainer.frames % 5 + 1)
        np.random.rand(1)  # noqa: NPY002
        return collect(collected)

    trainer._collect = call


def evaluate_often(trainer):
    env = make_env(PENDULUM, num_envs=2)
    trainer.config.eval.interval = 3
    trainer.evaluate = lambda frames: evaluate(trainer.update.loss.actor_network, env, seed=frames)


def log_often(trainer):
    trainer.config.log_interval = 1


def save_often(trainer):
    trainer.config.checkpoint.interval = 1


def compile_it(trainer):
    trainer.prepare()


@pytest.mark.parametrize("disturb", [disturb_the_global_generators, evaluate_often, log_often, save_often, compile_it])
def test_nothing_else_changes_the_training(disturb, tmp_path):
    plain, disturbed = (make_trainer(tmp_path / name, num_envs=2) for name in "ab")
    disturb(disturbed)
    plain.run()
    disturbed.run()
    assert_equal(weights(plain), weights(disturbed))
    assert (transitions(plain) == transitions(disturbed)).all()


def test_a_storage_that_gathers_makes_the_same_run(tmp_path):
    sampled = make_trainer(tmp_path / "a", num_envs=2, buffer=ReplayBuffer(storage=LazyTensorStorage(60)))
    gathered = make_trainer(tmp_path / "b", num_envs=2, buffer=ReplayBuffer(storage=GatherStorage(60)))
    sampled.run()
    gathered.run()
    assert_equal(weights(sampled), weights(gathered))
    assert sampled.reporter.untimed() == gathered.reporter.untimed()
    assert "train/loss_qvalue" in {name for _, name, _ in gathered.reporter.rows}


@pytest.mark.parametrize("num_envs", [None, 2])
def test_a_traced_update_goes_on_where_it_stopped_as_an_eager_one(num_envs, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_module, "translate", lambda graph, inputs: graph)

    def run(folder, frames, traced):
        buffer = ReplayBuffer(storage=GatherStorage(frames))
        trainer = make_trainer(tmp_path / folder, num_envs=num_envs, buffer=buffer, total_frames=frames)
        trainer.update.compiled = traced
        trainer.resume()
        trainer.prepare()
        assert trainer.run() == "finished"
        return trainer

    eager = run("a", 60, False)
    run("b", 40, True)
    traced = run("b", 60, True)
    assert traced.update._code
    assert_equal(weights(traced), weights(eager))
    assert (transitions(traced) == transitions(eager)).all()


def test_a_buffer_with_transforms_samples_itself(tmp_path):
    buffer = ReplayBuffer(storage=GatherStorage(60))
    buffer.append_transform(lambda data: data.set(("next", "reward"), 0 * data["next", "reward"]))
    trainer = make_trainer(tmp_path, buffer=buffer)
    rewards, run = [], trainer.update._run
    trainer.update._run = lambda schedule, batches, draws: (
        rewards.append(batches["next", "reward"]) or run(schedule, batches, draws)
    )
    trainer.run()
    assert len(rewards) == 40
    assert all(reward.shape == (1, 8, 1) and not reward.any() for reward in rewards)


def test_what_a_transform_of_the_buffer_adds_for_the_loss_is_compiled_too(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_module, "translate", lambda graph, inputs: graph)

    def run(folder, traced, steps):
        buffer = ReplayBuffer(storage=GatherStorage(60))
        if steps:
            buffer.append_transform(lambda data: data.set("steps_to_next_obs", torch.full((len(data), 1), 3)))
        trainer = make_trainer(tmp_path / folder, buffer=buffer)
        trainer.update.compiled = traced
        trainer.prepare()
        trainer.run()
        return weights(trainer)

    eager = run("a", False, True)
    assert_equal(run("b", True, True), eager)
    assert any(not torch.equal(value, eager[key]) for key, value in run("c", False, False).items())


def test_what_a_collector_adds_for_the_loss_is_stored(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.collector.postproc = lambda data: data.set("steps_to_next_obs", torch.full((*data.batch_size, 1), 3))
    seen, run = [], trainer.update._run
    trainer.update._run = lambda schedule, batches, draws: (
        seen.append(batches.get("steps_to_next_obs", None)) or run(schedule, batches, draws)
    )
    trainer.run()
    assert seen
    assert all(steps is not None and (steps == 3).all() for steps in seen)


def test_a_prioritised_buffer_is_refused(tmp_path):
    buffer = ReplayBuffer(storage=GatherStorage(60))
    buffer._sampler = PrioritizedSampler.__new__(PrioritizedSampler)  # making one needs TorchRL's compiled extension
    with pytest.raises(ValueError, match="must not have a PrioritizedSampler"):
        make_trainer(tmp_path, buffer=buffer)


def test_a_run_leaves_the_global_generators_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    before = torch.get_rng_state()
    trainer.run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stream", ["exploration", "draws", "replay", "subnets", "environment"])
def test_each_stream_of_random_numbers_is_of_its_own(stream, tmp_path):
    """Another seed of one purpose changes what follows from it, and leaves what does not."""
    trainers = [make_trainer(tmp_path / name) for name in "ab"]
    other = trainers[1]
    if stream == "exploration":
        other._random.exploration.state = [torch.Generator().manual_seed(99).get_state()]
    elif stream == "subnets":
        other.collector.env.transform[-1].generator.manual_seed(99)
    elif stream == "environment":
        other.collector.env.set_seed(99)
        other.collector._carrier = other.collector.env.reset()
    else:
        getattr(other._random, stream).manual_seed(99)
    drawn = []
    for trainer in trainers:
        sample, draw, indices, subnets = trainer.buffer.sample, trainer.update.loss.draw, [], []
        trainer.buffer.sample = lambda n, sample=sample, seen=indices: seen.append(sample(n)) or seen[-1]
        trainer.update.loss.draw = lambda *a, draw=draw, seen=subnets, **k: seen.append(draw(*a, **k)) or seen[-1]
        trainer.run()
        drawn.append(([data["index"].tolist() for data in indices], [d["target"].tolist() for d in subnets]))
    assert (drawn[0][0] == drawn[1][0]) == (stream != "replay")
    assert (drawn[0][1] == drawn[1][1]) == (stream != "draws")
    first, second = (transitions(trainer)[:20] for trainer in trainers)  # with random actions
    assert torch.equal(first["action"], second["action"]) == (stream != "exploration")
    assert torch.equal(first["observation"][0], second["observation"][0]) == (stream != "environment")


# Divergence.


class Breaking(gymnasium.Env):
    """Gives ``value`` for one of its outputs at its n-th step, counted over episodes; or in its start state."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, what, at, value):
        self.what, self.at, self.value, self.steps = what, at, value, 0

    def _observation(self, what):
        observation = self.np_random.standard_normal(3).astype(np.float32)
        if self.steps >= self.at and self.what == what:
            observation[1] = self.value
        return observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation("reset"), {}

    def step(self, action):
        self.steps += 1
        broken = self.steps == self.at and self.what == "reward"
        return self._observation("observation"), self.value if broken else 1.0, self.steps % 5 == 0, False, {}


@pytest.fixture
def breaking():
    """Registers an environment that breaks, and gives its name."""
    made = []

    def make(what, at, value):
        name = f"Breaking{len(made)}-v0"
        kwargs = {"what": what, "at": at, "value": value}
        gymnasium.register(name, Breaking, disable_env_checker=True, kwargs=kwargs)
        made.append(name)
        return name

    yield make
    for name in made:
        del gymnasium.registry[name]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [8, 33])  # with random actions, and with the policy's
@pytest.mark.parametrize("what", ["reward", "observation"])
def test_an_environment_that_breaks_ends_the_run_at_once(what, at, value, breaking, tmp_path):
    trainer = make_trainer(tmp_path, breaking(what, at, value), checkpoint_interval=5)
    saved = saves(trainer)
    assert trainer.run() == "diverged"
    assert trainer.frames == at - 1
    (said,) = trainer.reporter.said
    for part in (what, "environment 0", f"frame {at}", str(value)):
        assert part in said
    assert saved == list(range(5, at, 5))
    assert transitions(trainer).isfinite().all()
    assert trainer.checkpointer.load()[0]["frames"] == saved[-1]


@pytest.mark.parametrize("at", [10, 30])
def test_a_start_state_that_is_not_finite_ends_the_run(at, breaking, tmp_path):
    trainer = make_trainer(tmp_path, breaking("reset", at, math.nan))
    assert trainer.run() == "diverged"
    assert trainer.frames == at
    assert "observation of environment 0" in trainer.reporter.said[0]
    assert transitions(trainer).isfinite().all()


def test_the_environment_that_breaks_is_named_among_others(breaking, tmp_path):
    trainer = make_trainer(tmp_path, breaking("reward", 4, math.nan), num_envs=3, init_random_frames=21)
    first, _, third = trainer.collector.env.base_env._env.envs
    first.unwrapped.at = third.unwrapped.at = 10**6
    assert trainer.run() == "diverged"
    assert "reward of environment 1 " in trainer.reporter.said[0]
    assert "frame 12" in trainer.reporter.said[0]


def poison(trainer, frame, network="qvalue_network_params"):
    """Make a weight nan before ``frame`` is trained on."""
    train = trainer._train

    def call(before):
        if before == frame - 1:
            leaves = trainer.update.state["params", network].values(True, True)
            leaf = next(value for value in leaves if value.is_floating_point())
            leaf.view(-1)[0] = math.nan
        return train(before)

    trainer._train = call


@pytest.mark.parametrize("network", ["qvalue_network_params", "target_qvalue_network_params", "actor_network_params"])
@pytest.mark.parametrize("interval", [5, 100])  # of the rows in which it may be seen first
def test_networks_that_diverge_are_never_saved(network, interval, tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_interval=10, log_interval=interval)
    saved = saves(trainer)
    poison(trainer, 33, network)
    assert trainer.run() == "diverged"
    assert saved == [10, 20, 30]
    assert trainer.frames <= 40
    (said,) = trainer.reporter.said
    assert "finite" in said
    state, _ = trainer.checkpointer.load()
    assert state["frames"] == 30
    assert all(value.isfinite().all() for value in state["update"]["loss"].values())
    resumed = make_trainer(tmp_path)
    assert resumed.resume()
    assert resumed.run() == "finished"


def test_a_checkpoint_of_another_device_is_gone_on_from_with_a_warning(tmp_path):
    first = make_trainer(tmp_path, total_frames=40, checkpoint_interval=20)
    first.run()
    exact, moved = make_trainer(tmp_path, total_frames=60), make_trainer(tmp_path, total_frames=60)
    load = moved.checkpointer.load

    def elsewhere():
        state, files = load()
        state["random"] |= {"device": "cuda", "draws": torch.zeros(16, dtype=torch.uint8)}
        return state, files

    moved.checkpointer.load = elsewhere
    exact.resume()
    with pytest.warns(UserWarning, match="goes on, inexactly. With device=cuda"):
        assert moved.resume()
    assert_equal(weights(moved), weights(exact))
    assert not torch.equal(moved._random.draws.get_state(), exact._random.draws.get_state())
    assert moved.run() == "finished"


def test_a_checkpoint_of_an_environment_with_other_transforms_is_refused(tmp_path):
    make_trainer(tmp_path, total_frames=40, checkpoint_interval=20).run()
    resumed = make_trainer(tmp_path, total_frames=60)
    state, files = resumed.checkpointer.load()
    state["transforms"] = {name.replace("transforms", "others"): value for name, value in state["transforms"].items()}
    resumed.checkpointer.load = lambda: (state, files)
    with pytest.raises(ValueError, match="the environment's transforms keep"):
        resumed.resume()


def test_a_policy_that_is_not_finite_ends_the_run_in_either_case(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_interval=10, stop_when_diverged=False)
    poison(trainer, 33, "actor_network_params")
    assert trainer.run() == "diverged"
    assert trainer.frames == 33


def test_a_run_may_go_on_though_it_diverged_but_without_checkpoints(tmp_path):
    schedule = {"checkpoint_interval": 10, "stop_when_diverged": False, "policy_update_delay": 10**6}
    trainer = make_trainer(tmp_path, **schedule)
    saved = saves(trainer)
    poison(trainer, 33)
    assert trainer.run() == "diverged"
    assert trainer.frames == 60
    assert saved == [10, 20, 30]
    (said,) = trainer.reporter.said
    assert "without further checkpoints" in said
    assert trainer.checkpointer.load()[0]["frames"] == 30


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_evaluation_that_is_not_finite_is_a_divergence(goes_on, breaking, tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_interval=20, stop_when_diverged=not goes_on)
    env = make_env(breaking("reward", 5, math.inf), num_envs=2)
    env.base_env._env.envs[0].unwrapped.at = 10**6
    actor = make_actor(env.observation_spec, env.action_spec, num_cells=(8,), num_subnets=2, sparsity=0.0)
    trainer.evaluate = lambda frames: evaluate(actor, env, seed=0)
    assert trainer.run() == "diverged"
    assert trainer.frames == (60 if goes_on else 30)
    (said,) = trainer.reporter.said
    assert "at the evaluation of frame 30, reward of environment 1 is not finite at step 5 of an evaluation: [inf]" in said
    assert trainer.reporter.frames("eval/return") == ([60] if goes_on else [])  # which breaks at one step alone
    assert trainer.checkpointer.load()[0]["frames"] == 20


def test_an_error_of_the_environment_is_an_error(tmp_path, breaking):
    trainer = make_trainer(tmp_path, breaking("reward", 25, "text"))
    with pytest.raises(Exception, match=r"text|str"):
        trainer.run()


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_frame_and_it_is_saved(number, tmp_path):
    before = signal.getsignal(number)
    trainer = make_trainer(tmp_path)
    trainer.reporter.progress = lambda frames, *rest: frames == 30 and os.kill(os.getpid(), number)
    assert trainer.run() == "interrupted"
    assert signal.getsignal(number) is before
    assert trainer.frames == 30
    assert trainer.reporter.rows[-1] == (30, "eval/return", 30.0)
    assert trainer.reporter.said == ["stopping: the run is saved first"]
    assert trainer.checkpointer.load()[0]["frames"] == 30


@pytest.mark.parametrize("at", [30, 60])
@pytest.mark.parametrize("interval", [0, 30])
def test_an_evaluation_without_an_end_is_abandoned_and_made_by_the_run_that_goes_on(at, interval, tmp_path):
    expected = make_trainer(tmp_path / "whole", checkpoint_interval=interval)
    expected.run()
    trainer, calls = make_trainer(tmp_path / "run", checkpoint_interval=interval), []

    def endless(frames):
        while frames == at:
            calls.append(frames) or os.kill(os.getpid(), signal.SIGINT)
            check_stop()
        return {"eval/return": float(frames)}

    trainer.evaluate = endless
    assert trainer.run() == "interrupted"
    assert (calls, trainer.frames) == ([at], at)
    assert "eval/return" not in [name for frames, name, _ in trainer.reporter.rows if frames == at]
    for _ in range(2):
        resumed = make_trainer(tmp_path / "run", checkpoint_interval=interval, diary=trainer.reporter)
        assert resumed.resume()
        assert resumed.run() == "finished"
        assert trainer.reporter.untimed() == expected.reporter.untimed()
    assert trainer.reporter.frames("eval/return") == [30, 60]
    assert_equal(weights(resumed), weights(expected))


def test_an_evaluation_of_episodes_without_an_end_is_abandoned(tmp_path):
    told = []

    class Endless(Breaking):
        def step(self, action):
            self.steps += 1
            if self.steps == 50 and not told:
                told.append(os.kill(os.getpid(), signal.SIGTERM))
            return self._observation("observation"), 1.0, False, False, {}

    trainer = make_trainer(tmp_path)
    gymnasium.register("Endless-v0", Endless, disable_env_checker=True, kwargs={"what": "", "at": 0, "value": 0.0})
    try:
        env = make_env("Endless-v0", num_envs=2)
    finally:
        del gymnasium.registry["Endless-v0"]
    actor = make_actor(env.observation_spec, env.action_spec, num_cells=(8,), num_subnets=2, sparsity=0.0)
    trainer.evaluate = lambda frames: evaluate(actor, env, seed=0)
    assert trainer.run() == "interrupted"
    assert (trainer.frames, trainer.reporter.frames("eval/return")) == (30, [])


def test_a_run_that_is_told_to_stop_begins_no_evaluation(tmp_path):
    trainer = make_trainer(tmp_path)
    train, evaluated = trainer._train, []
    trainer._train = lambda before: (before == 29 and os.kill(os.getpid(), signal.SIGTERM)) or train(before)
    trainer.evaluate = lambda frames: evaluated.append(frames) or {}
    assert trainer.run() == "interrupted"
    assert (evaluated, trainer.frames) == ([], 30)
    resumed = make_trainer(tmp_path, diary=trainer.reporter)
    resumed.resume()
    resumed.run()
    assert trainer.reporter.frames("eval/return") == [30, 60]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job does not have
    trainer = make_trainer(tmp_path, eval_interval=30, checkpoint_interval=20)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    trainer.reporter.progress = lambda frames, *rest: frames == 30 and twice()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.checkpointer.load()[0]["frames"] == 20


def test_a_second_signal_of_another_kind_does_what_it_did_before(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(args))
    try:
        trainer = make_trainer(tmp_path)
        kinds = (signal.SIGINT, signal.SIGTERM)
        trainer.reporter.progress = lambda frames, *rest: frames == 30 and [os.kill(os.getpid(), kind) for kind in kinds]
        assert trainer.run() == "interrupted"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(seen) == 1


def test_handlers_are_restored_whatever_ends_the_run(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = make_trainer(tmp_path)
    trainer.evaluate = lambda frames: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_reporter_that_is_in_the_middle_of_a_line_does_not_end_the_run(tmp_path):
    """Python's buffered files refuse a print of a signal handler that interrupted another print."""
    trainer = make_trainer(tmp_path, eval_interval=30)
    trainer.reporter.say = lambda text: (_ for _ in ()).throw(RuntimeError("reentrant call inside <_io.BufferedWriter>"))
    trainer.reporter.progress = lambda frames, *rest: frames == 30 and os.kill(os.getpid(), signal.SIGINT)
    assert trainer.run() == "interrupted"
    assert trainer.checkpointer.load()[0]["frames"] == 30


def test_a_trainer_runs_outside_the_main_thread(tmp_path):
    import threading

    trainer, status = make_trainer(tmp_path), []
    thread = threading.Thread(target=lambda: status.append(trainer.run()))
    thread.start()
    thread.join()
    assert status == ["finished"]


def test_the_times_are_where_the_time_went(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_interval=5)
    trainer.run()
    assert all(seconds > 0 for seconds in trainer.times.values())
    assert 0.5 * trainer.elapsed < sum(trainer.times.values()) < 1.2 * trainer.elapsed
