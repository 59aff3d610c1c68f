"""The policy of a run, loaded from its folder, is the one that was trained."""

import csv
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import python_without, run_script
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl import SubnetActor
from omnet_torchrl.training import evaluate, load_policy, make_env
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.record.checkpoint import Checkpointer

ENV, NUM_SUBNETS, FRAMES = "Hopper-v4", 3, 120  # Hopper's returns are no round numbers
OPTIONS = [
    *(f"env={ENV}", f"network.num_subnets={NUM_SUBNETS}", "network.num_cells=[16,16]", "compile=false", "num_threads=1"),
    *(f"total_frames={FRAMES}", "init_random_frames=40", "optim.batch_size=16", "utd_ratio=1", "policy_update_delay=1"),
    *("eval.interval=60", f"eval.episodes={NUM_SUBNETS}", "checkpoint.interval=50"),
]


def train(folder, *options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*units .* lose every one")
        code, printed = run_script(*OPTIONS, *options, f"folder={folder}")
    assert code == 0, printed
    return folder


def trained(tmp_path_factory):
    """The folder of a tiny run, one for all tests: 40 random frames, 80 with updates, checkpoints at 100 and 120 frames."""
    folder = tmp_path_factory.getbasetemp() / "trained" / "run"
    if not folder.parent.exists():
        folder.parent.mkdir()
        train(folder)
    return folder


@pytest.fixture
def run(tmp_path_factory):
    return trained(tmp_path_factory)


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def last_evaluation(folder):
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"].startswith("eval/") and int(row["frames"]) == FRAMES]
    return {row["name"]: float(row["value"]) for row in rows}


def observations(n=7):
    return torch.randn(n, 11, generator=torch.Generator().manual_seed(0))


def locs(policy, **inputs):
    """Means of the Gaussians before they are squashed."""
    return policy(TensorDict(observation=observations(), **inputs, batch_size=[len(observations())]))["loc"]


def test_the_loaded_policy_repeats_the_last_evaluation_of_the_run(run):
    env = make_env(ENV, num_envs=NUM_SUBNETS)
    metrics = evaluate(load_policy(run), env, seed=derived_seed(0, "evaluation", FRAMES))
    expected = last_evaluation(run)
    assert {f"eval/return_subnet_{k}" for k in range(NUM_SUBNETS)} < set(expected)
    assert metrics == expected


def test_the_parameters_and_masks_are_those_of_the_newest_checkpoint(run):
    state, _ = Checkpointer(run / "checkpoints").load()
    loaded = load_policy(run).state_dict()
    assert state["frames"] == FRAMES
    assert set(loaded) == set(state["policy"])
    assert sum(name.endswith("masks") for name in loaded) == 3
    for name, value in loaded.items():
        torch.testing.assert_close(value, state["policy"][name], rtol=0, atol=0)


def test_one_subnet_reads_no_index_and_equals_the_actor_with_that_index(run):
    actor = load_policy(run)
    assert isinstance(actor, SubnetActor)
    for k in range(NUM_SUBNETS):
        plain = load_policy(run, k)
        assert list(plain.in_keys) == ["observation"]
        torch.testing.assert_close(locs(plain), locs(actor, subnet=torch.full((7,), k)))
    assert not torch.equal(locs(load_policy(run, 0)), locs(load_policy(run, 1)))


@pytest.mark.parametrize("subnet", [None, 1])
def test_the_policy_is_in_evaluation_mode_and_requires_no_gradient(run, subnet):
    policy = load_policy(run, subnet)
    assert not any(module.training for module in policy.modules())
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert {value.device.type for value in policy.state_dict().values()} == {"cpu"}


def test_loading_draws_no_random_number_and_leaves_no_file(run):
    before, files = torch.get_rng_state(), sorted(run.rglob("*"))
    load_policy(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(run.rglob("*")) == files


def test_the_replay_buffer_is_not_read(copy):
    for path in (copy / "checkpoints").glob("replay_*"):
        path.unlink()
    assert torch.equal(locs(load_policy(copy, 0)), locs(load_policy(copy, 0)))
    with pytest.raises(ValueError, match=r"is whole: .* Its networks are: load_policy and examples/play\.py read them\."):
        Checkpointer(copy / "checkpoints").load()
    for path in (copy / "checkpoints").glob("state_*"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"state_.* must have \d+ bytes, got 7\.$"):
        Checkpointer(copy / "checkpoints").load()


def test_a_policy_needs_no_environment(copy):
    code = f"import sys; from omnet_torchrl.training import load_policy; spec = load_policy({str(copy)!r}).spec['action']; "
    code += "print(spec.space.low.tolist(), spec.space.high.tolist(), spec.dtype, 'gymnasium' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    space = gymnasium.make(ENV).action_space
    assert done.stdout.strip() == f"{space.low.tolist()} {space.high.tolist()} torch.float32 False"


TRAINING = ("gymnasium", "mujoco", "hydra", "omegaconf", "yaml", "_yaml", "tqdm", "matplotlib", "wandb", "tensorboard", "glfw")


def test_a_policy_needs_torch_tensordict_and_torchrl_alone(run, tmp_path):
    """In an environment that has no other package of a run."""
    code = f"from omnet_torchrl.training import load_policy; print(sum(map(len, load_policy({str(run)!r}, 1).parameters())))"
    done = python_without(TRAINING, tmp_path / "bare", "-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(map(len, load_policy(run, 1).parameters()))


@pytest.mark.parametrize("subnet", [None, 1])
def test_a_policy_reads_what_the_simulator_returns(subnet, run):
    observation, _ = gymnasium.make(ENV).reset(seed=0)
    assert observation.dtype == np.float64
    policy, index = load_policy(run, subnet), {} if subnet is not None else {"subnet": torch.tensor(1)}
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = policy(TensorDict(observation=observation, **index))["action"]
        expected = policy(TensorDict(observation=torch.from_numpy(observation).float(), **index))["action"]
    assert action.dtype == torch.float32
    assert torch.equal(action, expected)


def test_a_subnetwork_is_exported(run):
    policy, observation = load_policy(run, 1).select_out_keys("action"), observations(1)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        exported = torch.export.export(policy, (), {"observation": observation}).module()
        expected = policy(TensorDict(observation=observation))["action"]
    torch.testing.assert_close(exported(observation=observation), expected)


def test_a_subnetwork_is_exported_to_onnx(run, tmp_path):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    policy, observation = load_policy(run, 1).select_out_keys("action"), observations(1)
    with set_exploration_type(ExplorationType.DETERMINISTIC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        torch.onnx.export(policy, (), tmp_path / "policy.onnx", kwargs={"observation": observation}, dynamo=True)
        expected = policy(TensorDict(observation=observation))["action"]
    (action,) = reference.ReferenceEvaluator(str(tmp_path / "policy.onnx")).run(None, {"observation": observation.numpy()})
    torch.testing.assert_close(torch.from_numpy(action), expected)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(copy):
    checkpointer = Checkpointer(copy / "checkpoints")
    newest, older = sorted(checkpointer.path.glob("state_*"), reverse=True)
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        policy = load_policy(copy)
    expected = torch.load(older, weights_only=True)["policy"]
    assert all(torch.equal(value, expected[name]) for name, value in policy.state_dict().items())
    older.unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        load_policy(copy)


def test_errors_say_what_is_wrong(copy, tmp_path):
    with pytest.raises(ValueError, match=r"no run folder: .*runs beneath it, e.g. .*copy"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="no run folder: it does not exist"):
        load_policy(tmp_path / "nowhere")
    for subnet in (-1, NUM_SUBNETS):
        with pytest.raises(ValueError, match=rf"subnet must be in \[0, num_subnets={NUM_SUBNETS}\), got {subnet}"):
            load_policy(copy, subnet)
    with pytest.raises(TypeError, match=r"subnet must be an int, got 1\.0"):
        load_policy(copy, 1.0)
    with pytest.raises(ValueError, match="device must be auto, cpu"):
        load_policy(copy, device="gpu")
    info = json.loads((copy / "run.json").read_text())
    del info["sha256"]
    (copy / "run.json").write_text(json.dumps({**info, "actor": {**info["actor"], "network_class": "Conv2d"}}))
    with pytest.raises(ValueError, match=r"run\.json must say what the actor is made of: was it edited.*KeyError: 'Conv2d'"):
        load_policy(copy)
    del info["actor"]
    (copy / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"run\.json must say what the actor is made of: .* has the run not begun"):
        load_policy(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match=r"has no checkpoint yet \(status: finished\)"):
        load_policy(copy)


@pytest.mark.gpu
def test_a_run_of_a_gpu_is_loaded_on_any_device(tmp_path):
    folder = train(tmp_path / "run", "device=cuda")
    policies = [load_policy(folder, 1, device=device) for device in ("cpu", "cuda")]
    assert [next(policy.parameters()).device.type for policy in policies] == ["cpu", "cuda"]
    td = TensorDict(observation=observations(), batch_size=[7])
    torch.testing.assert_close(policies[0](td.clone())["loc"], policies[1](td.to("cuda"))["loc"].cpu())
