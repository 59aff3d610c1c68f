"""The package as a whole: who imports whom, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import omnet_torchrl

PACKAGE = Path(omnet_torchrl.__file__).parent
ANYWHERE = {"torch", "tensordict", "torchrl"}
# Which of our rooms each room may import. A room is a file, or a folder, whose files may import each other as FOLDERS says.
ROOMS = {
    "arguments": set(),
    "masks": set(),
    "layers": {"arguments", "masks"},
    "specs": set(),
    "modules": {"masks", "layers", "specs", "transforms"},
    "deterministic": {"modules", "specs"},
    "grids": {"deterministic", "layers", "masks", "specs", "structures"},
    "builders": {"arguments", "deterministic", "layers", "modules", "specs"},
    "structures": {"masks", "layers"},
    "topology": {"masks"},
    "transforms": set(),
    "offset": {"transforms"},
    "envs": set(),
    "objectives": {"arguments", "layers", "specs"},
    "updates": {"arguments", "layers", "masks", "modules", "objectives", "topology"},
    "metrics": set(),
    "doctor": {"updates"},
    "__init__": {
        *("masks", "layers", "modules", "deterministic", "builders"),
        *("transforms", "offset", "objectives", "updates", "envs"),
    },
}
FOLDERS = {
    "layers": {
        "sparse": set(),
        "indexed": {"sparse"},
        "structured": {"indexed"},
        "masked": {"indexed"},
        "convolutions": {"indexed", "masked"},
        "ensembles": {"indexed"},
        "units": {"indexed"},
        "redrawn": {"indexed"},
        "dropout": {"indexed"},
        "normalization": set(),
        "shared": {"ensembles", "indexed"},
        "__init__": {
            *("convolutions", "indexed", "masked", "ensembles", "units", "redrawn", "dropout"),
            *("normalization", "shared", "sparse", "structured"),
        },
    },
    "envs": {
        **{name: set() for name in ("maze", "minatar", "suites", "tasks")},
        "__init__": {"maze", "minatar", "suites", "tasks"},
    },
    "objectives": {
        "networks": set(),
        "draws": {"networks"},
        "subnet_loss": {"draws", "networks"},
        "td_loss": {"draws", "networks", "subnet_loss"},
        "sac": {"draws", "networks", "subnet_loss", "td_loss"},
        "td3": {"draws", "networks", "subnet_loss", "td_loss"},
        "dqn": {"draws", "networks", "subnet_loss", "td_loss"},
        "__init__": {"dqn", "sac", "subnet_loss", "td3"},
    },
    "updates": {
        "private": set(),
        "adam": set(),
        "kernels": {"adam", "private"},
        "compiled": {"kernels", "private"},
        "cuda_graph": set(),
        "checks": {"kernels"},
        "steps": {"adam", "kernels"},
        "update": {"adam", "checks", "compiled", "cuda_graph", "kernels", "steps"},
        "acting": {"compiled", "kernels"},
        "replay": set(),
        "stepper": {"update"},
        "masked_networks": {"adam", "update"},
        "mask_scores": {"masked_networks", "update"},
        "mask_schedule": {"mask_scores", "masked_networks", "update"},
        "__init__": {"acting", "adam", "mask_schedule", "replay", "update", "stepper"},
    },
}
FILES = [(room, None) for room in ROOMS if room not in FOLDERS] + [(room, f) for room in FOLDERS for f in FOLDERS[room]]
# The same within training/, whose files may import any room above: of themselves, which. A room stands below those that it
# may import; "options" is the package of that name.
TRAINING = {
    "record.__init__": set(),
    "record.files": set(),
    "record.folder": {"record.files"},
    "record.checkpoint": {"record.files"},
    "record.metrics": {"record.files"},
    "record.datasets": {"record.files"},
    "record.terminal": set(),
    "record.trackers": {"record.folder"},
    "record.plots": {"record.folder", "record.metrics", "record.terminal"},
    "record.reporter": {"record.folder", "record.metrics", "record.plots", "record.terminal", "record.trackers"},
    "options.options": set(),
    "options.rows": {"options.options"},
    "options.memory": {"options.options"},
    "options.contradictions": {"options.options", "options.rows"},
    "options.checks": {
        *("device", "options.contradictions", "options.memory", "options.options", "options.rows", "record.files"),
    },
    "options.__init__": {"device", "options.options", "options.rows", "options.checks"},
    "loop.__init__": set(),
    "loop.streams": set(),
    "loop.stopping": set(),
    "loop.generators": set(),
    "loop.border": {"loop.generators"},
    "loop.adapter": set(),
    "loop.tasks": set(),
    "loop.blame": {"options.contradictions"},
    "loop.environments": {"loop.adapter", "loop.blame", "loop.border", "loop.generators", "options", "options.contradictions"},
    "loop.backends": {"loop.environments", "loop.stopping", "loop.streams", "options", "record.files"},
    "loop.exploration": {"options"},
    "loop.rollout": {"loop.environments", "loop.stopping"},
    "loop.evaluation": {"loop.environments", "loop.rollout", "loop.streams", "loop.tasks", "options", "record.files"},
    "loop.resumption": {"loop.backends", "loop.border", "loop.environments", "options", "options.checks", "record.folder"},
    "loop.mask_changes": {"loop.stopping", "loop.streams", "options"},
    "loop.trainer": {
        *("loop.exploration", "loop.mask_changes", "loop.resumption", "loop.stopping", "loop.streams", "loop.tasks"),
        *("loop.backends", "options", "record.checkpoint", "record.files", "record.reporter"),
    },
    "grid": {"loop.streams", "options", "options.contradictions", "policy"},
    "build": {"grid", "loop.streams", "options", "options.rows", "policy"},
    "device": set(),
    "policy": {"device", "record.checkpoint", "record.files", "record.folder"},
    "datasets": {
        *("loop.environments", "options", "policy"),
        *("record.checkpoint", "record.datasets", "record.folder"),
    },
    "command_line": {"loop.environments", "loop.stopping", "options", "options.checks", "record.folder", "record.terminal"},
    "run": {
        *("build", "command_line", "policy", "options", "options.checks", "options.memory"),
        *("loop.environments", "loop.stopping", "loop.trainer"),
        *(f"record.{name}" for name in ("checkpoint", "files", "folder", "metrics", "reporter", "terminal", "trackers")),
    },
    "__init__": {
        *("build", "policy", "record.datasets", "run"),
        *("loop.backends", "loop.environments", "loop.evaluation", "loop.exploration", "loop.trainer"),
    },
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_every_file_is_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOMS.keys() - FOLDERS.keys()
    for folder, files in FOLDERS.items():
        assert {path.stem for path in PACKAGE.glob(f"{folder}/*.py")} == files.keys()
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {"training", *FOLDERS}
    files = (path.relative_to(PACKAGE / "training").with_suffix("") for path in PACKAGE.glob("training/**/*.py"))
    assert {".".join(path.parts) for path in files} == set(TRAINING)


@pytest.mark.parametrize("room", TRAINING)
def test_a_room_of_training_imports_only_what_it_may(room):
    for name in imports(PACKAGE.joinpath("training", *room.split(".")).with_suffix(".py")):
        top, *rest = name.split(".")
        if top == "omnet_torchrl":
            known = ".".join(rest[1:]) in TRAINING[room] if rest[0] == "training" else rest[0] in ROOMS
            assert known, f"{room} imports {name}"
        else:
            allowed = ANYWHERE | {
                "filelock",
                "gymnasium",
                "hydra",
                "matplotlib",
                "mujoco",
                "numpy",
                "omegaconf",
                "tqdm",
                "wandb",
                "yaml",
            }
            assert top in allowed | sys.stdlib_module_names, f"{room} imports {name}"


@pytest.mark.parametrize(("room", "file"), FILES)
def test_a_room_imports_only_what_it_may(room, file):
    for name in imports(PACKAGE / room / f"{file}.py" if file else PACKAGE / f"{room}.py"):
        top, *rest = name.split(".")
        if top == "omnet_torchrl":
            assert rest[1] in FOLDERS[room][file] if rest[0] == room else rest[0] in ROOMS[room], f"{room} imports {name}"
        else:
            assert top in ANYWHERE | sys.stdlib_module_names, f"{room} imports {name}"


IMPORTS = """
import sys, torchrl.envs, torchrl.modules, torchrl.objectives
before = set(sys.modules)
names = ("gymnasium", "hydra", "matplotlib", "wandb", "tqdm", "torch._inductor")
for line in sys.argv[1:]:
    exec(line)
    print([m for m in sorted(set(sys.modules) - before) if any(m == n or m.startswith(n + ".") for n in names)])
