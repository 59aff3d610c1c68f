"""Datasets: what is recorded of a run, of experts and of Minari, that it is whole, and what of other files is refused."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from test_policy import NUM_SUBNETS, trained
from test_tasks_run import CHEETAHS
from test_tasks_run import run as train_tasks
from torchrl.data import TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from omnet_torchrl import TasksEnv
from omnet_torchrl.training import datasets, make_env, read_dataset, write_dataset
from omnet_torchrl.training.datasets import main, record_policy, record_replay
from omnet_torchrl.training.record.checkpoint import Checkpointer
from omnet_torchrl.training.record.files import seal

pytestmark = pytest.mark.filterwarnings("ignore:.*units .* lose every one")


@pytest.fixture(scope="module")
def tasks_run(tmp_path_factory):
    """A run of two tasks, 60 frames of each, episodes of 10 steps."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    train_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def replay(tasks_run):
    """The replay of that run."""
    return record_replay(tasks_run, tasks_run.parent / "replay")


@pytest.fixture
def cheetahs():
    env = make_env(CHEETAHS, max_episode_steps=10)
    yield env
    env.close()


@pytest.fixture
def damaged(replay, tmp_path):
    """A copy of the dataset, to be damaged."""
    return shutil.copytree(replay, tmp_path / "copy")


def stored(run):
    """The transitions that the checkpoint's files hold."""
    _, files = Checkpointer(run / "checkpoints").load()
    parts = [torch.load(path, weights_only=True)["data"] for path in files]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def test_the_replay_of_a_run_is_what_it_stored_in_its_order(tasks_run, replay, cheetahs):
    data, what = read_dataset(replay, cheetahs)
    assert data.shape == (60, 2)
    assert what["transitions"] == 120
    assert what["tasks"] == ["HalfCheetah/forward", "HalfCheetah/backward"]
    assert (what["kind"], what["run"]["algorithm"], what["run"]["frames"]) == ("replay", "pathways", 120)
    assert data["subnet"].tolist() == [[0, 1]] * 60
    expected = stored(tasks_run)
    for key in ("observation", "action"):
        assert torch.equal(data[key], expected[key]), key
    assert torch.equal(data["next", "reward"], expected["next.reward"])
    reward, done = data["next", "reward"].squeeze(-1), data["next", "done"].squeeze(-1)
    for task, mean in enumerate(what["mean_return"]):
        last = int(done[:, task].nonzero()[-1])
        assert mean == pytest.approx(reward[: last + 1, task].sum().item() / done[:, task].sum().item(), rel=1e-3)


def test_torchrls_buffer_reads_a_dataset_without_this_package(replay):
    data = TensorDict.load_memmap(replay / "transitions")
    buffer = TensorDictReplayBuffer(storage=TensorStorage(data), writer=ImmutableDatasetWriter(), batch_size=8)
    assert buffer.sample().shape == (8, 2)
    with pytest.raises(RuntimeError):
        buffer.extend(data[:1].clone())


