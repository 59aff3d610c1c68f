"""Separate networks behind an index: the classical ensembles, to compare with.

The same index and the same loss as for :class:`~omnet_torchrl.MaskedMLP`, but every subnetwork has weights of its own: the two
critics of SAC and DroQ, the ten of REDQ ("Randomized Ensembled Double Q-Learning: Learning Fast Without a Model", Chen et al.,
2021, https://arxiv.org/abs/2101.05982). See :mod:`~omnet_torchrl.layers.indexed` for how the index broadcasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnet_torchrl.layers.indexed import IndexedLayerNorm, IndexedLinear, IndexedMLP, InitFn, initialise, linear_shapes
from omnet_torchrl.masks import as_generator, bernoulli_masks, check_masks, check_num_subnets, each_sparsity


class EnsembleLinear(IndexedLinear):
    """N separate linear layers behind an index.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`, for each of the N layers.
        num_subnets (int): number of layers N.
        init_fn (callable or None): see :class:`~omnet_torchrl.MaskedLinear`; called once per layer.

        masks (Tensor or None): boolean, ``(N, out_features, in_features)``, a mask for each of the layers, live as those of
            :class:`~omnet_torchrl.MaskedLinear`. ``None`` (default): every weight is kept.
        name (str): of the masks, in errors and warnings.

    Shape:
        As :class:`~omnet_torchrl.MaskedLinear`. ``weight`` is ``(N, out_features, in_features)``, ``bias`` ``(N,
        out_features)``.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    masks: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_subnets: int,
        init_fn: InitFn | None = None,
        masks: Tensor | None = None,
        name: str = "masks",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_num_subnets(num_subnets)
        self.in_features, self.out_features, self.num_subnets, self.init_fn = in_features, out_features, num_subnets, init_fn
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_subnets, out_features, in_features, **kwargs))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_subnets, out_features, **kwargs)) if bias else None)
        if masks is not None:
            check_masks(masks, (out_features, in_features), name)
            if len(masks) not in (1, num_subnets):
                raise ValueError(f"{name} must be one for all layers or num_subnets={num_subnets}, got {len(masks)}.")
            masks = masks.expand(num_subnets, -1, -1).to(self.weight.device, copy=True)
        self.register_buffer("masks", masks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of each layer anew, one layer after the other."""
        for k in range(len(self.weight)):
            initialise(self.weight[k], None if self.bias is None else self.bias[k], self.init_fn)

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weights and biases of the layers ``index (R,)``."""
        weight = self.weight.index_select(0, index)
        if self.masks is not None:
            weight = weight * self.masks.view(torch.uint8).index_select(0, index).to(weight.dtype)
        return weight, None if self.bias is None else self.bias.index_select(0, index)

    def extra_repr(self) -> str:
        """Describe the layer as :class:`torch.nn.Linear` does, with N."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_subnets={self.num_subnets}"
        )


class EnsembleLayerNorm(IndexedLayerNorm):
    """N separate layer normalisations of the last dimension behind an index.

    Args:
        normalized_shape (int): size of the last dimension.
        num_subnets (int): number of layers N.
        eps, device, dtype: as in :class:`torch.nn.LayerNorm`.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        *,
        num_subnets: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_subnets, self.eps = num_subnets, eps
        self.weight = nn.Parameter(torch.empty(num_subnets, normalized_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty_like(self.weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scales to one and the shifts to zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and shifts of the layers ``index (R,)``."""
        return self.weight.index_select(0, index), self.bias.index_select(0, index)


class EnsembleMLP(IndexedMLP):
    """N separate multi-layer perceptrons behind one index, each initialised on its own.

    The classical ensemble (two critics of SAC, ten of REDQ) in the place of a :class:`~omnet_torchrl.MaskedMLP`: same index,
    same loss.

    Args:
        in_features, out_features, depth, num_cells, activation_class, dropout, device, ...: as in
            :class:`torchrl.modules.MLP`, for each of the N networks. Dropout draws for each network on its own.
        norm_class (type or None): ``None`` or :class:`torch.nn.LayerNorm` over the last dimension.

    Keyword Args:
        num_subnets (int): number of networks N. Defaults to 2.
        init_fn (callable or None): see :class:`~omnet_torchrl.MaskedLinear`.
        sparsity (float, sequence of float or None): of a Bernoulli mask over the weights of each network, in [0, 1), as in
            :class:`~omnet_torchrl.MaskedMLP`; 0 gives masks that keep everything, to be changed. ``None`` (default): no masks.
        generator (torch.Generator, int or None): of the masks, as in :class:`~omnet_torchrl.MaskedMLP`.

    Shape:
        As :class:`~omnet_torchrl.MaskedMLP`.

    Examples:
        >>> net = EnsembleMLP(in_features=14, out_features=1, num_cells=[256, 256], num_subnets=10)
        >>> net(torch.zeros(32, 14), torch.arange(10)[:, None]).shape
        torch.Size([10, 32, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        depth: int | None = None,
        num_cells: Sequence[int] | int | None = None,
        *,
        num_subnets: int = 2,
        norm_class: type[nn.Module] | None = None,
        norm_kwargs: dict[str, Any] | list[dict[str, Any]] | None = None,
        init_fn: InitFn | None = None,
        sparsity: float | Sequence[float] | None = None,
        generator: torch.Generator | int | None = None,
        **kwargs: Any,
    ):
        check_num_subnets(num_subnets)
        shapes = linear_shapes(in_features, out_features, depth, num_cells)
        if norm_class is not None:
            if norm_class is not nn.LayerNorm:
                raise ValueError(f"EnsembleMLP separates no other normalisation than LayerNorm, got norm_class={norm_class}.")
            norm_class = EnsembleLayerNorm
            if isinstance(norm_kwargs, list):
                norm_kwargs = [{**kw, "num_subnets": num_subnets} for kw in norm_kwargs]
            else:
                norm_kwargs = {**(norm_kwargs or {}), "num_subnets": num_subnets}
        layer_kwargs: list[dict[str, Any]] = [{"num_subnets": num_subnets, "init_fn": init_fn} for _ in shapes]
        if sparsity is not None:
            source = as_generator(generator)
            each = each_sparsity(sparsity, len(shapes), "linear layer")
            for i, (options, shape, s) in enumerate(zip(layer_kwargs, shapes, each, strict=True)):
                options["name"] = f"masks of layer {i}"
                options["masks"] = bernoulli_masks(num_subnets, shape, s, generator=source, device=kwargs.get("device"))
        ours: dict[str, Any] = {"layer_class": EnsembleLinear, "layer_kwargs": layer_kwargs}
        ours |= {"norm_class": norm_class, "norm_kwargs": norm_kwargs}
        super().__init__(in_features, out_features, depth, num_cells, **ours, **kwargs)
        apart = (IndexedLinear, IndexedLayerNorm)
        shared = [type(x).__name__ for x in self if not isinstance(x, apart) and next(x.parameters(), None) is not None]
        if shared:
            raise ValueError(f"EnsembleMLP separates linear and LayerNorm layers only, its networks would share {shared}.")
        # MLP keeps what it was built from; the masks live in the layers, and a second copy would follow no move.
        self.layer_kwargs = self._layer_kwargs_iter = None
        self.num_subnets = num_subnets
