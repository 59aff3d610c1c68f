"""The matmul floor: the matrix products of OMNet's block and nothing else, back to back.

Counted are exactly the products that the block cannot do without, at their shapes, forward and backward, by the library that
the update calls (MKL, with results written into memory that is there already, or oneDNN, see ``updates/kernels.py``): no
masks, biases, activations, normalisation, losses, optimisers, replay.

* critic update: the actor for the next action (forward); M target critics (forward); K critics (forward, gradients of the
  weights, gradients of the inputs of all layers but the first);
* actor update: the actor (forward, gradients as above); V critics (forward, gradients of the inputs down to the action).

It counts less than :func:`omnet_torchrl.metrics.sac_flops`, whose convention takes a training pass for three forward passes and
thus includes gradients of the first layer's inputs that nobody needs.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from omnet_torchrl.updates import kernels as libraries

Product = tuple[int, int, int]  # rows, inner size, columns


def passes(batch: int, sizes: list[int], *, weights: bool = False, inputs: int | None = None) -> Iterator[Product]:
    """The products of one pass through a network: forward; gradients of its weights; of its inputs down to layer ``inputs``."""
    for i, (before, after) in enumerate(pairwise(sizes)):
        yield batch, before, after
        if weights:
            yield after, batch, before
        if inputs is not None and i >= inputs:
            yield batch, after, before


def products(
    observation: int,
    action: int,
    *,
    width: int = 256,
    batch: int = 256,
    updates: int = 20,
    trained: int = 1,
    target: int = 2,
    value: int = 5,
) -> list[Product]:
    """All products of a block of critic updates and one actor update."""
    actor, critic = [observation, width, width, 2 * action], [observation + action, width, width, 1]
    update = list(passes(batch, actor))
    update += target * list(passes(batch, critic))
    update += trained * list(passes(batch, critic, weights=True, inputs=1))
    delayed = list(passes(batch, actor, weights=True, inputs=1))
    # What the actor needs of the gradient of the first layer's inputs is the action's part.
    delayed += value * [*passes(batch, critic, inputs=1), (batch, width, action)]
    return updates * update + delayed


def flops(shapes: list[Product]) -> int:
    """A multiply-add is two operations."""
    return sum(2 * rows * inner * columns for rows, inner, columns in shapes)


def block(shapes: list[Product], device: str = "cpu"):
    """The products as a function without arguments."""
    made: dict[Product, tuple[Tensor, Tensor, Tensor]] = {}
    for rows, inner, columns in shapes:
        if (rows, inner, columns) not in made:
            left, right = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
            made[rows, inner, columns] = left, right, left @ right
    by_onednn = {shape for shape, (left, right, _) in made.items() if libraries.mm(left, right) is not NotImplemented}
    calls = [(*made[shape], shape in by_onednn) for shape in shapes]

    def run() -> None:
        for left, right, out, onednn in calls:
            if onednn:
                torch.ops.omnet_torchrl.mm(left, right)
            else:
                torch.mm(left, right, out=out)

    return run