def test_a_policys_episodes_are_its_own_and_repeat_themselves(tasks_run, tmp_path, cheetahs):
    paths = [record_policy(tasks_run, tmp_path / name, 80, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, again, other = (read_dataset(path, cheetahs)[0] for path in paths)
    assert (first == again).all()
    assert not torch.equal(first["action"], other["action"])
    # Each episode has 10 steps, and the next one begins elsewhere.
    assert first["next", "done"][:, 0, 0].nonzero().flatten().tolist() == [9, 19, 29, 39]
    linked = (first["next", "observation"][:-1] == first["observation"][1:]).all(-1)[:, 0]
    assert linked.logical_not().nonzero().flatten().tolist() == [9, 19, 29]
    calm = record_policy(tasks_run, tmp_path / "d", 20, seed=1, stochastic=False)
    assert json.loads((calm / "dataset.json").read_text())["stochastic"] is False


def test_a_run_of_one_task_makes_a_dataset_of_plain_transitions(tmp_path_factory, tmp_path):
    run = trained(tmp_path_factory)
    for path in (record_replay(run, tmp_path / "replay"), record_policy(run, tmp_path / "policy", 30)):
        data, what = read_dataset(path)
        assert data.ndim == 1
        assert "subnet" not in data.keys()
        assert what["tasks"] == []
    assert NUM_SUBNETS > 1


def test_a_replay_that_was_overwritten_begins_with_the_oldest_transition(tmp_path):
    train_tasks(tmp_path / "run", "buffer_size=80")
    data, _ = read_dataset(record_replay(tmp_path / "run", tmp_path / "replay"))
    assert len(data) == 40
    every = stored(tmp_path / "run")
    assert torch.equal(data["observation"], every["observation"][-40:])


# Bad input ----------------------------------------------------------------------------------------------------------------


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: cut(path / "transitions" / "action.memmap"), r"action.memmap must have 2880 bytes, got 1440"),
        (lambda path: flip(path / "transitions" / "next" / "reward.memmap"), "reward.memmap is not what was written"),
        (lambda path: (path / "transitions" / "observation.memmap").unlink(), "observation.memmap is missing"),
        (lambda path: (path / "transitions" / "other.pickle").write_bytes(b"."), "other.pickle is none of its files"),
        (lambda path: cut(path / "dataset.json"), "the dataset in .* is damaged"),
        (lambda path: (path / "dataset.json").write_text("[]"), "the dataset in .* is damaged"),
        (lambda path: (path / "dataset.json").unlink(), "got no dataset.json in it: record one"),
    ],
    ids=["cut", "flipped", "missing", "pickle", "json cut", "json of something else", "json missing"],
)
def test_a_dataset_that_is_damaged_is_refused(damaged, spoil, message):
    spoil(damaged)
    with pytest.raises(ValueError, match=message) as error:
        read_dataset(damaged)
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_read_even_where_dataset_json_lists_it(damaged):
    """A file that does something when it is unpickled, and a JSON file that was sealed anew."""
    bad = damaged / "transitions" / "other.pickle"
    bad.write_bytes(b"cbuiltins\neval\n(S'1/0'\ntR.")
    what = json.loads((damaged / "dataset.json").read_text())
    digest = hashlib.sha256(bad.read_bytes()).hexdigest()
    what["files"]["transitions/other.pickle"] = {"size": bad.stat().st_size, "sha256": digest}
    (damaged / "dataset.json").write_text(json.dumps({**what, "sha256": seal(what)}))
    with pytest.raises(ValueError, match=r"other\.pickle is none of its files"):
        read_dataset(damaged)


