"""The device that an option names."""

from __future__ import annotations

import re

import torch


def resolve_device(name: str) -> torch.device:
    """The device called ``auto`` (cuda where there is one), ``cpu``, ``cuda`` or ``cuda:<index>``, if this machine has it."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>, got {name!r}.")
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    device = torch.device(name if name != "auto" else "cuda" if count else "cpu")
    if device.type == "cuda" and not count:
        raise ValueError(f"device={name}, but torch {torch.__version__} finds no CUDA device: use device=cpu or device=auto.")
    if (device.index or 0) >= max(count, 1):
        raise ValueError(f"device must be one of the {count} CUDA devices, cuda:0 to cuda:{count - 1}, got {name!r}.")
    return device
