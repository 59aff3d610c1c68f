"""Shared parts of the tests: seeds, a batch, small networks."""

import contextlib
import gc
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, OneHot, Unbounded

import omnet_torchrl
from omnet_torchrl import make_actor, make_deterministic_actor, make_qvalue, make_qvalue_actor

EXAMPLE = Path(__file__).parent.parent / "examples" / "omnet_sac.py"
OBS, ACT = 5, 2
torch.set_num_threads(1)  # the networks are small, and tests run side by side


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """What is there as a file begins, modules above all, is left out of garbage collections.

    Each run begins with one, which takes a third of a second otherwise; and workers that are forked copy less.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_pictures():
    """Runs of this process draw no picture, which takes most of a second; where a test is about it, ``pictures`` is used."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("matplotlib"):
            from omnet_torchrl.training.record import reporter

            patch.setattr(reporter, "learning_curve", lambda path: path)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Runs draw their picture."""
    from omnet_torchrl.training.record import plots, reporter

    monkeypatch.setattr(reporter, "learning_curve", plots.learning_curve)


def specs():
    """Specs of an observation of 5 numbers and an action of 2 within [-1, 1]."""
    return Unbounded((OBS,)), Bounded(-1, 1, (ACT,))


def small_actor(num_subnets=3, sparsity=0.4, **kwargs):
    return make_actor(*specs(), num_subnets=num_subnets, sparsity=sparsity, num_cells=(16, 16), generator=1, **kwargs)


def small_qvalue(num_subnets=3, sparsity=0.4, **kwargs):
    return make_qvalue(*specs(), num_subnets=num_subnets, sparsity=sparsity, num_cells=(16, 16), generator=2, **kwargs)


def small_deterministic_actor(num_subnets=3, sparsity=0.4, **kwargs):
    options = {"num_cells": (16, 16), "generator": 1, **kwargs}
    return make_deterministic_actor(*specs(), num_subnets=num_subnets, sparsity=sparsity, **options)


def small_qvalue_actor(num_subnets=3, sparsity=0.4, spec=None, **kwargs):
    options = {"num_cells": (16, 16), "generator": 2, **kwargs}
    return make_qvalue_actor(specs()[0], spec or OneHot(3), num_subnets=num_subnets, sparsity=sparsity, **options)


def make_batch(*batch, seed=0, done=0.0):
    """A batch of transitions; a fraction ``done`` of them terminates."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=generator)

    terminated = torch.rand(*batch, 1, generator=generator) < done
    return TensorDict(
        {
            "observation": normal(OBS),
            "action": normal(ACT).tanh(),
            "next": {
                "observation": normal(OBS),
                "reward": normal(1),
                "done": terminated.clone(),
                "terminated": terminated,
            },
        },
        batch_size=batch,
    )


@contextlib.contextmanager
def no_wait():
    """Whatever would wait for the GPU is an error."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    from matplotlib.figure import Figure

    drawn = []

    def spy(figure, *args, save=Figure.savefig, **kwargs):
        drawn.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return drawn


def run_script(*arguments, script=EXAMPLE):
    """The exit code of ``examples/omnet_sac.py`` with these arguments, in this process, and what it prints for a person."""
    printed, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                printed.write(f"{code}\n")
                code = 1
    return code or 0, printed.getvalue()


def python_without(absent, folder, *arguments, **variables):
    """Run Python in ``folder`` where no package whose name begins as one of ``absent`` can be imported."""
    folder.mkdir()
    (folder / "omnet_torchrl").symlink_to(Path(omnet_torchrl.__file__).parent)  # alone: it may lie beside the absent ones
    for path in Path(torch.__file__).parents[1].iterdir():
        name = path.name.lower()
        if not name.startswith(tuple(absent)) and path.suffix != ".pth" and name != "omnet_torchrl":
            (folder / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": str(folder), **variables}
    for name in absent:
        found = subprocess.run([sys.executable, "-S", "-c", f"import {name}"], capture_output=True, cwd=folder, env=environment)
        assert found.returncode, f"{name} is still there"
    return subprocess.run([sys.executable, "-S", *arguments], capture_output=True, text=True, cwd=folder, env=environment)
