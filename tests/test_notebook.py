"""A job in a notebook, and the package in a process that loads its modules again."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import EXAMPLE


def test_modules_that_are_loaded_again_work():
    """As a notebook's autoreload, or a test that imports the package anew, does it."""
    code = """
import importlib, sys, torch
def product():
    from omnet_torchrl.updates import kernels
    return kernels._operation()(torch.ones(2, 2), torch.ones(2, 2)).sum().item()
def everything():
    import omnet_torchrl.training.run
    return [name for name in sorted(sys.modules) if name.split(".")[0] == "omnet_torchrl"]
print(product(), end=" ")
for name in everything():
    importlib.reload(sys.modules[name])
print(product(), end=" ")
for name in everything():
    del sys.modules[name]
everything()
print(product())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:omnet_torchrl", "-c", code], capture_output=True, text=True
    )
    assert done.stdout.split() == ["8.0"] * 3, done.stderr


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_progress(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in ("ipykernel", "ipywidgets"):
        pytest.importorskip(package)
    for name in ("notebook.ipynb", "omnet_sac.py", "omnet_sac.yaml"):
        shutil.copy(EXAMPLE.parent / name, tmp_path)
    notebook = nbformat.read(tmp_path / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    assert "'finished'" in outputs[-1]["data"]["text/plain"]
    (run,) = (tmp_path / "runs").rglob("run.json")
    assert json.loads(run.read_text())["status"] == "finished"
