r"""Masks over whole units: subnetworks that are smaller dense networks, and cost what those cost.

A limitation of OMNet (https://arxiv.org/abs/2310.14009) is that a masked forward pass still computes the full weight matrix.
Here a subnetwork keeps k of the units of each hidden layer. Its weights, those between kept units, are gathered out of the
shared matrix into a dense ``(k_out, k_in)`` one, and the hidden activations live in the subnetwork's own k coordinates, forward
and backward. Inputs and outputs are never masked, and LayerNorm sees the kept units only: subnetwork k *is* a smaller
multi-layer perceptron. Kept weights are not rescaled, and are initialised for the full width. See
:mod:`~omnet_torchrl.layers.indexed` for how the index broadcasts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnet_torchrl.layers.indexed import IndexedLayerNorm, IndexedMLP, InitFn, SharedLinear, linear_shapes
from omnet_torchrl.masks import as_generator, check_num_subnets, each_sparsity, unit_masks


class UnitLinear(SharedLinear):
    r"""A linear layer between the kept units of N subnetworks, :math:`y = W_{O_k, I_k}\, x + b_{O_k}`.

    The gradient is exactly zero at the weights and biases of other units than the drawn subnetworks'. Which units are kept is
    a buffer: part of ``state_dict``, never optimised, and left alone by :meth:`reset_parameters`.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`, of the full layer.
        num_subnets (int): number of subnetworks N.
        in_units (Tensor or None): int64, ``(N, k_in)``: the input units :math:`I_k` that each subnetwork keeps, ascending.
            ``None``: all.
        out_units (Tensor or None): int64, ``(N, k_out)``: likewise the output units :math:`O_k`.
        init_fn (callable or None): see :class:`~omnet_torchrl.MaskedLinear`; called on the full weight.

    Shape:
        input ``(*batch, k_in)``, subnet: an index that broadcasts against ``batch``, output ``(*batch, k_out)``.

    Raises:
        TypeError, ValueError: units of another dtype or shape, out of range, or not ascending; an index that is not int64.

    Examples:
        >>> units = torch.tensor([[0, 1, 2], [2, 4, 5]])
        >>> layer = UnitLinear(17, 6, num_subnets=2, out_units=units)
        >>> layer(torch.zeros(32, 17), torch.tensor(1)).shape
        torch.Size([32, 3])
    """

    in_units: Tensor | None
    out_units: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_subnets: int,
        in_units: Tensor | None = None,
        out_units: Tensor | None = None,
        init_fn: InitFn | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_num_subnets(num_subnets)
        super().__init__(in_features, out_features, bias, num_subnets, init_fn, device=device, dtype=dtype)
        for name, units, size in (("in_units", in_units, in_features), ("out_units", out_units, out_features)):
            self.register_buffer(name, _checked_units(units, num_subnets, size, name, self.weight.device))

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weights and biases between the kept units of ``index (R,)``."""
        rows, columns = (None if u is None else u.index_select(0, index) for u in (self.out_units, self.in_units))
        weight = self.weight.expand(len(index), -1, -1) if rows is None else _take(self.weight, rows)
        if columns is not None:
            between = rows is not None and torch.compiler.is_compiling()
            weight = _Slice.apply(self.weight, rows, columns) if between else _take_columns(weight, columns)
        if self.bias is None or rows is None:
            return weight, None if self.bias is None else self.bias.unsqueeze(0)
        return weight, _take(self.bias, rows)

    def extra_repr(self) -> str:
        """Describe the layer as :class:`torch.nn.Linear` does, with the kept units and N."""
        kept = (f"{n}={len(u[0])}" for n, u in (("k_in", self.in_units), ("k_out", self.out_units)) if u is not None)
        return ", ".join([super().extra_repr(), *kept, f"num_subnets={self.num_subnets}"])


class UnitLayerNorm(IndexedLayerNorm):
    """A layer normalisation over the kept units of N subnetworks, which share scale and shift of each unit.

    Args:
        normalized_shape (int): units of the full layer.
        units (Tensor or None): int64, ``(N, k)``, see :class:`UnitLinear`; its input is ``(*batch, k)``. ``None``: all.
        num_subnets (int): number of subnetworks N.
        eps, device, dtype: as in :class:`torch.nn.LayerNorm`.
    """

    units: Tensor | None

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        *,
        num_subnets: int,
        units: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_num_subnets(num_subnets)
        self.num_subnets, self.eps = num_subnets, eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty_like(self.weight))
        self.register_buffer("units", _checked_units(units, num_subnets, normalized_shape, "units", self.weight.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scales to one and the shifts to zero; the units stay."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and shifts of the kept units of ``index (R,)``."""
        if self.units is None:
            return self.weight.expand(len(index), -1), self.bias.expand(len(index), -1)
        units = self.units.index_select(0, index)
        return _take(self.weight, units), _take(self.bias, units)


class UnitMaskedMLP(IndexedMLP):
    r"""A multi-layer perceptron that is N smaller ones: each subnetwork keeps k units of each hidden layer.

    With ``num_subnets=1, sparsity=0`` it is :class:`torchrl.modules.MLP`, number for number. :meth:`extract` gives subnetwork k
    as an MLP of k hidden units, whose outputs equal this network's bit for bit.

    Args:
        in_features, out_features, depth, num_cells, activation_class, dropout, device, ...: as in
            :class:`~omnet_torchrl.MaskedMLP`; ``num_cells`` are the units of the full network.
        norm_class (type or None): ``None`` or :class:`torch.nn.LayerNorm` over the last dimension: over the kept units.
            ``normalized_shape`` is that of the full layer.

    Keyword Args:
        num_subnets (int): number of subnetworks N. Defaults to 5.
        sparsity (float or sequence of float): fraction of the units masked out, in [0, 1), see
            :func:`~omnet_torchrl.unit_masks`; one number, or one per hidden layer (``depth``). Defaults to 0.5.
        generator (torch.Generator, int or None): where the units come from, drawn layer after layer; see
            :func:`~omnet_torchrl.masks.as_generator`.
        init_fn (callable or None): see :class:`UnitLinear`.

    Shape:
        As :class:`~omnet_torchrl.MaskedMLP`.

    Examples:
        >>> net = UnitMaskedMLP(in_features=14, out_features=1, num_cells=[256, 256], generator=0)
        >>> net(torch.zeros(32, 14), torch.arange(5)[:, None]).shape
        torch.Size([5, 32, 1])
        >>> net.extract(3).num_cells
        [128, 128]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        depth: int | None = None,
        num_cells: Sequence[int] | int | None = None,
        *,
        num_subnets: int = 5,
        sparsity: float | Sequence[float] = 0.5,
        norm_class: type[nn.Module] | None = None,
        norm_kwargs: dict[str, Any] | list[dict[str, Any]] | None = None,
        generator: torch.Generator | int | None = None,
        init_fn: InitFn | None = None,
        activate_last_layer: bool = False,
        **kwargs: Any,
    ):
        check_num_subnets(num_subnets)
        generator = as_generator(generator)
        hidden = [size for size, _ in linear_shapes(in_features, out_features, depth, num_cells)[:-1]]
        sparsities = each_sparsity(sparsity, len(hidden), "hidden layer")
        kept = [
            unit_masks(num_subnets, n, s, generator=generator, device="cpu").nonzero()[:, 1].view(num_subnets, -1)
            for n, s in zip(hidden, sparsities, strict=True)
        ]
        units: list[Tensor | None] = [None, *kept, None]
        if norm_class is not None:
            if norm_class is not nn.LayerNorm:
                raise ValueError(f"UnitMaskedMLP slices no other normalisation than LayerNorm, got norm_class={norm_class}.")
            norm_class = UnitLayerNorm
            given = norm_kwargs if isinstance(norm_kwargs, list) else [norm_kwargs or {}] * (len(hidden) + activate_last_layer)
            norm_kwargs = [{**kw, "num_subnets": num_subnets, "units": u} for kw, u in zip(given, units[1:], strict=False)]
        layer_kwargs = [
            {"num_subnets": num_subnets, "in_units": before, "out_units": after, "init_fn": init_fn}
            for before, after in itertools.pairwise(units)
        ]
        ours: dict[str, Any] = {"layer_class": UnitLinear, "layer_kwargs": layer_kwargs}
        ours |= {"norm_class": norm_class, "norm_kwargs": norm_kwargs, "activate_last_layer": activate_last_layer}
        super().__init__(in_features, out_features, depth, num_cells, **ours, **kwargs)
        # MLP keeps what it was built from; the units live in the layers.
        self.layer_kwargs = self.norm_kwargs = self._layer_kwargs_iter = self._norm_kwargs_iter = None
        self.num_subnets = num_subnets


def _take(tensor: Tensor, units: Tensor) -> Tensor:
    """Return the entries ``units (R, k)`` of the first dimension, ``(R, k, ...)``."""
    return tensor.index_select(0, units.flatten()).unflatten(0, units.shape)


def _take_columns(weight: Tensor, units: Tensor) -> Tensor:
    """Return the columns ``units (R, k)`` of the weights ``(R, out, in)``, ``(R, out, k)``."""
    if len(units) == 1:
        return weight.squeeze(0).index_select(1, units.squeeze(0)).unsqueeze(0)
    return weight.gather(2, units.unsqueeze(1).expand(-1, weight.shape[1], -1))


class _Slice(torch.autograd.Function):
    """Select rows and then columns of a weight; the backward pass stores the gradient in one operation.

    It is used in compiled code only. Inductor would otherwise add up the gradient by one atomic operation per element, once for
    the columns and once for the rows; run eagerly under torch.func, on the other hand, such a function costs a millisecond.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return _take_columns(_take(weight, rows), columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        weight, rows, columns = inputs
        ctx.save_for_backward(rows, columns)
        ctx.shape = weight.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        several = len(rows) > 1  # of which some may share a weight
        zeros = gradient.new_zeros(ctx.shape)
        return zeros.index_put((rows.unsqueeze(2), columns.unsqueeze(1)), gradient, accumulate=several), None, None


def _checked_units(units: Tensor | None, num_subnets: int, size: int, name: str, device: torch.device) -> Tensor | None:
    """Return a copy of the kept units on ``device``; raise unless they are units of a layer of this size."""
    if units is None:
        return None
    if not isinstance(units, Tensor) or units.dtype != torch.int64:
        got = units.dtype if isinstance(units, Tensor) else type(units).__name__
        raise TypeError(f"{name} must be an int64 tensor of the kept units, got {got}; see Tensor.nonzero for a boolean mask.")
    if units.ndim != 2 or units.shape[0] != num_subnets or not 1 <= units.shape[1] <= size:
        raise ValueError(f"{name} must have shape (num_subnets={num_subnets}, 1 to {size} units), got {tuple(units.shape)}.")
    if units.min() < 0 or units.max() >= size or (units.diff(dim=1) <= 0).any():
        raise ValueError(f"{name} must be in [0, {size}), ascending and none twice in each row, got {units.tolist()}.")
    return units.to(device, copy=True)
