"""DQN's network for observations on a grid, such as MinAtar's: a convolution or none, then a multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, TensorSpec

from omnet_torchrl.deterministic import SubnetQValueActor
from omnet_torchrl.layers import IndexedSequential, MaskedConv2d, MaskedMLP, StructuredLinear
from omnet_torchrl.masks import as_generator, bernoulli_masks, each_sparsity
from omnet_torchrl.specs import check_discrete_spec
from omnet_torchrl.structures import set_structure

KERNEL = 3  # rows and columns of a kernel, MinAtar's own


class GridInput(nn.Module):
    """Takes cells with the channels last, of numbers or booleans, to numbers: flat, or with the channels first.

    Args:
        channels_first (bool): ``(*batch, C, rows, columns)``, for a convolution, instead of ``(*batch, rows * columns * C)``.
    """

    def __init__(self, channels_first: bool = False):
        super().__init__()
        self.channels_first = channels_first
        self.dtype = torch.get_default_dtype()

    def forward(self, cells: Tensor) -> Tensor:
        """Convert cells ``(*batch, rows, columns, C)``."""
        cells = cells.movedim(-1, -3) if self.channels_first else cells.flatten(-3)
        # In the order of its dimensions: a convolution hands on the order that it finds, and what follows makes vectors of it.
        return cells.to(self.dtype, memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        """Say where the channels go."""
        return f"channels_first={self.channels_first}"


def make_grid_qvalue_actor(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    channels: int | None = 16,
    num_cells: Sequence[int] = (128,),
    layer_norm: bool = False,
    network_class: Callable[..., nn.Module] = MaskedMLP,
    structure: Tensor | None = None,
    sparsity: float | Sequence[float] | None = None,
    generator: torch.Generator | int | None = None,
    device: torch.device | str | None = None,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
    subnet_key: NestedKey = "subnet",
    **kwargs: Any,
) -> SubnetQValueActor:
    """DQN's network and greedy policy for a grid of cells; the defaults are those of MinAtar's own agent.

    Args:
        observation_spec (TensorSpec): of the environment, or of the observation: ``(*batch, rows, columns, C)``.
        action_spec (TensorSpec): discrete.

    Keyword Args:
        channels (int or None): of a masked convolution of 3 x 3 with ReLU. ``None``: none.
        num_cells, layer_norm, sparsity, generator, device, ...: as in :func:`~omnet_torchrl.make_actor`; of several
            sparsities, the convolution's is the first.
        network_class: of the perceptron; :class:`~omnet_torchrl.MaskedMLP` with a convolution or a structure.
        structure (Tensor or None): boolean, ``(num_cells[0], rows * columns * C)``, of a first layer without a convolution,
            which is a :class:`~omnet_torchrl.StructuredLinear`; see e.g. :func:`~omnet_torchrl.structures.spatial_structure`.

    Raises:
        TypeError, ValueError, KeyError: actions that are not discrete, observations that are no grid.

    Examples:
        >>> from torchrl.data import Binary, OneHot
        >>> spec = Binary(shape=(10, 10, 4), dtype=torch.bool)
        >>> make_grid_qvalue_actor(spec, OneHot(3), num_subnets=5, sparsity=0.5, generator=0).num_subnets
        5
    """
    spec = check_discrete_spec(action_spec)
    shape = _grid(observation_spec, observation_key)
    norm = {"norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": n} for n in num_cells]} if layer_norm else {}
    options = {"out_features": spec.space.n, "num_cells": num_cells, "activation_class": nn.ReLU, "device": device}
    given = {"sparsity": sparsity, "generator": None if generator is None else as_generator(generator)}
    options |= {**norm, **kwargs, **{name: value for name, value in given.items() if value is not None}}
    layers = _layers(shape, channels, network_class, structure, options)
    return SubnetQValueActor(IndexedSequential(*layers), spec, [observation_key, subnet_key], action_key)


def _layers(
    shape: torch.Size,
    channels: int | None,
    network_class: Callable[..., nn.Module],
    structure: Tensor | None,
    options: dict[str, Any],
) -> list[nn.Module]:
    if (channels is not None or structure is not None) and network_class is not MaskedMLP:
        raise ValueError(f"with a convolution or a structure, network_class must be MaskedMLP, got {network_class}.")
    if channels is not None:
        if structure is not None:
            raise ValueError(f"channels must be None with a structure, which is of the first layer, got {channels}.")
        return _convolution(shape, channels, options)
    perceptron: Any = network_class(in_features=math.prod(shape), **options)
    if structure is not None:
        set_structure(perceptron[0], structure)
        perceptron[0] = StructuredLinear(perceptron[0], structure)
    return [GridInput(), perceptron]


def _grid(spec: TensorSpec, key: NestedKey) -> torch.Size:
    """Rows, columns and channels of an observation."""
    shape = (spec[key] if isinstance(spec, Composite) else spec).shape
    if len(shape) < 3:
        raise ValueError(f"the observation must be a grid (*batch, rows, columns, C), got shape {tuple(shape)}.")
    return shape[-3:]


def _convolution(shape: torch.Size, channels: int, options: dict[str, Any]) -> list[nn.Module]:
    """A masked convolution, and a perceptron of these options on what it gives."""
    rows, columns, depth = shape
    each = each_sparsity(options.get("sparsity", 0.5), len(options["num_cells"]) + 2, "convolution and linear layer")
    generator = as_generator(options.get("generator"))
    drawn: dict[str, Any] = {"generator": generator, "device": options["device"]}
    masks = bernoulli_masks(options.get("num_subnets", 5), (channels, depth, KERNEL, KERNEL), each[0], **drawn)
    features = channels * (rows - KERNEL + 1) * (columns - KERNEL + 1)
    perceptron = MaskedMLP(in_features=features, **{**options, "sparsity": each[1:], "generator": generator})
    convolution = MaskedConv2d(depth, channels, KERNEL, masks=masks, device=options["device"])
    return [GridInput(channels_first=True), convolution, nn.ReLU(), nn.Flatten(-3), perceptron]
