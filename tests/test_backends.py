"""Workers that step the environments of a run, in processes of this machine or of a Ray cluster."""

import csv
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector

from omnet_torchrl import SubnetPrimer
from omnet_torchrl.training import Run, load_policy, make_collector, make_env
from omnet_torchrl.training.loop.backends import Workers
from omnet_torchrl.training.loop.environments import check_env
from omnet_torchrl.training.loop.stopping import RunError
from omnet_torchrl.training.options import to_config

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import minatar_dqn
import omnet_sac
import omnet_td3

MANY = 2**31  # subnetworks: two episodes have hardly ever the same one
MISSING = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
RAY = pytest.param("ray", marks=[MISSING, pytest.mark.slow])  # whose start takes long
backends = pytest.mark.parametrize("backend", ["process", RAY])


class Counting(gymnasium.Env):
    """Episodes of random lengths, which show their number, their step and something random; ``fails`` after so many steps."""

    observation_space, action_space = Box(-np.inf, np.inf, (3,), np.float32), Box(-1, 1, (2,), np.float32)

    def __init__(self, fails=None, dies=None, seconds=0.0):
        self.fails, self.dies, self.seconds, self.steps, self.episode = fails, dies, seconds, 0, 0

    def _observation(self):
        return np.array([self.episode, self.step_of_episode, self.np_random.random()], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_of_episode, self.length = self.episode + 1, 0, self.np_random.integers(2, 6)
        return self._observation(), {}

    def step(self, action):
        self.steps, self.step_of_episode = self.steps + 1, self.step_of_episode + 1
        time.sleep(self.seconds)
        if self.steps == self.fails:
            raise ValueError("the sensor is broken")
        if self.steps == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._observation(), 1.0, self.step_of_episode >= self.length, False, {}


class Constant(nn.Module):
    """A policy whose action is its parameter and its buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("mask", torch.zeros(()))

    def forward(self, observation):
        return torch.stack([self.weight, self.mask]).expand(*observation.shape[:-1], 2)


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Workers that are forked are there at once; by default they are spawned. Ray's import this file."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    yield
    multiprocessing.set_start_method(before, force=True)


def make_config(backend="process", *, num_workers=2, steps=4, **options):
    if backend != "direct":
        options["collect"] = {"backend": backend, "num_workers": num_workers, "steps": steps}
    plain = {"total_frames": 10_000, "init_random_frames": 0, "optim": {"batch_size": 1}, "compile": False, "progress": False}
    return {"env": "test_backends:Counting", **plain, "init_random_frames": 16, "optim": {"batch_size": 16}, **options}


@contextmanager
def collecting(backend="process", policy=None, **options):
    config = to_config(make_config(backend, **options))
    env = make_env(config.env, SubnetPrimer(MANY), num_envs=config.num_envs if config.num_envs > 1 else None)
    module = TensorDictModule(policy or Constant(), ["observation"], ["action"])
    collector = make_collector(config, env, module)
    try:
        yield collector
    finally:
        collector.shutdown()
        assert not multiprocessing.active_children()


def frames(collector, number):
    return torch.stack(list(itertools.islice(collector, number // collector.frames_per_batch)))


# What the loop gets


def test_without_workers_it_is_torchrls_own_collector():
    with collecting("direct") as collector:
        assert type(collector) is Collector
        assert frames(collector, 8).shape == (8, 1)


@backends
def test_each_episode_of_each_environment_plays_one_subnet_of_its_own(backend):
    with collecting(backend, num_envs=2) as collector:
        data = frames(collector, 160)
    assert data.shape == (40, 4)  # steps, environments of all workers
    played = []
    for env in data.unbind(1):
        number, step, _ = env["observation"].T
        assert (step[1:] == torch.where(env["next", "done"][:-1, 0], 0, step[:-1] + 1)).all()  # none is left out
        for episode in number.unique():
            subnets = env["subnet"][number == episode].unique().tolist()
            assert len(subnets) == 1
            played += subnets
    assert len(played) > 20
    assert len(set(played)) == len(played)


@backends
def test_a_seed_repeats_the_frames_of_all_workers_whatever_ran_before(backend):
    """Environments, indices and random actions: none of them depends on how many processes there have been."""

    def first(seed):
        with collecting(backend, seed=seed) as collector:
            return frames(collector, 32)

    data, again, other = first(0), first(0), first(1)
    for key in ("observation", "action", "subnet"):
        assert torch.equal(data[key], again[key]), key
        assert not torch.equal(data[key], other[key]), key
        assert not torch.equal(data[key][:, 0], data[key][:, 1]), f"{key} of both workers"


@backends
def test_workers_act_with_the_weights_and_buffers_of_the_frames_that_the_age_tells(backend):
    policy, seen = Constant(), []
    with collecting(backend, policy) as collector:
        for step in itertools.islice(collector, 20):
            with torch.no_grad():
                seen.append((collector.policy_age, *step["action"][:, 0].tolist(), *step["action"][:, 1].tolist()))
                policy.weight.fill_(2 * len(seen) / 1_000)  # frames
                policy.mask.fill_(2 * len(seen) / 1_000)
    for number, (age, *acted) in enumerate(seen, start=1):
        if number > 8:  # those before have random actions
            assert acted == pytest.approx([(2 * number - age) / 1_000] * 4)
    assert [age for age, *_ in seen[8:]] == [10, 12, 14, 16] * 3  # a batch is 8 frames: at most two


def test_random_frames_are_as_many_as_the_options_say():
    with collecting(init_random_frames=24, optim={"batch_size": 8}) as collector:
        actions = frames(collector, 40)["action"]
    assert (actions[:12] != 0).all()
    assert (actions[12:] == 0).all()


def test_signals_to_all_processes_end_no_worker():
    with collecting() as collector:
        batches = iter(collector)
        next(batches)
        workers = multiprocessing.active_children()
        for worker, number in itertools.product(workers, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)):
            os.kill(worker.pid, number)
        for _ in range(20):
            next(batches)
        assert len(workers) == 2
        assert all(worker.is_alive() for worker in workers)


# Runs


def run_options(tmp_path, backend="process", **options):
    small = {"num_cells": [16, 16], "num_subnets": 3, "sparsity": 0.1}
    plain = {"total_frames": 64, "init_random_frames": 32, "utd_ratio": 1.5, "policy_update_delay": 2, "network": small}
    plain |= {"optim": {"batch_size": 8}, "log_interval": 8, "eval": {"episodes": 1, "interval": 32}}
    plain["checkpoint"] = {"interval": 16}
    return make_config(backend, **{**plain, "folder": str(tmp_path / "run"), **options})


def train(options, script=omnet_sac):
    with Run(options) as run:
        script.train(run)
    return run


def records(tmp_path):
    with open(tmp_path / "run" / "metrics.csv") as file:
        read = list(csv.DictReader(file))
    return [(each["frames"], each["name"], each["value"]) for each in read if not each["name"].startswith("time/")]


def info(tmp_path):
    return json.loads((tmp_path / "run" / "run.json").read_text())


@backends
def test_a_run_with_workers_is_a_function_of_its_seed_and_ends_them(tmp_path, backend):
    for name in ("first", "second"):
        assert train(run_options(tmp_path / name, backend)).status == "finished"
        assert not multiprocessing.active_children()
    assert records(tmp_path / "first") == records(tmp_path / "second")
    said = info(tmp_path / "first")
    assert (said["frames"], said["updates"]) == (64, 48)
    ages = [float(value) for _, name, value in records(tmp_path / "first") if name == "collect/policy_age"]
    assert ages == [16.0] * 4  # at each 8 frames, which is the last step of a batch
    policy = load_policy(tmp_path / "first" / "run", subnet=1)
    assert policy(make_env("test_backends:Counting").reset())["action"].shape == (2,)
    assert not list((tmp_path / "first" / "run").rglob("replay_*"))


@pytest.mark.slow
def test_workers_are_spawned_by_default(tmp_path):
    multiprocessing.set_start_method(None, force=True)
    assert train(run_options(tmp_path)).status == "finished"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("row", ["td3", "dqn"])
def test_workers_explore_as_the_row_does(tmp_path, row):
    """TD3's noise is drawn in the workers; DQN's epsilon comes to them with the weights."""
    options = {"algorithm": "omnet_td3", "exploration": {"noise": 0.5}}
    if row == "dqn":
        small = {"num_cells": [8], "num_subnets": 3}
        frames = {"init_random_frames": 32, "buffer_size": 64, "num_envs": 1, "policy_update_delay": 1}
        exploration = {"epsilon_start": 1.0, "epsilon_end": 0.0, "epsilon_frames": 32}
        options = {"algorithm": "omnet_dqn", "env": "MinAtar/breakout", "network": small, **frames, "exploration": exploration}
    run = train(run_options(tmp_path, **options), {"td3": omnet_td3, "dqn": minatar_dqn}[row])
    assert run.status == "finished"


@backends
def test_a_worker_that_dies_ends_the_run_with_a_line(tmp_path, backend):
    with pytest.raises(RunError) as raised:
        train(run_options(tmp_path, backend, env_kwargs={"dies": 12}))
    assert "\n" not in str(raised.value)
    said = info(tmp_path)
    assert said["status"] == "failed"
    assert said["error"].startswith(f"collecting with collect.backend={backend} has failed: ")
    if backend == "process":
        assert "has ended with exit code -9" in said["error"]
    assert not multiprocessing.active_children()


@backends
def test_an_error_of_an_environment_in_a_worker_ends_the_run(tmp_path, backend, capfd):
    with pytest.raises(RunError, match=f"collecting with collect.backend={backend} has failed: "):
        train(run_options(tmp_path, backend, env_kwargs={"fails": 12}))
    assert info(tmp_path)["status"] == "failed"
    assert not multiprocessing.active_children()
    assert "the sensor is broken" in capfd.readouterr().err + info(tmp_path)["error"]


def test_a_signal_saves_the_networks_and_ends_the_workers(tmp_path, capsys):
    def stop():
        while not (tmp_path / "run" / "metrics.csv").exists() or not records(tmp_path):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    run = train(run_options(tmp_path, total_frames=100_000, env_kwargs={"seconds": 0.01}, checkpoint={"interval": 0}))
    assert run.status == "interrupted"
    assert not multiprocessing.active_children()
    assert info(tmp_path)["saved"] > 0
    load_policy(tmp_path / "run")
    assert "to go on" not in capsys.readouterr().err


def test_ctrl_c_before_the_workers_are_there_is_no_failure(tmp_path, monkeypatch):
    """It comes to them as well, which are not ready yet."""

    def start(self):
        os.kill(os.getpid(), signal.SIGINT)
        raise RunError("the workers could not be started")

    monkeypatch.setattr(Workers, "_start", start)
    assert train(run_options(tmp_path)).status == "interrupted"


def test_the_environment_of_the_benchmark_is_one_that_a_run_takes():
    assert check_env("backends:Sleeping", env_kwargs={"seconds": 0.0}) == []


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collect": {"num_workers": 2}}, "collect.num_workers=2 is read only with collect.backend=process or ray, got direct"),
        ({"collect": {"steps": 3}}, "collect.steps=3 is read only with"),
        ({"collect": {"backend": "procces"}}, "collect.backend must be one of direct, process, ray, got 'procces'"),
        ({"collect": {"backend": "process"}, "resume": "auto"}, "resume must be null with collect.backend=process, got auto"),
        (
            {"collect": {"backend": "process"}, "env": "HalfCheetah-v4+HalfCheetah-v5", "algorithm": "pathways"},
            "collect.backend must be direct with the several tasks of env=",
        ),
        (
            {"collect": {"backend": "process", "num_workers": 3}, "num_envs": 2, "total_frames": 6000},
            r"init_random_frames must be a multiple of num_envs \* collect.num_workers \* collect.steps = 30 .* got 5000: use "
            "init_random_frames=5010",
        ),
        (
            {"collect": {"backend": "process", "num_workers": 4}, "total_frames": 6002},
            r"total_frames must be a multiple of num_envs \* collect.num_workers=4, got 6002: use total_frames=6004",
        ),
    ],
)
def test_options_that_contradict_workers_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        to_config({"flatten_observation": False, **options})
    assert "\n" not in str(raised.value)


def test_without_ray_what_to_install_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("omnet_torchrl.training.options.contradictions.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"collect.backend=ray needs .* pip install 'omnet-torchrl\[ray\]'"):
        Run(run_options(tmp_path, "ray"))
    assert not (tmp_path / "run").exists()


def test_a_run_with_workers_is_not_resumed_and_stays_as_it_was(tmp_path):
    train(run_options(tmp_path))
    before = info(tmp_path)
    for changed in ([], ["total_frames=128"]):
        with pytest.raises(ValueError, match=r"resume must be null with collect.backend=process, got .*: the episodes"):
            Run({"resume": str(tmp_path / "run")}, changed)
    assert info(tmp_path) == before
