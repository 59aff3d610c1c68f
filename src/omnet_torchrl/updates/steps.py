"""One step of a loss as a pure function of (state, batch, draws): loss, backward, optimiser and target step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from torch import Tensor
from torch.func import grad_and_value

from omnet_torchrl.objectives.subnet_loss import LossStep, SubnetLoss
from omnet_torchrl.updates.adam import AdamGroup
from omnet_torchrl.updates.kernels import LowPrecision

PRIORITY = "priority"  # of each transition, among the outputs of a step
TARGETS = "targets"  # the step that moves the target networks, where they move at an interval
Weights = dict[tuple[str, ...], Tensor]
Schedule = tuple[tuple[str, int], ...]  # name of a step, and which of the batches it reads


def steps_of(loss: SubnetLoss, target_update_interval: int) -> dict[str, LossStep]:
    """The steps of a loss by their names; where targets move at an interval, in a step of their own, the last one."""
    steps = {step.name: step for step in loss.steps()}
    if target_update_interval == 1:
        return steps
    targets = tuple(name for step in steps.values() for name in step.targets)
    return {name: replace(step, targets=()) for name, step in steps.items()} | {TARGETS: LossStep(TARGETS, (), None, targets)}


def schedule_of(
    steps: Mapping[str, LossStep], delayed: Sequence[bool], numbers: Sequence[int], target_update_interval: int
) -> Schedule:
    """Which steps the updates of these numbers make, where it is known whether the delayed ones belong to each."""
    due = [number % target_update_interval == 0 for number in numbers]
    every = ((name, i, step) for i in range(len(numbers)) for name, step in steps.items())
    return tuple((name, i) for name, i, step in every if (due[i] if name == TARGETS else delayed[i] or not step.delayed))


def run_step(
    step: LossStep,
    adam: Sequence[AdamGroup],
    state: TensorDict,
    batch: TensorDictBase,
    draws: TensorDictBase,
    *,
    tau: float,
    max_grad_norm: Mapping[str, float],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Make a step of a loss, and change the tensors of ``state`` in place; nothing else is changed.

    Args:
        step (LossStep): what the step trains, and how.
        adam (sequence of AdamGroup): which optimisers move which parameters; their numbers are those of ``state``.
        state (TensorDict): ``params``, and ``optim``, with the states of ``adam`` under the step's name and their place.
        batch, draws (TensorDictBase): ``(B,)`` transitions, and the draws of one update.

    Keyword Args:
        tau (float): step of the targets.
        max_grad_norm (mapping): name of a parameter group to the largest norm of its gradient.
        dtype (torch.dtype or None): of the inputs of matrix products. ``None``: the parameters' own.

    Returns:
        dict: scalars; what the step computes for each task; ``priority (B,)``, where it is for each transition.
    """
    params = state.get("params")
    trained = {key: params.get(key) for group in adam for key in group.params}

    compute = step.objective
    if compute is None:
        _move_targets(step.targets, trained, params, tau)
        return {}

    def objective(weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
        return compute(batch, draws, params.copy().update(TensorDict(weights)))

    with contextlib.nullcontext() if dtype is None else LowPrecision(dtype):
        grads, (_, outputs) = grad_and_value(objective, has_aux=True)(trained)
    _clip(grads, {name: norm for name, norm in max_grad_norm.items() if name in step.trains})
    for place, group in enumerate(adam):
        group.step(state.get(("optim", step.name, str(place))), trained, grads)
    _move_targets(step.targets, trained, params, tau)
    outputs = {key: value.detach() for key, value in outputs.items()}
    for key, value in list(outputs.items()):
        if value.ndim and value.shape == batch.batch_size:
            outputs |= {key: value.mean(), PRIORITY: value}
    return outputs | ({} if step.after is None else step.after(params))


def _move_targets(groups: Iterable[str], trained: Weights, params: TensorDictBase, tau: float) -> None:
    for key, weight in trained.items():
        if key[0] in groups:
            params.get((f"target_{key[0]}", *key[1:])).lerp_(weight, tau)


def _clip(grads: Weights, norms: Mapping[str, float]) -> None:
    for name, largest in norms.items():
        keys = [key for key in grads if key[0] == name]
        norm = torch.stack([grads[key].norm() for key in keys]).norm()
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        grads |= {key: grads[key] * scale for key in keys}


def collected(steps: Iterable[tuple[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The newest of each output of some steps; of what there is for each transition, all of them: ``(U, B)``."""
    outputs: dict[str, Tensor] = {}
    priorities = []
    for _, output in steps:
        outputs |= output
        if PRIORITY in output:
            priorities.append(output[PRIORITY])
    return outputs | ({PRIORITY: torch.stack(priorities)} if priorities else {})


def held(group: TensorDictParams | Tensor) -> list[Tensor]:
    """The tensors of a parameter group, in a fixed order; faster than by their path."""
    return [*group.parameters(), *group.buffers()] if isinstance(group, TensorDictParams) else [group]


def leaves_of(groups: Mapping[str, TensorDictParams | Tensor]) -> dict[tuple[str, ...], Tensor]:
    """The tensors of parameter groups, by their path, which begins with the group's name."""
    found: dict[tuple[str, ...], Tensor] = {}
    for name, group in groups.items():
        if isinstance(group, TensorDictParams):
            found |= {(name, *((key,) if isinstance(key, str) else key)): leaf for key, leaf in group.items(True, True)}
        else:
            found[(name,)] = group
    return found
