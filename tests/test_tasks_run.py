"""A run of several tasks, by examples/multitask.py: logs, evaluation, picture, resuming, and what is refused."""

import contextlib
import csv
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import ReplayBuffer

from omnet_torchrl import GatherStorage, RunningNormalization
from omnet_torchrl.training import load_policy, make_env
from omnet_torchrl.training.loop.environments import check_env
from omnet_torchrl.training.loop.tasks import sampled, stored, task_labels
from omnet_torchrl.training.options import to_config
from omnet_torchrl.training.record import reporter
from omnet_torchrl.training.record.plots import learning_curve

EXAMPLE = Path(__file__).parent.parent / "examples" / "multitask.py"
CHEETAHS = "HalfCheetah/forward+backward"
SMALL = [
    *("network.num_cells=[8,8]", "optim.batch_size=8", "compile=false", "num_threads=1", "utd_ratio=0.25"),
    *("total_frames=120", "init_random_frames=40", "eval.interval=60", "eval.episodes=1", "max_episode_steps=10"),
    *("progress=false", "log_interval=20", "checkpoint.interval=60"),
]
ROWS = ("pathways", "shared_tasks", "multi_head", "separate_tasks")
pytestmark = pytest.mark.filterwarnings("ignore:.*units .* lose every one")


def script(*arguments):
    """The exit code of the example, in this process, and what it prints for a person."""
    printed, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                printed.write(code)
                code = 1
    return code or 0, printed.getvalue()


def run(folder, *arguments):
    code, said = script(f"folder={folder}", *SMALL, *arguments)
    assert not code, said
    return said


def records(folder):
    with (folder / "metrics.csv").open() as file:
        lines = [(int(line["frames"]), line["name"], line["value"]) for line in csv.DictReader(file)]
    return [line for line in lines if not line[1].startswith("time/")]


def values(folder, name):
    return {frames: float(value) for frames, key, value in records(folder) if key == name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporter, "learning_curve", learning_curve)
        return folder, run(folder)


def test_returns_of_each_task_are_in_log_line_and_picture(whole):
    folder, said = whole
    for name in ("eval/return", "train/loss_qvalue", "train/qvalue", "train/alpha", "train/entropy"):
        every, forward, backward = (values(folder, name + each) for each in ("", "_forward", "_backward"))
        assert every.keys() == forward.keys() == backward.keys() != set()
        share = 1 if name == "train/loss_qvalue" else 2  # losses are summed
        assert every == pytest.approx({at: (forward[at] + backward[at]) / share for at in every}, rel=1e-5), name
    assert list(values(folder, "train/episode_return_forward")) == list(range(20, 121, 20))  # 10 steps of both tasks
    assert all(length == 10 for length in values(folder, "train/episode_length_backward").values())
    assert re.search(r"120 frames   return .*\(forward -?[\d.]+, backward -?[\d.]+\)", said)
    assert "2 tasks, each with 2 critics and an actor: one network under weight" in said
    assert "2 to train in, 2 to evaluate in" in said
    assert "2 environments" in said
    for picture in ("tasks.png", "learning_curve.png"):
        assert (folder / picture).stat().st_size > 10_000
    assert load_policy(folder).num_subnets == 2
    assert len(EXAMPLE.read_text().splitlines()) < 120


def test_the_picture_has_a_line_for_each_task(whole, tmp_path, figures):
    learning_curve(whole[0], tmp_path / "curve.png")
    labels = [text.get_text() for text in figures[-1].axes[0].get_legend().get_texts()]
    assert labels == ["training episode", "forward", "backward", "evaluation, mean"]


@pytest.mark.parametrize("algorithm", ROWS[1:])
def test_every_row_trains_and_leaves_its_policy(algorithm, tmp_path):
    said = run(tmp_path / "run", f"algorithm={algorithm}", "total_frames=60")
    assert "2 tasks, each with 2 critics and an actor" in said
    policy = load_policy(tmp_path / "run")
    batch = TensorDict(observation=torch.randn(2, 17), subnet=torch.arange(2), batch_size=[2])
    assert policy(batch)["action"].shape == (2, 6)


