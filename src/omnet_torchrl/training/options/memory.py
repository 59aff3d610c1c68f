"""Whether a run fits into memory, from its options alone: a lower bound, which refuses what no machine could begin."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from omnet_torchrl.training.options.options import TrainConfig

# What limits a container (cgroups 2 and 1): the machine may have far more.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(config: TrainConfig, device: torch.device, observation_size: int = 1, action_size: int = 1) -> None:
    """Raise a ``ValueError`` that names the option if replay buffer, networks and batches need more memory than there is."""
    parts = needed(config, observation_size, action_size)
    total, there = sum(parts.values()), available(device)
    if there and total > there:
        name, size = max(parts.items(), key=lambda part: part[1])
        where = "this GPU" if device.type == "cuda" else "this machine"
        raise ValueError(
            f"{name} must fit into the memory of {where}, {_gib(there)}, but needs at least {_gib(size)}: lower it."
        )


def needed(config: TrainConfig, observation_size: int, action_size: int) -> dict[str, int]:
    """Bytes that a run needs at least: what needs them, with the values of its options, and how many."""
    network, size, cells = config.network, config.optim.batch_size, config.network.num_cells
    transition = 4 * (2 * observation_size + action_size + 1) + 2  # both observations, action, reward; done and terminated
    updates = math.ceil(config.utd_ratio * config.environments)
    inputs = [observation_size + action_size, *cells]
    weights = sum(a * b for a, b in zip(inputs, [*cells, 1], strict=True))
    networks, masks = (network.num_subnets, 0) if network.critic == "separate" else (1, network.num_subnets)
    masks *= network.masks == "weight"
    return {
        f"buffer_size={config.buffer_size} with total_frames={config.total_frames}": transition
        * min(config.buffer_size, config.total_frames),
        f"utd_ratio={config.utd_ratio:g} with optim.batch_size={size}": transition * size * updates,
        # Weights, their gradients, two moments and the targets; a byte for each number of a mask.
        f"network.num_cells={cells} with network.num_subnets={network.num_subnets}": weights * (networks * 5 * 4 + masks),
    }


def available(device: torch.device) -> int:
    """Bytes of memory that a process can have at most; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):  # Windows
        return 0
    for path in LIMITS:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # another system, or "max"
            continue
    return min(found)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
