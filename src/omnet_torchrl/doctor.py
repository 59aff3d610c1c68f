"""What is here and what is missing, in ten lines: ``python -m omnet_torchrl.doctor``. Issues ask for its output."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec

import torch

from omnet_torchrl.updates.private import TESTED

INSTALL = "pip install {missing}"  # what is missing, and no more
TRAIN = 'pip install "omnet-torchrl[train]"'
LAUNCHERS = {f"hydra_plugins.hydra_{each}_launcher": f"hydra-{each}-launcher" for each in ("joblib", "submitit")}
CLUSTERS = {**LAUNCHERS, "ray": "ray"}
JOBS = {each.removesuffix("-core"): each for each in ("hydra-core", "omegaconf", "tqdm", "filelock", "matplotlib")}
TRACKERS = {"wandb": "wandb", "tensorboard": "tensorboard"}
# Optional parts: the modules with the packages that have them, how these are installed, and what they give.
PARTS: dict[str, tuple[dict[str, str], str, str]] = {
    "environments": ({"gymnasium": "gymnasium", "mujoco": "mujoco"}, TRAIN, "MuJoCo's tasks and environments of your own"),
    "jobs": (JOBS, TRAIN, "runs with options, checkpoints and pictures"),
    "trackers": (TRACKERS, INSTALL, "logger=wandb or tensorboard"),
    "games": ({"minatar": "MinAtar"}, f"{INSTALL} (GPL-3.0)", "MinAtar's games"),
    "sweeps": (CLUSTERS, INSTALL, "several runs at a time, and clusters"),
    "export": ({"onnx": "onnx", "onnxscript": "onnxscript"}, INSTALL, "policies as ONNX"),
}


def report() -> list[str]:
    """The ten lines."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    lines = {"omnet_torchrl": f"{sys.modules['omnet_torchrl'].__version__}, {system}", "torch": _torch(), "devices": _devices()}
    lines["compiler"] = _compiler()
    lines |= {name: _part(*part) for name, part in PARTS.items()}
    return [f"{name:<14}{text}" for name, text in lines.items()]


def _torch() -> str:
    oldest, newest = (".".join(map(str, version)) for version in TESTED)
    found = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    said = "" if TESTED[0] <= found <= TESTED[1] else f"; tested are {oldest} to {newest}: others make updates slower to call"
    others = ", ".join(f"{name} {metadata.version(name)}" for name in ("torchrl", "tensordict"))
    return f"{torch.__version__}, {others}{said}"


def _devices() -> str:
    counts = {"core": os.cpu_count() or 1, "thread": torch.get_num_threads()}
    cpu = ", ".join([torch.backends.cpu.get_cpu_capability(), *(f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items())])
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join([f"cpu ({cpu})", *cuda]) + ("" if cuda else "; no CUDA device")


def _compiler() -> str:
    """What Inductor compiles with: the environment variable CXX, or the system's own; tried on what its kernels include."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    lacking = f"set compile=false, install {name} or name yours in CXX: compiled updates are several times faster"
    if shutil.which(name) is None:
        return f"missing: no {name}; {lacking}"
    command = [name, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_paths()['include']}", "-"]
    try:
        tried = subprocess.run(command, input="#include <Python.h>", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"missing: {name} can't be run ({type(error).__name__}); {lacking}"
    if tried.returncode:
        errors = [line for line in tried.stderr.splitlines() if "error" in line]
        return f"missing: {name} does not compile ({(errors or ['no reason given'])[0].strip()}); {lacking}"
    version = subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()
    return version[0] if version else name


def _part(packages: dict[str, str], install: str, purpose: str) -> str:
    found = [f"{package} {_version(package)}" for module, package in packages.items() if _exists(module)]
    missing = [package for module, package in packages.items() if not _exists(module)]
    lacking = f"missing: {', '.join(missing)}; {install.format(missing=' '.join(missing))} gives {purpose}" if missing else ""
    return "; ".join(part for part in (", ".join(found), lacking) if part)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of what it is a part of
        return False


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    print("\n".join(report()))