def test_a_resumed_run_equals_one_that_was_not_stopped(whole, tmp_path):
    folder = tmp_path / "run"
    run(folder, "total_frames=62")  # in the middle of both episodes
    code, said = script(f"resume={folder}", "total_frames=120")
    assert not code, said
    assert "goes on from frame 62" in said
    # The last frame of the shorter run is evaluated too.
    assert [each for each in records(folder) if each[0] != 62] == [each for each in records(whole[0]) if each[0] != 62]
    first, second = (load_policy(each).state_dict() for each in (whole[0], folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_run_equals_one_that_was_not(whole, tmp_path):
    command = [sys.executable, str(EXAMPLE), f"folder={tmp_path}/run", "resume=auto", *SMALL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path)
    manifest = tmp_path / "run" / "checkpoints" / "checkpoint_000000060.json"
    while not manifest.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    code, said = script(f"folder={tmp_path}/run", "resume=auto", *SMALL)
    assert not code, said
    assert "goes on from frame" in said
    assert records(tmp_path / "run") == records(whole[0])


@pytest.mark.parametrize("other", ["HalfCheetah/forward+jump", "HalfCheetah/backward+forward"])
def test_a_resumed_run_with_other_tasks_is_refused(whole, other):
    code, said = script(f"resume={whole[0]}", f"env={other}")
    assert code == 1
    assert f"env is {CHEETAHS}, got {other}" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": CHEETAHS, "algorithm": "omnet"}, "2 task.* algorithm=omnet is not for: use one of pathways, shared_tasks"),
        ({"env": "Hopper-v4"}, "1 task.* algorithm=pathways is not for: join two or more by '\\+', or use another row"),
        ({"env": "HalfCheetah/forward+backward+jump"}, "num_subnets must be 3, one for each task, got 2"),
        ({"env": CHEETAHS + "+forward"}, "'HalfCheetah/forward' twice"),
        ({"network": {"actor": "dense"}}, "must be the same, .* got critic=masked, actor=dense"),
        ({"network": {"critic": "shared"}}, "must be the same, .* got critic=shared, actor=masked"),
        ({"loss": {"num_trained_subnets": 1}}, "loss.num_trained_subnets null, got"),
        ({"algorithm": "multi_head", "topology": {"method": "set"}}, "topology.method must be null with network.critic=heads"),
        ({"num_envs": 2}, "num_envs 1, .* got 2, num_envs=2"),
        ({"total_frames": 100_001}, "total_frames must be a multiple of the 2 tasks, got 100001: use total_frames=100002"),
        ({"optim": {"batch_size": 255}}, "optim.batch_size must be a multiple of the 2 tasks, got 255"),
        ({"eval": {"bias_episodes": 1}}, "bias_episodes must be 0"),
        ({"env": "Hopper-v4", "algorithm": "omnet", "network": {"actor": "heads"}}, "actor must not be heads .* several tasks"),
    ],
)
def test_options_that_tasks_do_not_allow_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        to_config({"env": CHEETAHS, "algorithm": "pathways", **options})


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("Hopper-v4+HalfCheetah-v4", "observation of 'Hopper-v4' is 11 numbers, that of 'HalfCheetah-v4' is 17 numbers"),
        ("HalfCheetah/forward+sprint", "'HalfCheetah/sprint' can't be made: a task of HalfCheetah must be forward, "),
        ("Hopper-v4+Hoper-v4", "gymnasium id with its version, got 'Hoper-v4'; the closest are Hopper-v4"),
    ],
)
def test_environments_that_do_not_fit_are_said(env, message):
    with pytest.raises(ValueError, match=message):
        check_env(env)


def test_tasks_share_the_running_statistics_of_their_observations(tmp_path):
    run(tmp_path / "run", f"env={CHEETAHS}", "normalize_observations=true")
    policies = [load_policy(tmp_path / "run", k) for k in range(2)]
    statistics = [next(each for each in policy.modules() if isinstance(each, RunningNormalization)) for policy in policies]
    assert statistics[0].count == 120
    assert torch.equal(statistics[0].mean, statistics[1].mean)


def test_meta_world_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ValueError, match=r"needs a package .* pip install 'omnet-torchrl\[metaworld\]'"):
        check_env("Meta-World/MT10")


def test_labels_are_the_names_without_their_suite_where_that_tells_them_apart():
    assert task_labels("Hopper-v4") == ()
    assert task_labels(CHEETAHS) == ("forward", "backward")
    assert task_labels("a/x+b/x") == ("a/x", "b/x")


def test_what_is_sampled_has_equally_many_transitions_of_each_task():
    buffer, tasks = ReplayBuffer(storage=GatherStorage(50)), ("a", "b", "c")
    for step in range(70):  # the storage has wrapped
        data = TensorDict(subnet=torch.arange(3)[:, None], step=torch.full((3, 1), step), batch_size=[3, 1])
        buffer.extend(stored(data, tasks))
    batch = sampled(buffer, 5, 12, tasks)
    assert batch.batch_size == (5, 3, 4)
    assert torch.equal(batch["subnet"], torch.arange(3)[:, None].expand(5, 3, 4))
    assert batch["step"].min() >= 20
    assert batch["step"].unique().numel() > 10


@pytest.mark.filterwarnings("ignore")  # theirs
def test_success_on_meta_world_is_logged_for_each_task(tmp_path):
    pytest.importorskip("metaworld")
    folder = tmp_path / "run"
    run(folder, "env=Meta-World/reach-v3+drawer-close-v3")
    assert values(folder, "eval/success").keys() == {60, 120}
    for name in ("eval/success", "train/success"):
        assert values(folder, f"{name}_reach-v3").keys() == values(folder, f"{name}_drawer-close-v3").keys() != set()


def test_environments_of_gymnasium_may_be_tasks():
    env = make_env("Hopper-v4+Hopper-v5", seed=0)
    data = env.rollout(5)
    assert env.tasks == ("Hopper-v4", "Hopper-v5")
    assert data["observation"].shape == (2, 5, 11)
    env.close()


@pytest.mark.filterwarnings("ignore:.*keep no weight")
def test_masks_may_follow_each_tasks_own_transitions(tmp_path):
    options = ("topology.method=saliency", "topology.interval=40", "topology.end=100")
    run(tmp_path / "run", *options)
    density = values(tmp_path / "run", "masks/density")
    assert list(density) == [42, 80]
    assert all(value == pytest.approx(0.5, abs=0.01) for value in density.values())
    assert 0.3 < values(tmp_path / "run", "masks/overlap_subnets")[80] < 1
    run(tmp_path / "stopped", *options, "total_frames=62")
    code, said = script(f"resume={tmp_path / 'stopped'}", "total_frames=120")
    assert not code, said
    resumed, whole = (records(tmp_path / name) for name in ("stopped", "run"))
    assert [each for each in resumed if each[0] != 62] == [each for each in whole if each[0] != 62]
