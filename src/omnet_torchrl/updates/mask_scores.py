"""The gradients that masks are chosen by: of a loss, with respect to all weights of a network, those outside its masks too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import grad

from omnet_torchrl.objectives.subnet_loss import SubnetLoss
from omnet_torchrl.updates.masked_networks import MaskedNetwork, Path
from omnet_torchrl.updates.update import Update


def loss_gradients(
    update: Update,
    network: MaskedNetwork,
    k: int | slice,
    masks: Mapping[Path, Tensor] | None,
    batch: TensorDictBase,
    generator: torch.Generator,
    *,
    actors_too: bool = False,
) -> dict[Path, Tensor]:
    """The loss's gradient with respect to the weights as they enter the network.

    Args:
        update (Update): whose loss is asked; nothing of it is changed.
        network (MaskedNetwork): the network.
        k (int or slice): of masks over one weight tensor, which one; ``slice(None)``: all of several separate networks.
        masks (mapping or None): the network is asked under these, and its target too. ``None``: without masks.
        batch (TensorDictBase): ``(B,)`` transitions; ``(T, B)`` where the loss has ``choose="batch"``. A mask is scored by its
            own task's; of a task's C critics, each by one in C of them: of the same, dense, all C would get the same mask.
        generator (torch.Generator): of the loss's draws.

    Keyword Args:
        actors_too (bool): add the gradient of the actor's loss with respect to the critic. Defaults to ``False``.
    """
    params, loss, device = update.state.get("params"), update.loss, update.device
    batch = batch.to(device)
    if loss.choose == "batch" and isinstance(k, int):
        batch = _of_task(update, network, k, batch)
    draws = _draws(loss, network, k, batch, generator)
    compute: Any = network.step.objective
    replaced = {network.mask_path(path): torch.ones_like(mask) for path, mask in network.masks(update).items()}
    weights = dict(network.weights(update))
    for path, mask in (masks or {}).items():
        weights[path] = weights[path] * mask
        target = (f"target_{path[0]}", *path[1:])
        if target in params.keys(True, True):
            replaced[target] = params.get(target) * mask

    def objective(weights: dict[Path, Tensor]) -> Tensor:
        given = params.copy().update(TensorDict({**replaced, **weights}))
        total = compute(batch, draws, given)[0]
        if actors_too and network.role == "critic":
            action = loss.actor_loss(batch, draws=draws, params=given)[1]["action"]
            asked = loss.drawn(batch, draws).get("value")
            total = total - loss.value(batch, action, asked, params=given.get(network.group)).mean()
        return total

    return grad(objective)(weights)


def _draws(
    loss: SubnetLoss, network: MaskedNetwork, k: int | slice, batch: TensorDictBase, generator: torch.Generator
) -> TensorDict:
    """The loss's draws, with which mask ``k`` is asked, or all of several separate networks."""
    draws = loss.draw(batch, generator)
    if loss.choose == "batch":  # the batch has the other indices
        if isinstance(k, int) and network.role == "critic":
            draws.set("critic", torch.full((1, 1, 1), k, device=draws.device))
    elif isinstance(k, int):  # under one mask, everything
        for name in ("critic", "target", "value") if network.role == "critic" else ("actor",):
            if name in draws.keys():
                draws.set(name, torch.full_like(draws.get(name)[:1] if name == "critic" else draws.get(name), k))
    elif network.role == "critic":
        draws.set("critic", torch.arange(loss.num_subnets, device=draws.device))
    return draws


def _of_task(update: Update, network: MaskedNetwork, k: int, batch: TensorDictBase) -> TensorDictBase:
    """The transitions ``(1, B / C)`` that mask ``k`` is scored by."""
    critics = update.loss.num_trained_subnets if network.role == "critic" else 1
    task = k // critics
    found = (batch.get(update.loss.tensor_keys.subnet)[:, 0] == task).nonzero().flatten()
    if len(found) != 1 or batch.shape[1] < critics:
        got = f"{len(found)} with {batch.shape[1]} transitions"
        raise ValueError(f"masks are chosen by a batch (T, B) with one row of each task, got of task {task} {got}.")
    return batch[found, k % critics :: critics]
