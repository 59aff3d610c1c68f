r"""Masks whose units see a chosen part of the input: any part, a neighbourhood on a grid, or what predicts one another.

"The Interplay Between Sparsity and Training in Deep Reinforcement Learning" (2025,
https://arxiv.org/abs/2501.16729) asks which of these a Q-network should have. A structure is a number for each pair of inputs,
how close they are; a unit sees the ``fan_in`` inputs that are closest to one of its own. So all structures keep equally many
weights, and only which ones differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnet_torchrl.masks import as_generator, check_num_subnets


def neighbourhood_masks(
    num_subnets: int,
    num_units: int,
    closeness: Tensor,
    fan_in: int,
    *,
    generator: torch.Generator | int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw masks whose units each see the neighbourhood of a random input: it and the ``fan_in - 1`` closest to it.

    Args:
        num_subnets (int): number of masks N, at least 1.
        num_units (int): units of the layer, at least 1.
        closeness (Tensor): ``(D, D)``, how close input j is to input i, larger is closer. :func:`grid_closeness`: a *spatial*
            structure; ``weights.abs()`` of linear predictions of each input from all: a *predictive* one (after Martin and
            Modayil); :func:`random_closeness`: a *random* one. Of equally close inputs, the first ones are seen.
        fan_in (int): inputs of each unit, in [1, D].
        generator, device: see :func:`~omnet_torchrl.masks.bernoulli_masks`.

    Returns:
        Tensor: boolean, ``(num_subnets, num_units, D)``, with ``fan_in`` times ``True`` in each row.

    Raises:
        ValueError: sizes out of range, or a closeness that is not square.

    Examples:
        >>> closeness = grid_closeness(10, 10, channels=4)
        >>> neighbourhood_masks(5, 128, closeness, fan_in=36, generator=0).shape
        torch.Size([5, 128, 400])
    """
    check_num_subnets(num_subnets)
    if closeness.ndim != 2 or closeness.shape[0] != closeness.shape[1]:
        raise ValueError(f"closeness must be (D, D), for each pair of the D inputs, got {tuple(closeness.shape)}.")
    size = len(closeness)
    if num_units < 1 or not 1 <= fan_in <= size:
        raise ValueError(
            f"num_units must be at least 1 and fan_in in [1, {size}], the number of inputs, got {num_units} and {fan_in}: a "
            "unit without inputs is a constant."
        )
    generator = torch.default_generator if generator is None else as_generator(generator)
    centres = torch.randint(size, (num_subnets, num_units), generator=generator, device=generator.device).to(closeness.device)
    own = torch.eye(size, dtype=torch.bool, device=closeness.device)
    order = closeness.masked_fill(own, float("inf")).argsort(dim=-1, descending=True, stable=True)[:, :fan_in]
    seen = torch.zeros_like(own).scatter(1, order, True)
    return seen[centres].to(device if device is not None else torch.get_default_device())


def grid_closeness(height: int, width: int, channels: int = 1, *, channels_last: bool = False) -> Tensor:
    """How close the inputs of a flattened image are on its grid; all channels of a place are one place.

    With a fan-in of ``9 * channels``, a unit sees a window of 3 x 3 places around its centre, and as many at the border.

    Args:
        height, width, channels (int): of the image.
        channels_last (bool): the image is ``(height, width, channels)``, as MinAtar's, and not ``(channels, height, width)``.

    Returns:
        Tensor: float, ``(D, D)`` of D = height * width * channels: minus the larger of the distances along the two axes, and of
        equal ones first what is nearer in a straight line.
    """
    axes = (torch.arange(height), torch.arange(width))
    sizes: Sequence[int] = (height, width, channels) if channels_last else (channels, height, width)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).double()
    places = (grid.unsqueeze(2) if channels_last else grid.unsqueeze(0)).expand(*sizes, 2).reshape(-1, 2)
    apart = (places.unsqueeze(1) - places.unsqueeze(0)).abs()
    straight = apart.square().sum(-1).sqrt() / (height + width)  # below 1, so that it only orders what is equally far
    return -(apart.amax(-1) + straight)


def random_closeness(size: int, *, generator: torch.Generator | int | None = None) -> Tensor:
    """A closeness ``(size, size)`` that says nothing: each input has random others as its neighbours, the control."""
    generator = torch.default_generator if generator is None else as_generator(generator)
    return torch.rand(size, size, generator=generator, device=generator.device, dtype=torch.float64)