"""


def test_neither_the_package_nor_reading_options_and_policies_imports_an_environment_or_a_compiler():
    """What torchrl itself imports is not ours: tensordict imports torch._dynamo, which imports a part of torch._inductor."""
    lines = ["omnet_torchrl", "omnet_torchrl.training.options", "omnet_torchrl.training; omnet_torchrl.training.load_policy"]
    command = [sys.executable, "-c", IMPORTS, *(f"import {line}" for line in lines)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]"] * 3


def test_the_names_of_training_exist_and_others_do_not():
    from omnet_torchrl import training

    assert set(training._ROOMS) == set(training.__all__)
    assert all(getattr(training, name).__doc__ for name in training.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        training.nothing  # noqa: B018


def test_public_names_exist_and_are_documented():
    for name in omnet_torchrl.__all__:
        assert getattr(omnet_torchrl, name).__doc__, name
    assert (PACKAGE / "py.typed").exists()


# Whoever adds a feature also removes what it made superfluous; these are where the rooms stand, and they must not grow unseen.
MAX_FILE, MAX_FUNCTION, MAX_CORE, MAX_TRAINING = 350, 50, 8_870, 5_910


def test_files_functions_and_rooms_keep_within_their_budgets():
    lines = {path.relative_to(PACKAGE): path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    training = sum(count for path, count in lines.items() if path.parts[0] == "training")
    assert {path: count for path, count in lines.items() if count > MAX_FILE} == {}
    assert sum(lines.values()) - training <= MAX_CORE
    assert training <= MAX_TRAINING
    for path in lines:
        functions = (node for node in ast.walk(ast.parse((PACKAGE / path).read_text())) if isinstance(node, ast.FunctionDef))
        assert {each.name for each in functions if each.end_lineno - each.lineno + 1 > MAX_FUNCTION} == set(), path