def test_a_dataset_of_other_specs_or_tasks_is_refused(replay, tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a dataset, got no such folder: record one"):
        read_dataset(tmp_path / "nothing")
    hopper, swapped = make_env("Hopper-v4"), make_env("HalfCheetah/backward+forward")
    with pytest.raises(ValueError, match="must be of the tasks of one, got HalfCheetah/forward, HalfCheetah/backward"):
        read_dataset(replay, hopper)
    with pytest.raises(ValueError, match="tasks HalfCheetah/backward, HalfCheetah/forward, got HalfCheetah/forward"):
        read_dataset(replay, swapped)
    data, _ = read_dataset(replay)
    with pytest.raises(ValueError, match="the transitions must have the spaces of the environment, observation of 11, got 17"):
        write_dataset(tmp_path / "hopper", data[:, 0], hopper)
    path = write_dataset(tmp_path / "one", data[:, 0], make_env("HalfCheetah-v4"))
    with pytest.raises(ValueError, match="the dataset must have the spaces of the environment, observation of 11, got 17"):
        read_dataset(path, hopper)
    with pytest.raises(ValueError, match=r"batch size \(n, 2\), one of each task, got batch size \(60,\)"):
        write_dataset(tmp_path / "two", data[:, 0], swapped)
    with pytest.raises(ValueError, match="got no 'action'"):
        write_dataset(tmp_path / "two", data.exclude("action"), swapped)
    assert not (tmp_path / "two").exists()
    with pytest.raises(ValueError, match=r"the dataset's folder must be new, got .*, which exists"):
        write_dataset(path, data, swapped)
    hopper.close()
    swapped.close()


def test_the_command_records_and_says_what_is_wrong_in_a_line(tasks_run, tmp_path):
    command = [sys.executable, "-m", "omnet_torchrl.training.datasets"]
    done = subprocess.run([*command, tasks_run, tmp_path / "data", "--frames", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_dataset(tmp_path / "data")[1]["transitions"] == 20
    done = subprocess.run([*command, tmp_path, tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=r"frames must be a multiple of the 2 task\(s\), got 21"):
        main([str(tasks_run), str(tmp_path / "odd"), "--frames", "21"])
    with pytest.raises(ValueError, match="--env must say which environment"):
        main(["minari:mujoco/hopper/medium-v0", str(tmp_path / "minari")])


# Others' ------------------------------------------------------------------------------------------------------------------


def test_a_dataset_without_minari_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package minari: pip install 'omnet-torchrl\[minari\]'"):
        main(["minari:mujoco/hopper/medium-v0", str(tmp_path / "minari"), "--env", "Hopper-v4"])


@pytest.mark.skipif(importlib.util.find_spec("minari") is None, reason="needs the extra minari")
@pytest.mark.filterwarnings("ignore")
def test_a_dataset_of_minari_becomes_one_of_ours(monkeypatch, tmp_path):
    """One that is made here of two episodes, and stored by minari itself."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    generator, last = np.random.default_rng(0), np.arange(20) == 19
    parts = [
        EpisodeBuffer(
            id=i,
            observations=generator.uniform(-1, 1, (21, 3)).astype("float32"),
            actions=generator.uniform(-2, 2, (20, 1)).astype("float32"),
            rewards=generator.uniform(-1, 0, 20),
            terminations=np.zeros(20, bool),
            truncations=last,
            infos={},
        )
        for i in range(2)
    ]
    minari.create_dataset_from_buffers("pendulum/random-v0", parts, env=gymnasium.make("Pendulum-v1"))
    path = main(["minari:pendulum/random-v0", str(tmp_path / "data"), "--env", "Pendulum-v1"])
    data, what = read_dataset(path, make_env("Pendulum-v1"))
    assert len(data) == 40
    assert data["next", "done"].flatten().nonzero().flatten().tolist() == [19, 39]
    assert not data["next", "terminated"].any()
    assert torch.equal(data["next", "observation"][:19], data["observation"][1:20])
    assert what["minari"] == "pendulum/random-v0"


def test_an_episode_of_minari_has_one_observation_more_than_transitions():
    numbers = np.arange(4.0)
    ends = {"terminations": np.array([False, False, True]), "truncations": np.zeros(3, bool)}
    episode = SimpleNamespace(observations=numbers[:, None], actions=np.ones((3, 1)), rewards=numbers[:3], **ends)
    data = datasets._transitions(episode)
    assert data["observation"].flatten().tolist() == [0.0, 1.0, 2.0]
    assert data["next", "observation"].flatten().tolist() == [1.0, 2.0, 3.0]
    assert data["next", "terminated"].flatten().tolist() == [False, False, True]
    assert data["next", "reward"].dtype == torch.float32


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="needs the extra metaworld")
@pytest.mark.filterwarnings("ignore")
def test_meta_worlds_experts_solve_what_they_are_recorded_in(tmp_path):
    path = main(["Meta-World/reach-v3+button-press-topdown-v3", str(tmp_path / "data"), "--frames", "600"])
    env = make_env("Meta-World/reach-v3+button-press-topdown-v3")
    data, what = read_dataset(path, env)
    assert isinstance(env.base_env, TasksEnv)
    assert data.shape == (300, 2)
    assert data["next", "reward"][-50:].mean() > 3 * data["next", "reward"][:10].mean()
    assert what["kind"] == "experts"
