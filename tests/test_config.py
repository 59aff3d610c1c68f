"""The config of a run: what is accepted, what is refused and in which words, and what survives a round trip."""

import dataclasses
import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from omnet_torchrl.training.command_line import register
from omnet_torchrl.training.options import (
    NetworkConfig,
    OptimConfig,
    TrainConfig,
    checks,
    differences,
    load_config,
    resolve_device,
    save_config,
    to_config,
    validate,
)
from omnet_torchrl.training.options import options as options_module
from omnet_torchrl.training.options.checks import MAY_CHANGE

LEAVES = checks.leaves(TrainConfig())


def nested(**options):
    """A nested mapping of ``group__name=value``."""
    result = {}
    for name, value in options.items():
        *groups, leaf = name.split("__")
        node = result
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return result


# Values


def test_the_defaults_are_valid_and_are_the_papers():
    config = to_config({})
    assert (config.network.num_subnets, config.network.sparsity, config.network.num_cells) == (5, 0.5, [256, 256])
    assert (config.loss.num_trained_subnets, config.loss.num_target_subnets, config.loss.gamma) == (1, 2, 0.99)
    assert (config.utd_ratio, config.policy_update_delay, config.total_frames) == (20, 20, 300_000)


@pytest.mark.parametrize(
    "options",
    [
        {"network__sparsity": 0},
        {"network__sparsity": [0.0, 0.5, 0.9]},
        {"network__sparsity": [0.5, 0], "network__num_cells": [8]},
        {"network__dense_input": True, "network__dense_output": True},
        {"network__dense_input": True, "network__dense_output": True, "network__num_cells": [8], "network__sparsity": 0.0},
        {"network__masks": "unit", "network__sparsity": 0.29},
        {"network__masks": "unit", "network__sparsity": [0.5, 0]},
        {"network__num_subnets": 1, "loss__num_target_subnets": 1},
        {"loss__num_trained_subnets": 5, "loss__num_target_subnets": 5, "loss__replacement": True},
        {"loss__gamma": 0.0, "loss__target_entropy": -3.0, "loss__alpha_init": 0.1},
        {"loss__gamma": 1, "optim__tau": 1},
        {"utd_ratio": 0.05},
        {"utd_ratio": 0.1, "total_frames": 1_030, "init_random_frames": 1_000, "policy_update_delay": 3},
        {"num_envs": 8, "total_frames": 8_000, "init_random_frames": 800},
        {"total_frames": 257, "init_random_frames": 256, "buffer_size": 256},
        {"checkpoint__interval": 0, "checkpoint__keep": 2},
        {"logger": "wandb", "wandb__mode": "disabled", "wandb__entity": "us", "wandb__group": None},
        {"seed": 2**31 - 1, "num_threads": 1, "resume": "runs/0"},
    ],
)
def test_good_values_pass_and_arrive(options):
    leaves = checks.leaves(to_config(nested(**options)))
    for name, value in options.items():
        assert leaves[name.replace("__", ".")] == value


RANGES = [
    ("num_envs", 0),
    ("num_threads", 0),
    ("total_frames", 0),
    ("init_random_frames", 0),
    ("policy_update_delay", 0),
    ("buffer_size", 0),
    ("max_episode_steps", 0),
    ("log_interval", 0),
    ("seed", -1),
    ("seed", 2**31),
    ("network__num_subnets", 0),
    ("eval__interval", 0),
    ("eval__episodes", -1),
    ("checkpoint__interval", -1),
    ("checkpoint__keep", 1),
    ("optim__batch_size", 0),
    ("optim__lr", 0.0),
    ("optim__tau", 0.0),
    ("optim__tau", 1.1),
    ("loss__gamma", -0.1),
    ("loss__gamma", 1.1),
    ("loss__alpha_init", 0.0),
    ("utd_ratio", 0.0),
]
FLOATS = ["optim__lr", "optim__tau", "loss__gamma", "loss__alpha_init", "loss__target_entropy", "utd_ratio"]
NOT_FINITE = list(itertools.product(FLOATS, [math.nan, math.inf, -math.inf]))


