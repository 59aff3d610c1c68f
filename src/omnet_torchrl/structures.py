r"""Which inputs a hidden unit sees: sparse structures of a layer, with equally many kept weights.

After "The Interplay Between Sparsity and Training in Deep Reinforcement Learning" (Davelouis, Martin and Bowling, 2025,
https://arxiv.org/abs/2501.16729), which compares them in DQN on MinAtar, and "Adapting the Function Approximation Architecture
in Online Reinforcement Learning" (Martin and Modayil, 2021, https://arxiv.org/abs/2106.09776), from which the predictive
neighbourhoods are.

A structure is a boolean mask ``(num_units, num_inputs)`` of a linear layer, ``True`` where a weight is kept: each unit keeps
``fan_in`` of them (:func:`l1_structure`: on average, at least one). :func:`set_structure` puts it into a
:class:`~omnet_torchrl.MaskedLinear` and draws the layer's weights for the inputs that are left. Everything else here is a pure
function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omnet_torchrl.layers import MaskedLinear
from omnet_torchrl.masks import as_generator, unit_masks


def random_structure(num_units: int, num_inputs: int, fan_in: int, *, generator: torch.Generator | int | None = None) -> Tensor:
    """Let each unit see a uniform choice of inputs.

    Args:
        num_units (int): of the layer, H.
        num_inputs (int): of the layer, D.
        fan_in (int): inputs that each unit keeps, in [1, D].
        generator (torch.Generator, int or None): where the draw comes from. ``None``: torch's global generator.

    Returns:
        Tensor: boolean, ``(H, D)``, with ``fan_in`` times ``True`` in each row.

    Examples:
        >>> random_structure(128, 400, 36, generator=0).sum(-1).unique()
        tensor([36])
    """
    _check_fan_in(fan_in, num_inputs)
    return unit_masks(num_units, num_inputs, 1 - fan_in / num_inputs, generator=generator, device="cpu")


def spatial_structure(
    num_units: int, grid: Sequence[int], window: int = 3, *, generator: torch.Generator | int | None = None
) -> Tensor:
    """Let each unit see a square window of a grid, in every channel: a local receptive field.

    The windows lie where a convolution with stride 1 and no padding would put them. Each place is taken as often as the others,
    as far as the numbers allow; which unit has which place is random.

    Args:
        num_units (int): of the layer, H.
        grid (sequence of int): ``(rows, columns, channels)`` of the input, which is flattened in this order.
        window (int): rows and columns of the window. Defaults to 3.
        generator (torch.Generator, int or None): see :func:`random_structure`.

    Returns:
        Tensor: boolean, ``(H, rows * columns * channels)``, with ``window ** 2 * channels`` times ``True`` in each row.

    Examples:
        >>> spatial_structure(128, (10, 10, 4), generator=0).sum(-1).unique()
        tensor([36])
    """
    rows, columns, channels = grid
    if not 1 <= window <= min(rows, columns):
        raise ValueError(f"window must be in [1, {min(rows, columns)}], the sides of the grid, got {window}.")
    masks = torch.zeros((rows - window + 1) * (columns - window + 1), rows, columns, channels, dtype=torch.bool)
    for place, mask in enumerate(masks):
        top, left = divmod(place, columns - window + 1)
        mask[top : top + window, left : left + window] = True
    return masks.flatten(1)[_spread(num_units, len(masks), generator)]


def predictive_structure(
    num_units: int, weights: Tensor, fan_in: int, *, generator: torch.Generator | int | None = None
) -> Tensor:
    r"""Let each unit see the inputs that best predict one of them.

    The neighbourhood of input i is the ``fan_in`` inputs j of the largest :math:`|w_{ij}|`; of equal ones, the first. Each
    input that something predicts is the middle of as many units as the others, as far as the numbers allow.

    Args:
        num_units (int): of the layer, H.
        weights (Tensor): ``(D, D)``, of the predictions of each input from all, see :func:`predict_inputs`.
        fan_in (int): inputs that each unit keeps, in [1, D].
        generator (torch.Generator, int or None): of which unit has which neighbourhood; see :func:`random_structure`.

    Returns:
        Tensor: boolean, ``(H, D)``, with ``fan_in`` times ``True`` in each row.

    Raises:
        ValueError: weights of another shape, not finite, or all zero.
    """
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.isfinite().all():
        raise ValueError(f"weights must be a finite (D, D), got shape {tuple(weights.shape)}.")
    _check_fan_in(fan_in, len(weights))
    predicted = weights.cpu()[weights.cpu().any(-1)].abs()
    if not len(predicted):
        raise ValueError("weights must not all be zero: no input has been predicted; use more data or a larger step.")
    nearest = predicted.sort(dim=-1, descending=True, stable=True).indices[:, :fan_in]
    masks = torch.zeros_like(predicted, dtype=torch.bool).scatter(1, nearest, True)
    return masks[_spread(num_units, len(masks), generator)]


def predict_inputs(
    observation: Tensor, ended: Tensor, *, gamma: float = 0.99, trace: float = 0.8, step_size: float = 3e-6
) -> Tensor:
    r"""Learn to predict the discounted sum of each input from all of them, by linear TD(:math:`\lambda`) in one pass.

    Args:
        observation (Tensor): ``(T + 1, D)``, of T successive steps, numbers or booleans; of a random policy's, say.
        ended (Tensor): boolean, ``(T,)``: whether an episode ended between a step's observation and the next, which then
            begins another.

    Keyword Args:
        gamma (float): discount. Defaults to 0.99.
        trace (float): decay of the eligibility traces, :math:`\lambda`. Defaults to 0.8.
        step_size (float): of the stochastic gradient. Defaults to 3e-6. These are Martin and Modayil's.

    Returns:
        Tensor: float32, ``(D, D)``: row i has the weights of the prediction of input i.
    """
    if observation.ndim != 2 or ended.shape != (len(observation) - 1,):
        raise ValueError(
            f"expected observation (T + 1, D) and ended (T,), got {tuple(observation.shape)} and {tuple(ended.shape)}."
        )
    inputs = observation.float()
    weights = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
    eligible = inputs.new_zeros(inputs.shape[1])
    for now, following, last in zip(inputs[:-1], inputs[1:], ended.tolist(), strict=True):
        eligible = gamma * trace * eligible + now
        if not last:  # what a game shows after its end belongs to another episode
            # The two predictions in one product over the inputs that are on: few of MinAtar's are.
            error = following + weights @ (gamma * following - now)
            weights.addr_(error, eligible, alpha=step_size)
        else:
            eligible = torch.zeros_like(eligible)
    return weights


def l1_structure(weight: Tensor, fan_in: float) -> Tensor:
    """Keep each unit's weight of the largest magnitude and, of all others, the largest: ``fan_in`` for each unit on average.

    For a layer that was trained with an L1 penalty (``OMNetDQNLoss(l1=...)``). Of equal magnitudes, the first are kept: the
    number is exact.

    Args:
        weight (Tensor): ``(H, D)``.
        fan_in (float): kept weights per unit, in [1, D].

    Returns:
        Tensor: boolean, ``(H, D)``, with ``round(H * fan_in)`` times ``True``.
    """
    if not weight.isfinite().all():
        raise ValueError("weight must be finite.")
    if not 1 <= fan_in <= weight.shape[-1]:
        raise ValueError(f"fan_in must be in [1, {weight.shape[-1]}], the number of inputs, got {fan_in}.")
    magnitude = weight.detach().abs()
    flat = magnitude.scatter(1, magnitude.argmax(-1, keepdim=True), torch.inf).flatten()
    kept = flat.sort(dim=0, descending=True, stable=True).indices[: round(len(weight) * fan_in)]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, kept, True).view_as(weight)


@torch.no_grad()
def set_structure(layer: MaskedLinear, structure: Tensor, *, generator: torch.Generator | int | None = None) -> None:
    r"""Put a structure into a layer, and draw its weights and biases uniformly in :math:`\pm 1 / \sqrt{n}`.

    n is the number of inputs that a unit keeps: a bound for all inputs would leave a unit of few with too small a sum.

    Args:
        layer (MaskedLinear): every subnetwork of it gets the structure.
        structure (Tensor): boolean, ``(H, D)``, or ``(N, H, D)``, one for each subnetwork.
        generator (torch.Generator, int or None): where the weights come from, see :func:`random_structure`.

    Raises:
        ValueError: another shape, or a unit without inputs.
    """
    if structure.shape not in (layer.masks.shape, layer.masks.shape[1:]) or structure.dtype != torch.bool:
        raise ValueError(
            f"structure must be boolean of shape {tuple(layer.masks.shape[1:])} or {tuple(layer.masks.shape)}, got "
            f"{structure.dtype} of {tuple(structure.shape)}."
        )
    kept = structure.sum(-1)
    if (kept == 0).any():
        raise ValueError(f"every unit must keep an input, got {int((kept == 0).sum())} without: use a higher density.")
    layer.masks.copy_(structure.expand_as(layer.masks))
    # Of several subnetworks, which share the weights, the one that keeps most.
    bound = (kept.amax(0) if structure.ndim == 3 else kept).double().rsqrt()
    generator = torch.default_generator if generator is None else as_generator(generator)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device=generator.device)
            scale = bound.to(generator.device).view(-1, *(1 for _ in parameter.shape[1:]))
            parameter.copy_((2 * uniform - 1) * scale)


def _spread(num_units: int, count: int, generator: torch.Generator | int | None) -> Tensor:
    """Return which of ``count`` things each unit has, each as often as the others, in random order."""
    if num_units < 1:
        raise ValueError(f"num_units must be at least 1, got {num_units}.")
    generator = torch.default_generator if generator is None else as_generator(generator)
    order = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(math.ceil(num_units / count))]
    return torch.cat(order)[:num_units].cpu()


def _check_fan_in(fan_in: int, num_inputs: int) -> None:
    if isinstance(fan_in, bool) or not isinstance(fan_in, int) or not 1 <= fan_in <= num_inputs:
        raise ValueError(f"fan_in must be an int in [1, {num_inputs}], the number of inputs, got {fan_in!r}.")
