r"""Masks that change: scores of weights, which of them stay, and where new ones grow.

Pure functions, the same for every schedule: DAPD ("Efficient Reinforcement Learning by Discovering Neural Pathways", Arnob et
al., 2024), RigL ("Rigging the Lottery", Evci et al., 2020, https://arxiv.org/abs/1911.11134) and SET ("Scalable Training of
Artificial Neural Networks with Adaptive Sparse Connectivity", Mocanu et al., 2018, https://arxiv.org/abs/1707.04780).

A network is a mapping of names to weights, gradients, scores (of one shape each) or boolean masks. Exactly as many weights are
kept as asked: of equal scores, those that come first (in the mapping's order, then along the flattened tensor) are kept, on
every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from omnet_torchrl.masks import as_generator

Tensors = Mapping[str, Tensor]


def saliency(weights: Tensors, gradients: Tensors) -> dict[str, Tensor]:
    r"""Score each weight by :math:`|\theta\, \partial L / \partial \theta|`, divided by the sum over the network.

    To first order, what the loss changes by if the weight is left out (SNIP, Lee et al., 2019,
    https://arxiv.org/abs/1810.02340), which DAPD takes. The gradient is that of the dense network where weights that sleep may
    come back.

    Args:
        weights, gradients (mapping): names to tensors of equal shapes.

    Returns:
        dict: non-negative scores of the same names and shapes, with sum 1, or all 0.
    """
    products = {name: (weight.detach() * gradients[name]).abs() for name, weight in weights.items()}
    total = torch.stack([product.sum() for product in products.values()]).sum()
    return {name: product / total.clamp_min(torch.finfo(product.dtype).tiny) for name, product in products.items()}


def moving_average(average: Tensors | None, scores: Tensors, decay: float) -> dict[str, Tensor]:
    """Return ``decay * average + (1 - decay) * scores``; the scores where there is no average yet.

    Args:
        average (mapping or None): the one before.
        scores (mapping): the newest.
        decay (float): in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}.")
    if average is None:
        return {name: score.clone() for name, score in scores.items()}
    return {name: torch.lerp(score, average[name], decay) for name, score in scores.items()}


def global_top_k(scores: Tensors, density: float) -> dict[str, Tensor]:
    """Keep the weights of the largest scores over all layers together, as DAPD does: no layer has a share of its own.

    Args:
        scores (mapping): names to finite scores.
        density (float): fraction of all weights that is kept, in (0, 1].

    Returns:
        dict: boolean masks, with ``round(density * number of weights)`` times ``True`` in all, at least 1.

    Examples:
        >>> masks = global_top_k({"in": torch.tensor([[3.0, 1.0]]), "out": torch.tensor([[2.0, 4.0]])}, 0.5)
        >>> masks["in"].tolist(), masks["out"].tolist()
        ([[True, False]], [[False, True]])
    """
    _check_density(density)
    flat = _finite(torch.cat([score.flatten() for score in scores.values()]))
    kept = _top(flat, max(1, round(density * flat.numel())))
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def layer_top_k(scores: Tensors, densities: Mapping[str, float]) -> dict[str, Tensor]:
    """Keep the weights of the largest scores of each layer by itself.

    Args:
        scores (mapping): names to finite scores.
        densities (mapping): name to the fraction that is kept, in (0, 1]; see :func:`erdos_renyi_densities`.

    Returns:
        dict: boolean masks, with ``round(density * size)`` times ``True`` in each, at least 1.
    """
    for density in densities.values():
        _check_density(density)
    return {
        name: _top(_finite(score).flatten(), max(1, round(densities[name] * score.numel()))).view_as(score)
        for name, score in scores.items()
    }