@pytest.mark.parametrize(("name", "value"), RANGES + NOT_FINITE)
def test_a_value_out_of_its_range_is_refused_with_range_and_value(name, value):
    with pytest.raises(ValueError) as error:
        to_config(nested(**{name: value}))
    message = str(error.value)
    assert message.startswith(f"{name.replace('__', '.')} must be in ")
    assert message.endswith(f"got {value}.")


def test_every_number_has_a_range():
    ranged = " ".join(checks._RANGES.values()).split()
    numbers = [name for name, value in LEAVES.items() if type(value) in (int, float)]
    own_check = {"network.sparsity", "loss.num_trained_subnets", "loss.num_target_subnets"}
    assert set(numbers) - set(ranged) == own_check
    assert set(ranged) <= set(LEAVES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_envs", True),
        ("num_envs", 1.5),
        ("seed", "first"),
        ("seed", None),
        ("optim__lr", True),
        ("utd_ratio", "many"),
        ("compile", "perhaps"),
        ("env", None),
        ("network__num_cells", 256),
        ("network__num_cells", [256, True]),
        ("network__num_cells", None),
        ("network", None),
        ("env", "${nothing}"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(
        ValueError, match=rf"^{name.replace('__', '.')}(\[1\])?(: Inter.*not found| must be .+, got \S+)"
    ) as error:
        to_config(nested(**{name: value}))
    assert "\n" not in str(error.value)


def test_a_number_in_the_place_of_a_group_is_refused():
    with pytest.raises(ValueError, match="int is not a subclass of NetworkConfig"):
        to_config({"network": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network__sparsity": 1.0}, r"network.sparsity must be a number in \[0, 1\), or a list of them, got 1.0"),
        ({"network__sparsity": -0.1}, "got -0.1"),
        ({"network__sparsity": math.nan}, "got nan"),
        ({"network__sparsity": True}, "got True"),
        ({"network__sparsity": None}, "got None"),
        ({"network__sparsity": "half"}, "got 'half'"),
        ({"network__sparsity": {"input": 0}}, "got {'input': 0}"),
        ({"network__sparsity": [0.5, 0.5, 1.0]}, r"got \[0.5, 0.5, 1.0\]"),
        ({"network__sparsity": [0.5]}, r"one number for each of 3 linear layers, got \[0.5\]"),
        ({"network__sparsity": []}, r"one number for each of 3 linear layers, got \[\]"),
        (
            {"network__sparsity": [0.5] * 3, "network__dense_output": True},
            r"must be one number with network.dense_output=true, got \[0.5, 0.5, 0.5\]: write 0 in the list",
        ),
        (
            {"network__num_cells": [8], "network__dense_input": True, "network__dense_output": True},
            "must be 0 where network.dense_input=true and network.dense_output=true leaves no layer to mask, got 0.5",
        ),
        ({"network__masks": "units"}, "network.masks must be one of weight, unit, redrawn, got 'units'; did you mean unit?"),
        (
            {"network__masks": "unit", "network__sparsity": [0.5] * 3},
            r"one number for each of 2 hidden layers with network.masks=unit, got \[0.5, 0.5, 0.5\]",
        ),
        *(
            (
                {"network__masks": "unit", f"network__{name}": True},
                f"network.{name} must be false with network.masks=unit, got true: leave it out, or mask weights",
            )
            for name in ("mask_bias", "dense_input", "dense_output")
        ),
        (
            {"network__masks": "redrawn", "network__mask_bias": True, "loss__replacement": True},
            "network.mask_bias must be false with network.masks=redrawn, got true",
        ),
        ({"network__masks": "redrawn"}, "loss.replacement must be true with network.masks=redrawn, .*got false"),
        ({"network__critic": "dense"}, "network.critic must be one of masked, separate, shared, heads, got 'dense'"),
        ({"network__dropout": 1.0}, r"network.dropout must be in \[0, 1\), got 1.0"),
        ({"reset_interval": 0}, r"reset_interval must be in \[1, 1e12\], got 0"),
        ({"network__num_cells": []}, r"network.num_cells must be one to 64 numbers of at least 1, got \[\]"),
        ({"network__num_cells": [256, 0]}, r"got \[256, 0\]"),
        (
            {"network__num_subnets": 1},
            r"loss.num_target_subnets must be in \[1, network.num_subnets=1\], got 2: set loss.num_target_subnets=1 or more",
        ),
        (
            {"loss__num_trained_subnets": 6, "loss__replacement": True},
            r"loss.num_trained_subnets must be in \[1, network.num_subnets=5\], got 6: set loss.num_trained_subnets=5",
        ),
        ({"loss__num_trained_subnets": 0}, r"got 0: set loss.num_trained_subnets=1\."),
        ({"num_envs": 7}, "total_frames must be a multiple of num_envs=7, got 300000: use total_frames=300006"),
        (
            {"num_envs": 8, "init_random_frames": 5_001},
            "init_random_frames must be a multiple of num_envs=8, got 5001: use init_random_frames=5008",
        ),
        ({"num_envs": 8, "total_frames": 4}, "total_frames must be a multiple of num_envs=8, got 4: use total_frames=8"),
        ({"total_frames": 5_000}, "init_random_frames must be below total_frames=5000, or nothing is trained, got 5000"),
        (
            {"init_random_frames": 255},
            "optim.batch_size must be at most init_random_frames=255, got 256: the first batch would repeat transitions",
        ),
        ({"buffer_size": 255}, "buffer_size must be at least optim.batch_size=256, got 255"),
        (
            {"num_envs": 1_000, "total_frames": 10_000, "buffer_size": 500},
            "buffer_size must be at least num_envs=1000, got 500",
        ),
        (
            {"total_frames": 5_001, "policy_update_delay": 21},
            r"policy_update_delay must be at most 20, .*utd_ratio=20.0 in each of 1 frames\), got 21: the actor would never",
        ),
        ({"logger": "tensorbord"}, "logger must be one of csv, .*got 'tensorbord'; did you mean tensorboard"),
        ({"wandb__mode": "off"}, "wandb.mode must be one of offline, .*got 'off'; did you mean offline"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:<index>, got 'gpu'"),
        ({"wandb__project": ""}, "wandb.project must not be empty"),
        ({"folder": ""}, "folder must not be empty"),
    ],
)
def test_what_contradicts_is_refused_with_both_values(options, message):
    with pytest.raises(ValueError, match=message):
        to_config(nested(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sed": 1}, "unknown option 'sed'; did you mean 'seed'?"),
        ({"lr": 1}, "unknown option 'lr'; did you mean 'optim.lr'?"),
        ({"network": {"num_subnet": 1}}, "unknown option 'network.num_subnet'; did you mean 'network.num_subnets'?"),
        (
            {"interval": 1},
            "unknown option 'interval'; did you mean 'topology.interval' or 'eval.interval' or 'checkpoint.interval'?",
        ),
    ],
)
def test_an_unknown_key_names_the_closest(options, message):
    with pytest.raises(ValueError) as error:
        to_config(options)
    assert str(error.value) == message


def test_a_config_made_in_python_is_held_to_the_same_rules():
    for wrong in (TrainConfig(num_envs=True), TrainConfig(optim=OptimConfig(lr=math.nan)), TrainConfig(seed=-1)):
        with pytest.raises(ValueError):
            validate(wrong)
    with pytest.raises(ValueError, match=r"folder must be of its type and resolved, got 'runs/.*: use what to_config returns"):
        validate(TrainConfig())
    with pytest.raises(ValueError, match="seed must be of its type"):
        validate(dataclasses.replace(to_config({}), seed="3"))
    validate(TrainConfig(folder="runs/0", utd_ratio=20, network=NetworkConfig(sparsity=0)))
    assert to_config(TrainConfig(seed=3)).folder.startswith("runs/Hopper-v4/omnet/seed3/20")


def test_every_option_has_a_comment_and_every_none_a_meaning():
    source = Path(options_module.__file__).read_text()
    for name, value in LEAVES.items():
        lines = [line for line in source.splitlines() if line.startswith(f"    {name.split('.')[-1]}: ") and " = " in line]
        assert lines, name
        assert all("  # " in line for line in lines), name
        if value is None:
            assert all("None:" in line for line in lines), name


# Devices


def test_auto_is_the_gpu_where_there_is_one_and_the_cpu_elsewhere(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    for count, expected in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert resolve_device("auto") == torch.device(expected)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="one of the 2 CUDA devices, cuda:0 to cuda:1, got 'cuda:2'"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_torch_does_not_find_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device={name}, but torch .* finds no CUDA device: use device=cpu or device=auto"):
        to_config({"device": name})


@pytest.mark.parametrize("name", ["", "tpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "mps", "cpu:0"])
def test_a_device_of_another_kind_is_refused(name):
    with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or cuda:<index>, got '{name}'"):
        resolve_device(name)


# Hydra


def test_hydra_composes_the_registered_config_and_to_config_takes_it():
    register()
    with initialize(version_base="1.3", config_path=None):
        composed = compose("train", ["optim.lr=1e-5", "network.sparsity=[0,0.5,0]", "env=Ant-v4", "seed=3"])
    config = to_config(composed)
    assert config.optim.lr == 1e-5
    assert config.network.sparsity == [0, 0.5, 0]
    assert config.folder.startswith("runs/Ant-v4/omnet/seed3/20")


def test_hydra_composes_a_row_under_what_is_given():
    register()
    with initialize(version_base="1.3", config_path="../examples"):
        config = to_config(compose("omnet_sac", ["algorithm=redq", "network.num_subnets=4", "seed=3"]))
        default = to_config(compose("omnet_sac", []))
    assert default == to_config({"folder": default.folder})  # the folder has the time in it
    assert (config.algorithm, config.network.critic, config.network.num_subnets) == ("redq", "separate", 4)
    assert (config.loss.num_trained_subnets, config.loss.num_target_subnets) == (None, 2)


def test_an_option_that_was_added_to_hydras_is_unknown():
    register()
    with initialize(version_base="1.3", config_path=None):
        composed = compose("train", ["+sed=3", "+network.foo=1"])
    with pytest.raises(ValueError, match=r"unknown option '(sed|network\.foo)'; did you mean"):
        to_config(composed)


def test_the_folder_is_the_one_that_hydra_resolved():
    setup_globals()
    composed = OmegaConf.create({"folder": "runs/${now:%S_%f}"})
    resolved = composed.folder
    assert to_config(composed).folder == resolved


# Round trips


def test_a_saved_config_comes_back_equal(tmp_path):
    config = to_config({"optim": {"lr": 1e-5}, "network": {"sparsity": [0.0, 0.5, 0.0]}, "utd_ratio": 0.1})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "$" not in (tmp_path / "config.yaml").read_text()


def test_a_run_of_a_gpu_is_read_without_one(tmp_path):
    config = dataclasses.replace(to_config({}), device="cuda:7")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").device == "cuda:7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", "did you mean 'seed'"),
        ("- 1", "damaged"),
        ("", "damaged"),
        ("seed: [", "be read"),
        ("seed: x", "seed must be a whole number, got 'x'"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "config.yaml")


def test_a_config_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="can't be read"):
        load_config(tmp_path / "config.yaml")


def test_a_config_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    config = to_config({})
    save_config(config, tmp_path / "config.yaml")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_config(dataclasses.replace(config, seed=3), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


# Resuming


def test_what_decides_the_numbers_may_not_differ_on_resume():
    a = to_config({})
    b = to_config({"seed": 1, "network": {"num_cells": [8, 8]}, "utd_ratio": 10})
    assert differences(a, a) == {}
    assert differences(a, b) == {
        "seed": (0, 1),
        "utd_ratio": (20, 10),
        "network.num_cells": ([256, 256], [8, 8]),
    }


def test_what_only_watches_a_run_may_differ_on_resume():
    options = {"eval__interval": 7, "checkpoint__keep": 3, "wandb__mode": "online", "logger": "wandb", "log_interval": 1}
    more = {"progress": False, "compile": False, "num_threads": 1, "device": "cpu", "folder": "x", "resume": "y"}
    assert differences(to_config({}), to_config(nested(**options, **more, stop_when_diverged=False))) == {}


def test_total_frames_may_grow_but_not_shrink_on_resume():
    a, b = to_config({"total_frames": 6_000}), to_config({"total_frames": 7_000})
    assert differences(a, b) == {}
    assert differences(b, a) == {"total_frames": (7_000, 6_000)}


def test_what_may_change_are_options():
    assert set(MAY_CHANGE) <= set(vars(TrainConfig()))
