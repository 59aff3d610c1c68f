"""The package as a whole: who imports whom, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import omnet_torchrl

PACKAGE = Path(omnet_torchrl.__file__).parent
ANYWHERE = {"torch", "tensordict", "torchrl"}
# Which of our rooms each room may import.
ROOMS = {
    "masks": set(),
    "layers": {"masks"},
    "ensembles": {"masks", "layers"},
    "redrawn": {"masks", "layers"},
    "dropout": {"masks", "layers"},
    "units": {"masks", "layers"},
    "modules": {"masks", "layers", "transforms"},
    "builders": {"layers", "modules"},
    "transforms": set(),
    "envs": set(),
    "draws": set(),
    "objectives": {"draws", "dropout"},
    "metrics": set(),
    "__init__": {
        "masks",
        "layers",
        "ensembles",
        "units",
        "redrawn",
        "dropout",
        "modules",
        "builders",
        "transforms",
        "objectives",
        "envs",
    },
}
# The same within training/, whose files may import any room above: of themselves, which.
TRAINING = {
    "options": set(),
    "algorithms": {"adam", "global_numbers", "options", "update"},
    "config": {"algorithms", "files", "options"},
    "command_line": {"algorithms", "config", "environments"},
    "terminal": set(),
    "files": set(),
    "run_folder": {"files"},
    "trackers": {"run_folder"},
    "logging": {"run_folder", "trackers"},
    "plots": {"run_folder", "logging", "terminal"},
    "maze": {"plots"},
    "divergence": set(),
    "stopping": set(),
    "bias": {"divergence", "environments", "stopping"},
    "environments": set(),
    "evaluation": {"acting", "bias", "divergence", "environments", "global_numbers", "maze", "options", "stopping"},
    "products": set(),
    "compiled": {"products"},
    "adam": {"compiled"},
    "update": {"adam", "compiled"},
    "acting": {"compiled", "update"},
    "storage": set(),
    "checkpoint": {"files"},
    "global_numbers": set(),
    "trainer": {"acting", "divergence", "environments", "update", "checkpoint", "global_numbers", "stopping", "storage"},
    "policy": {"algorithms", "config", "options", "run_folder", "environments", "checkpoint"},
    "run": {
        "algorithms",
        "command_line",
        "config",
        "options",
        "environments",
        "run_folder",
        "logging",
        "plots",
        "stopping",
        "terminal",
        "checkpoint",
        "trainer",
    },
    "__init__": {"adam", "acting", "environments", "evaluation", "policy", "run", "storage", "trainer", "update"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_every_file_is_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("training/*.py")} == set(TRAINING)
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {"training"}


@pytest.mark.parametrize("room", TRAINING)
def test_a_room_of_training_imports_only_what_it_may(room):
    for name in imports(PACKAGE / "training" / f"{room}.py"):
        top, *rest = name.split(".")
        if top == "omnet_torchrl":
            assert rest[1] in TRAINING[room] if rest[0] == "training" else rest[0] in ROOMS, f"{room} imports {name}"
        else:
            allowed = ANYWHERE | {"gymnasium", "hydra", "matplotlib", "numpy", "omegaconf", "tqdm", "wandb", "yaml"}
            assert top in allowed | sys.stdlib_module_names, f"{room} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    for name in imports(PACKAGE / f"{room}.py"):
        top, *rest = name.split(".")
        if top == "omnet_torchrl":
            assert rest[0] in ROOMS[room], f"{room} imports {name}"
        else:
            assert top in ANYWHERE | sys.stdlib_module_names, f"{room} imports {name}"


def test_importing_the_package_imports_no_training_dependency():
    code = (
        "import sys, torchrl.envs, torchrl.modules, torchrl.objectives; before = set(sys.modules); import omnet_torchrl; "
        "print(sorted({'gymnasium', 'hydra', 'matplotlib', 'wandb', 'tqdm'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in omnet_torchrl.__all__:
        assert getattr(omnet_torchrl, name).__doc__, name
    assert (PACKAGE / "py.typed").exists()