def erdos_renyi_densities(weights: Tensors, density: float) -> dict[str, float]:
    r"""Share a network's weights out to its layers by the Erdos-Renyi-Kernel rule of RigL.

    The density of a layer is proportional to the sum of its dimensions over their product, so that large layers are sparser;
    a layer that would get more than all is dense, and the others share the rest.

    Args:
        weights (mapping): names to tensors of two or more dimensions; only their shapes count.
        density (float): of the network, in (0, 1].

    Returns:
        dict: name to density in (0, 1]; the mean over all weights is ``density``.

    Examples:
        >>> layers = {"in": torch.empty(256, 17), "hidden": torch.empty(256, 256), "out": torch.empty(1, 256)}
        >>> {name: round(each, 3) for name, each in erdos_renyi_densities(layers, 0.1).items()}
        {'in': 0.54, 'hidden': 0.067, 'out': 1.0}
    """
    _check_density(density)
    raw = {name: sum(weight.shape) / weight.numel() for name, weight in weights.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    budget, dense = density * sum(sizes.values()), set[str]()
    while True:
        sparse = [name for name in weights if name not in dense]
        left = budget - sum(sizes[name] for name in dense)
        factor = left / sum(raw[name] * sizes[name] for name in sparse) if sparse else 0.0
        full = {name for name in sparse if factor * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else factor * raw[name] for name in weights}
        dense |= full


def uniform_densities(weights: Tensors, density: float) -> dict[str, float]:
    """Give each layer the density of the network."""
    _check_density(density)
    return dict.fromkeys(weights, density)


def drop_and_grow(
    mask: Tensor, fraction: float, *, keep: Tensor, grow: Tensor | None, generator: torch.Generator | int | None = None
) -> Tensor:
    """Replace a fraction of a layer's kept weights: those of the smallest ``keep`` go, those of the largest ``grow`` come.

    RigL: ``keep`` is the magnitude of the weights and ``grow`` that of the dense gradient. SET: the same ``keep``, and random
    growth. A weight that was dropped may not come back in the same step.

    Args:
        mask (Tensor): boolean.
        fraction (float): of the kept weights, in [0, 1]; see :func:`cosine_decay`. Rounded to a number of weights, of which no
            more are replaced than there is room for outside the mask.

    Keyword Args:
        keep (Tensor): finite scores of the mask's shape.
        grow (Tensor or None): finite scores of the mask's shape; ``None``: random.
        generator (torch.Generator, int or None): of random growth. ``None``: torch's global generator.

    Returns:
        Tensor: boolean, of the mask's shape and with as many ``True``.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}.")
    kept = int(mask.sum())
    replaced = min(round(fraction * kept), mask.numel() - kept)
    if grow is None:
        drawn = torch.default_generator if generator is None else as_generator(generator)
        grow = torch.rand(mask.shape, generator=drawn, dtype=torch.float64, device=drawn.device).to(mask.device)
    stays = _top(_outside(keep, mask), kept - replaced)
    comes = _top(_outside(grow, ~mask), replaced)
    return (stays | comes).view_as(mask)


def cosine_decay(step: int, end: int, initial: float = 0.5) -> float:
    r"""Return the share of weights that is replaced, :math:`\frac{1}{2} \zeta_0 (1 + \cos(\pi t / T))`; 0 from the end on.

    Args:
        step (int): t, at least 0.
        end (int): T, at least 1.
        initial (float): :math:`\zeta_0`, in [0, 1]. Defaults to 0.5.
    """
    if end < 1 or step < 0:
        raise ValueError(f"step must be at least 0 and end at least 1, got {step} and {end}.")
    return initial / 2 * (1 + math.cos(math.pi * min(step, end) / end))


def mask_overlap(before: Tensors, after: Tensors) -> float:
    """Return the Jaccard index of two networks' masks: the weights in both over those in either, in [0, 1]; 1 if none is."""
    both = sum(int((mask & after[name]).sum()) for name, mask in before.items())
    either = sum(int((mask | after[name]).sum()) for name, mask in before.items())
    return both / either if either else 1.0


def _top(scores: Tensor, count: int) -> Tensor:
    """Return a boolean vector of the ``count`` largest of ``scores (D,)``; of equal ones, the first."""
    order = scores.sort(dim=0, descending=True, stable=True).indices[:count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, True)


def _outside(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the scores flattened, with those outside the mask below all others."""
    if scores.shape != mask.shape:
        raise ValueError(f"scores must have the mask's shape {tuple(mask.shape)}, got {tuple(scores.shape)}.")
    return _finite(scores).masked_fill(~mask, -math.inf).flatten()


def _finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise ValueError("scores must be finite: a weight or a gradient is not; lower the learning rate, or look at the loss.")
    return scores.detach()


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}.")
