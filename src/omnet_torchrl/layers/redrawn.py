"""Masks redrawn at each forward pass: "infinity" in section 4.6 of https://arxiv.org/abs/2310.14009.

It is a mask family, not another network: there are 2^31 subnetworks, and the mask of each is computed from its index
(:func:`~omnet_torchrl.masks.hashed_masks`) and never stored. A loss that draws an index thereby redraws the masks, and an
episode that keeps its index keeps its mask. Where an equation says "all N", draw a few:
``OMNetSACLoss(..., num_value_subnets=5, replacement=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omnet_torchrl.layers.indexed import IndexedMLP, InitFn, SharedLinear, linear_shapes
from omnet_torchrl.masks import as_generator, check_sparsity, each_sparsity, hashed_masks

NUM_SUBNETS = 2**31


class RedrawnLinear(SharedLinear):
    """A linear layer under the mask that an index in [0, 2^31) stands for; see the module's docstring.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        sparsity (float): fraction of the weights masked out, in [0, 1).
        key (int): in [0, 2^32); layers of different keys have independent masks.
        init_fn (callable or None): see :class:`~omnet_torchrl.MaskedLinear`.

    Shape:
        As :class:`~omnet_torchrl.MaskedLinear`.
    """

    key: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        key: int,
        init_fn: InitFn | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sparsity(sparsity)
        super().__init__(in_features, out_features, bias, NUM_SUBNETS, init_fn, device=device, dtype=dtype)
        self.sparsity = sparsity
        self.register_buffer("key", torch.tensor(key, device=self.weight.device))

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the shared weight under the mask of each index of ``index (R,)``, and the bias."""
        weight = self.weight * hashed_masks(index, self.weight.shape, self.sparsity, self.key)
        return weight, None if self.bias is None else self.bias.unsqueeze(0)

    def extra_repr(self) -> str:
        """Describe the layer as :class:`torch.nn.Linear` does, with the sparsity."""
        return f"{super().extra_repr()}, sparsity={self.sparsity}"


class RedrawnMLP(IndexedMLP):
    """A multi-layer perceptron that is 2^31 subnetworks, in the place of a :class:`~omnet_torchrl.MaskedMLP`.

    Args:
        in_features, out_features, depth, num_cells, ...: as in :class:`~omnet_torchrl.MaskedMLP`.

    Keyword Args:
        sparsity (float or sequence of float): fraction of the weights masked out, in [0, 1); one number, or one per linear
            layer. Defaults to 0.5.
        generator (torch.Generator, int or None): where the layers' keys come from, see
            :func:`~omnet_torchrl.masks.as_generator`.
        init_fn (callable or None): see :class:`~omnet_torchrl.MaskedLinear`.

    Shape:
        As :class:`~omnet_torchrl.MaskedMLP`; the index is in [0, 2^31). Other numbers are answered too, without an error.

    .. note:: An index per element needs a mask per element: 1,024 elements at width 256 take seconds and 2 GB. An index for
        the whole batch needs one mask, and one per row ``(K, 1)``, as the loss asks, K.

    Examples:
        >>> net = RedrawnMLP(in_features=23, out_features=1, num_cells=[256, 256], generator=0)
        >>> net(torch.zeros(32, 23), torch.randint(net.num_subnets, (5, 1))).shape
        torch.Size([5, 32, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        depth: int | None = None,
        num_cells: Sequence[int] | int | None = None,
        *,
        sparsity: float | Sequence[float] = 0.5,
        generator: torch.Generator | int | None = None,
        init_fn: InitFn | None = None,
        **kwargs: Any,
    ):
        generator = as_generator(generator)
        count = len(linear_shapes(in_features, out_features, depth, num_cells))
        keys = torch.randint(2**32, (count,), generator=generator, device=generator.device).tolist()
        layers = zip(each_sparsity(sparsity, count, "linear layer"), keys, strict=True)
        layer_kwargs = [{"sparsity": s, "key": key, "init_fn": init_fn} for s, key in layers]
        ours: dict[str, Any] = {"layer_class": RedrawnLinear, "layer_kwargs": layer_kwargs}
        super().__init__(in_features, out_features, depth, num_cells, **ours, **kwargs)
        self.num_subnets = NUM_SUBNETS
