"""Layers that are N layers by masks: one weight tensor under N of them (section 3.1 of https://arxiv.org/abs/2310.14009).

Masks are live: each call reads the buffer, so that whatever is written into it (``layer.masks.copy_(...)``,
``load_state_dict``) counts from the next call on. A mask is stored as booleans, and its storage is read as bytes 0 and 1: a CPU
converts bytes to numbers many at a time, but booleans one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omnet_torchrl.layers.indexed import IndexedMLP, InitFn, SharedLinear, linear_shapes
from omnet_torchrl.masks import MaskFn, as_generator, bernoulli_masks, check_masks, check_num_subnets, each_sparsity


def apply_masks(parameter: Tensor, masks: Tensor, index: Tensor) -> Tensor:
    """Return ``parameter (*shape)`` under the masks ``index (R,)`` of ``masks (N, *shape)``: ``(R, *shape)``."""
    chosen = (masks.view(torch.uint8) if masks.dtype == torch.bool else masks).index_select(0, index)
    if len(index) == 1:  # a product of one shape: its gradient needs no sum over rows
        return (parameter * chosen.squeeze(0).to(parameter.dtype)).unsqueeze(0)
    return parameter * chosen.to(parameter.dtype)


def draw_masks(mask_fn: MaskFn, num_subnets: int, shape: Sequence[int], sparsity: float, **source: Any) -> Tensor:
    """Ask ``mask_fn`` for the masks of a layer; an error says what it has to be like."""
    call = "mask_fn(num_subnets, shape, sparsity, generator=..., device=...)"
    expected = f"mask_fn must return boolean masks {(num_subnets, *shape)} for {call}, as bernoulli_masks does "
    expected += "(over units: use UnitMaskedMLP), got"
    try:
        masks = mask_fn(num_subnets, shape, sparsity, **source)
    except TypeError as error:
        if mask_fn is bernoulli_masks:
            raise
        raise TypeError(f"{expected} {getattr(mask_fn, '__name__', repr(mask_fn))}: {error}.") from error
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.shape != (num_subnets, *shape):
        got = f"{tuple(masks.shape)} of {masks.dtype}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"{expected} {got}.")
    return masks


class MaskedLinear(SharedLinear):
    r"""A linear layer under N masks, :math:`y = (W \odot m_k) x + b`.

    The gradient of a weight is exactly zero where the mask of the drawn subnetwork is zero. Masks are a buffer: part of
    ``state_dict``, moved with the module, never optimised, and left alone by :meth:`reset_parameters`.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        masks (Tensor): boolean, ``(N, out_features, in_features)``; ``True`` keeps the weight.
        bias_masks (Tensor or None): boolean, ``(N, out_features)``. ``None``: every subnetwork keeps the whole bias.
        init_fn (callable or None): initialises the weight in place (e.g. ``nn.init.xavier_uniform_``), with a zero bias.
            ``None``: as :class:`torch.nn.Linear`.
        name (str): of the masks, in errors and warnings.

    Shape:
        input ``(*batch, in_features)``, subnet: an index that broadcasts against ``batch`` (see the module's docstring),
        output ``(*batch, out_features)``.

    Raises:
        TypeError, ValueError: masks of a wrong dtype or shape, an index that is not int64.

    Examples:
        >>> layer = MaskedLinear(17, 256, masks=bernoulli_masks(5, (256, 17), 0.5, generator=0))
        >>> layer(torch.zeros(32, 17), torch.tensor(3)).shape
        torch.Size([32, 256])
        >>> layer(torch.zeros(32, 17), torch.arange(5)[:, None]).shape
        torch.Size([5, 32, 256])
    """

    masks: Tensor
    bias_masks: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        masks: Tensor,
        bias_masks: Tensor | None = None,
        init_fn: InitFn | None = None,
        name: str = "masks",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_masks(masks, (out_features, in_features), name)
        if bias_masks is not None:
            check_masks(bias_masks, (out_features,), f"bias_{name}")
            if not bias or bias_masks.shape[0] != masks.shape[0]:
                raise ValueError(
                    f"bias_masks must be None without a bias, and have one row per subnetwork ({masks.shape[0]}) with one, "
                    f"got bias={bias} and {bias_masks.shape[0]} rows."
                )
        super().__init__(in_features, out_features, bias, masks.shape[0], init_fn, device=device, dtype=dtype)
        self.register_buffer("masks", masks.to(self.weight.device, copy=True))
        self.register_buffer("bias_masks", None if bias_masks is None else bias_masks.to(self.weight.device, copy=True))

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the shared weight and the bias under each mask of ``index (R,)``."""
        weight = apply_masks(self.weight, self.masks, index)
        if self.bias is None or self.bias_masks is None:
            return weight, None if self.bias is None else self.bias.unsqueeze(0)
        return weight, apply_masks(self.bias, self.bias_masks, index)

    def extra_repr(self) -> str:
        """Describe the layer as :class:`torch.nn.Linear` does, with N."""
        return f"{super().extra_repr()}, num_subnets={self.num_subnets}"


class MaskedMLP(IndexedMLP):
    r"""A multi-layer perceptron that is N subnetworks: one set of weights under N masks.

    With ``num_subnets=1, sparsity=0`` it is :class:`torchrl.modules.MLP`, number for number.

    Args:
        in_features (int): number of input features; with several inputs, of their concatenation. Not lazy.
        out_features, depth, num_cells, activation_class, norm_class, dropout, device, ...: as in
            :class:`torchrl.modules.MLP`. Normalisation and dropout layers are shared by the subnetworks and see the last
            dimension as features: use layers that do not mix elements (LayerNorm).

    Keyword Args:
        num_subnets (int): number of subnetworks N. Defaults to 5.
        sparsity (float or sequence of float): fraction of the weights masked out, in [0, 1); one number, or one per linear
            layer (``depth + 1``), so that ``[0, 0.5, 0]`` keeps input and output layer dense. Defaults to 0.5.
        mask_bias (bool): mask the biases of the hidden layers too. Defaults to ``False``.
        mask_fn (callable): draws the masks of a layer, ``mask_fn(num_subnets, shape, sparsity, generator=..., device=...)``.
            Defaults to :func:`~omnet_torchrl.bernoulli_masks`.
        generator (torch.Generator, int or None): where the masks come from, see :func:`~omnet_torchrl.masks.as_generator`;
            never the generator of the initial weights.
        init_fn (callable or None): see :class:`MaskedLinear`.

    Shape:
        inputs ``(*batch, features_i)``, concatenated along the last dimension; then the index, last, which broadcasts against
        ``batch`` (see the module's docstring); output ``(*batch, out_features)``.

    Examples:
        >>> net = MaskedMLP(in_features=23, out_features=1, num_cells=[256, 256], num_subnets=5, sparsity=0.5, generator=0)
        >>> observation, action = torch.zeros(32, 17), torch.zeros(32, 6)
        >>> net(observation, action, torch.arange(5)[:, None]).shape
        torch.Size([5, 32, 1])
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
        mask_bias: bool = False,
        mask_fn: MaskFn = bernoulli_masks,
        generator: torch.Generator | int | None = None,
        init_fn: InitFn | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ):
        check_num_subnets(num_subnets)
        generator = as_generator(generator)
        shapes = linear_shapes(in_features, out_features, depth, num_cells)
        sparsities = each_sparsity(sparsity, len(shapes), "linear layer")
        layer_kwargs: list[dict[str, Any]] = []
        source: dict[str, Any] = {"generator": generator, "device": device}
        for i, (shape, s) in enumerate(zip(shapes, sparsities, strict=True)):
            masks = draw_masks(mask_fn, num_subnets, shape, s, **source)
            layer_kwargs.append({"masks": masks, "init_fn": init_fn, "name": f"masks of layer {i}"})
            if mask_bias and i + 1 < len(shapes):
                layer_kwargs[-1]["bias_masks"] = draw_masks(mask_fn, num_subnets, shape[:1], s, **source)
        ours: dict[str, Any] = {"layer_class": MaskedLinear, "layer_kwargs": layer_kwargs, "device": device}
        super().__init__(in_features, out_features, depth, num_cells, **ours, **kwargs)
        # MLP keeps what it was built from; the masks live in the layers, and a second copy would follow no move.
        self.layer_kwargs = self._layer_kwargs_iter = None
        self.num_subnets = num_subnets
