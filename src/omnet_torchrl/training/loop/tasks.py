"""What a run of several tasks does otherwise: how frames are stored and sampled, and what the logs call the tasks.

A step of all environments is one element of the replay buffer, ``(T,)``. What is sampled of it is balanced over the tasks by
itself: a batch ``(T, B / T)`` has equally many transitions of each, of the same steps, which have nothing else in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from omnet_torchrl.envs import task_names


def task_labels(env: str) -> tuple[str, ...]:
    """What the logs call the tasks of the option ``env``: their names without the suite; none where there is one task."""
    names = task_names(env)
    short = tuple(name.rpartition("/")[2] for name in names)
    return () if len(names) == 1 else short if len(set(short)) == len(short) else names


def stored(data: TensorDictBase, tasks: Sequence[str]) -> TensorDictBase:
    """What one step of all environments adds to the replay buffer: so many elements, or one of all tasks."""
    return data.reshape(1, -1) if tasks else data.reshape(-1)


def sampled(buffer: ReplayBuffer, count: int, size: int, tasks: Sequence[str]) -> TensorDictBase:
    """Batches of ``size`` transitions for ``count`` updates: ``(count, size)``, or ``(count, T, size / T)``."""
    if not tasks:
        return buffer.sample(count * size).reshape(count, size)
    each = size // len(tasks)
    return buffer.sample(count * each).reshape(count, each, len(tasks)).transpose(1, 2)


def episodes(data: TensorDictBase, tasks: Sequence[str]) -> Iterator[dict[str, float]]:
    """The records of each episode that ended in a step: under the names of all, and under those of its task."""
    for i in data.get(("next", "done")).view(-1).nonzero().flatten().tolist():
        end = data.get("next").reshape(-1)[i]
        ended = {"episode_return": end["episode_reward"].item(), "episode_length": end["step_count"].item()}
        if "success" in end.keys():
            ended["success"] = float(end["success"])
        suffixes = ["", *([f"_{tasks[i % len(tasks)]}"] if tasks else [])]
        yield {f"train/{name}{suffix}": value for suffix in suffixes for name, value in ended.items()}


def named(metrics: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, float]:
    """The numbers of an update by the names that they are logged under: ``qvalue``, and ``qvalue_<task>`` of each task."""
    values: dict[str, float] = {}
    for name, value in metrics.items():
        if value.ndim:
            each = zip(tasks, value.tolist(), strict=True)
            values |= {f"{name.removesuffix('_task')}_{task}": number for task, number in each}
        else:
            values[name] = value.item()
    return values
