"""The doctor's ten lines, where everything is there and where it is not."""

import importlib.metadata
import re
import sys

import pytest
import torch
from conftest import python_without

import omnet_torchrl
from omnet_torchrl import doctor

NAMES = ["omnet_torchrl", "torch", "devices", "compiler", "environments", "jobs", "trackers", "games", "sweeps", "export"]


def lines():
    report = doctor.report()
    assert [line.split()[0] for line in report] == NAMES
    assert all("\n" not in line for line in report)
    return dict(zip(NAMES, report, strict=True))


def test_ten_lines_have_versions_and_devices():
    said = lines()
    assert omnet_torchrl.__version__ in said["omnet_torchrl"]
    assert torch.__version__ in said["torch"]
    assert f"torchrl {importlib.metadata.version('torchrl')}" in said["torch"]
    assert f"{torch.get_num_threads()} thread" in said["devices"]
    assert f"gymnasium {importlib.metadata.version('gymnasium')}" in said["environments"]


def test_an_untested_torch_is_said(monkeypatch):
    assert "tested are" not in lines()["torch"]
    monkeypatch.setattr(doctor, "TESTED", ((9, 0), (9, 1)))
    assert lines()["torch"].endswith("; tested are 9.0 to 9.1: others make updates slower to call")


@pytest.mark.parametrize(
    ("module", "line", "gives"),
    [
        ("mujoco", "environments", "missing: mujoco; .*train.* gives MuJoCo's tasks"),
        ("hydra", "jobs", "missing: hydra-core; .*train.* gives runs with options"),
        ("wandb", "trackers", "missing: wandb; pip install wandb gives logger=wandb or tensorboard"),
        ("tensorboard", "trackers", "missing: tensorboard; pip install tensorboard gives logger=wandb or tensorboard"),
        ("minatar", "games", "missing: MinAtar; .*GPL-3.0.* gives MinAtar's games"),
        ("onnxscript", "export", r"missing: (onnx, )?onnxscript; pip install (onnx )?onnxscript gives policies as ONNX"),
    ],
)
def test_what_is_missing_says_how_it_is_installed_and_what_it_gives(module, line, gives, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert re.search(gives, lines()[line])


def test_without_a_compiler_it_says_what_to_do(monkeypatch):
    assert "missing" not in lines()["compiler"]
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert re.search(r"missing: no (g|clang)\+\+; set compile=false, install", lines()["compiler"])


@pytest.mark.parametrize(("script", "said"), [("", "no reason given"), ("echo 'x.h: fatal error: none' >&2", "error: none")])
def test_a_compiler_that_does_not_compile_is_said(script, said, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\n{script}\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert re.search(rf"missing: .*broken does not compile \(.*{said}\); set compile=false", lines()["compiler"])


def test_it_runs_where_torch_tensordict_and_torchrl_are_all_there_is(tmp_path):
    """In an environment without simulator, hydra, trackers and compiler."""
    absent = ("gymnasium", "mujoco", "hydra", "omegaconf", "tqdm", "matplotlib", "wandb", "tensorboard", "minatar", "onnx")
    done = python_without(absent, tmp_path / "bare", "-m", "omnet_torchrl.doctor", PATH="/nowhere", CXX="")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == NAMES
    for name, line in zip(NAMES[3:], said[3:], strict=True):
        assert "missing: " in line, name
