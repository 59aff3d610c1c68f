r"""Layers with an index: one module that is N networks.

``forward(*inputs, subnet)`` takes the index last. ``subnet`` is an int64 tensor that *broadcasts against the batch shape of the
input*, and the output has the broadcast batch shape:

===========================  ===========================  ============================================================
index                        input batch                  answers
===========================  ===========================  ============================================================
``()`` or ``(1,)``           ``(B,)``                     one subnetwork for everything
``(K, 1)``                   ``(B,)`` or ``(K, B)``       one subnetwork per leading row, output batch ``(K, B)``
``(B,)``                     ``(B,)``                     one subnetwork per element
===========================  ===========================  ============================================================

The way taken depends on shapes alone, never on values, so that it traces with ``torch.compile(fullgraph=True)``, runs under
``torch.vmap`` and never waits for the device. The layers here share one weight tensor under N masks (section 3.1 of
https://arxiv.org/abs/2310.14009); those of :mod:`~omnet_torchrl.ensembles` keep N separate ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import MLP

from omnet_torchrl.masks import MaskFn, as_generator, bernoulli_masks, check_masks, check_num_subnets, each_sparsity

InitFn = Callable[[Tensor], Any]
SelectFn = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class IndexedLayer(nn.Module):
    """A layer that is N layers: called as ``layer(input, subnet)``; :meth:`extract` gives one of them."""

    num_subnets: int

    def extract(self, subnet: int) -> nn.Module:
        """Layer ``subnet`` as a plain layer without an index, with parameters of its own."""
        raise NotImplementedError


class IndexedLinear(IndexedLayer):
    """A linear layer that is N linear layers; a subclass says what weights and biases an index selects."""

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights ``(R, out, in)`` and biases ``(R, out)``, ``(1, out)`` or ``None`` of the layers ``index (R,)``."""
        raise NotImplementedError

    def forward(self, input: Tensor, subnet: Tensor) -> Tensor:
        """``(*batch, in_features)`` to ``(*broadcast batch, out_features)``."""
        return indexed_linear(input, subnet, self.num_subnets, self.select)

    def extract(self, subnet: int) -> nn.Linear:
        """Layer ``subnet`` as a plain :class:`torch.nn.Linear`, with parameters of its own."""
        index = check_subnet(subnet, self.num_subnets, next(self.parameters()).device)
        weight, bias = self.select(index)
        plain = nn.utils.skip_init(nn.Linear, weight.shape[2], weight.shape[1], bias is not None, device=weight.device)
        plain.weight = nn.Parameter(weight[0].detach().clone())
        if bias is not None:
            plain.bias = nn.Parameter(bias[0].detach().clone())
        return plain


class IndexedLayerNorm(IndexedLayer):
    """A layer normalisation of the last dimension that is N of them; a subclass says what an index selects."""

    eps: float

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and shifts, each ``(R, features)``, of the layers ``index (R,)``."""
        raise NotImplementedError

    def forward(self, input: Tensor, subnet: Tensor) -> Tensor:
        """``(*batch, features)`` to the broadcast batch's shape."""
        weight, bias = self.select(subnet.reshape(-1))
        if weight.shape[0] == 1:
            output = F.layer_norm(input, input.shape[-1:], weight.squeeze(0), bias.squeeze(0), self.eps)
            return output.expand(*torch.broadcast_shapes(subnet.shape, input.shape[:-1]), -1)
        shape = (*subnet.shape, input.shape[-1])
        return F.layer_norm(input, input.shape[-1:], eps=self.eps) * weight.reshape(shape) + bias.reshape(shape)

    def extract(self, subnet: int) -> nn.LayerNorm:
        """Layer ``subnet`` as a plain :class:`torch.nn.LayerNorm`, with parameters of its own."""
        weight, bias = self.select(check_subnet(subnet, self.num_subnets, next(self.parameters()).device))
        plain = nn.LayerNorm(weight.shape[1], self.eps, device=weight.device, dtype=weight.dtype)
        plain.load_state_dict({"weight": weight[0], "bias": bias[0]})
        return plain


def indexed_linear(input: Tensor, subnet: Tensor, num_subnets: int, select: SelectFn) -> Tensor:
    r"""Apply one linear map out of N to each element: :math:`y_b = W_{k_b} x_b + b_{k_b}`.

    Args:
        input (Tensor): ``(*batch, in_features)``.
        subnet (Tensor): int64 index that broadcasts against ``batch``.
        num_subnets (int): N.
        select (callable): maps indices ``(R,)`` to weights ``(R, out, in)`` and biases ``(R, out)``, ``(1, out)`` or ``None``.

    Returns:
        Tensor: ``(*broadcast batch, out_features)``.

    Raises:
        TypeError: ``subnet`` is not int64.
    """
    if subnet.dtype != torch.int64:
        raise TypeError(f"the subnet index must be an int64 tensor, got {subnet.dtype}.")
    rows = subnet.ndim
    while rows and subnet.shape[rows - 1] == 1:
        rows -= 1
    if rows == 0:
        weight, bias = select(subnet.reshape(1))
        output = F.linear(input, weight.squeeze(0), None if bias is None else bias.squeeze(0))
        return output.expand(*(1,) * (subnet.ndim - input.ndim + 1), *output.shape)

    batch = torch.broadcast_shapes(subnet.shape, input.shape[:-1])
    # Dimensions of the batch that the index tells apart come first, the elements that share an index after them.
    shared = len(batch) - (subnet.ndim - rows)
    index = subnet.reshape(subnet.shape[:rows]).expand(batch[:shared]).reshape(-1)
    num_rows, per_row = index.shape[0], math.prod(batch[shared:])
    input = input.expand(*batch, input.shape[-1]).reshape(num_rows, per_row, input.shape[-1])
    if per_row > 1 or num_rows <= num_subnets:
        output = _linear_rows(input, *select(index))
        return output.reshape(*batch, output.shape[-1])
    # One element per index: rather than a weight matrix for each element, ask all subnetworks and keep one answer.
    every = torch.arange(num_subnets, device=subnet.device)
    output = _linear_rows(input.transpose(0, 1).expand(num_subnets, -1, -1), *select(every))
    return output.gather(0, index.view(1, -1, 1).expand(1, -1, output.shape[-1])).reshape(*batch, output.shape[-1])


def _linear_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(R, I, in)`` times ``(R, out, in)``: ``(R, I, out)``."""
    if bias is None:
        return torch.bmm(input, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), input, weight.transpose(1, 2))


class MaskedLinear(IndexedLinear, nn.Linear):  # type: ignore[misc]
    r"""A linear layer under N fixed masks, :math:`y = (W \odot m_k) x + b`.

    The gradient of a weight is exactly zero where the mask of the drawn subnetwork is zero. Masks are a buffer: part of
    ``state_dict``, moved with the module, never optimised, and left alone by :meth:`reset_parameters`.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        masks (Tensor): boolean, ``(N, out_features, in_features)``; ``True`` keeps the weight.
        bias_masks (Tensor or None): boolean, ``(N, out_features)``. ``None``: every subnetwork keeps the whole bias.
        init_fn (callable or None): initialises the weight in place (e.g. ``nn.init.xavier_uniform_``), with a zero bias.
            ``None``: as :class:`torch.nn.Linear`.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_masks(masks, (out_features, in_features))
        if bias_masks is not None:
            check_masks(bias_masks, (out_features,), "bias_masks")
            if not bias or bias_masks.shape[0] != masks.shape[0]:
                raise ValueError(
                    f"bias_masks must be None without a bias, and have one row per subnetwork ({masks.shape[0]}) with one, "
                    f"got bias={bias} and {bias_masks.shape[0]} rows."
                )
        self.init_fn = init_fn
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.num_subnets = masks.shape[0]
        self.register_buffer("masks", masks.to(self.weight.device))
        self.register_buffer("bias_masks", None if bias_masks is None else bias_masks.to(self.weight.device))

    def reset_parameters(self) -> None:
        """Draw the weights anew; the masks stay."""
        initialise(self.weight, self.bias, self.init_fn)

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The shared weight under each mask of ``index (R,)``, and the bias."""
        weight = self.weight * self.masks.index_select(0, index)
        if self.bias is None or self.bias_masks is None:
            return weight, None if self.bias is None else self.bias.unsqueeze(0)
        return weight, self.bias * self.bias_masks.index_select(0, index)

    def extra_repr(self) -> str:
        """As :class:`torch.nn.Linear`, and N."""
        return f"{super().extra_repr()}, num_subnets={self.num_subnets}"


class IndexedMLP(MLP):
    """A :class:`torchrl.modules.MLP` whose layers may take an index; base of those with masks or separate weights."""

    num_subnets: int

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs, concatenated along the last dimension, then the index."""
        *features, subnet = inputs
        if not features:
            raise TypeError(f"{type(self).__name__} takes its inputs and then the subnet index, got one argument.")
        hidden = torch.cat(features, -1) if len(features) > 1 else features[0]
        for layer in self:
            hidden = layer(hidden, subnet) if isinstance(layer, IndexedLayer) else layer(hidden)
        return hidden.unflatten(-1, tuple(self.out_features)) if self._reshape_out else hidden

    def extract(self, subnet: int) -> MLP:
        """Subnetwork ``subnet`` as a plain :class:`torchrl.modules.MLP` without an index, with parameters of its own.

        Its outputs equal this network's for the index ``subnet``. It follows no later update: extract again.
        """
        check_subnet(subnet, self.num_subnets)
        plain = MLP(self.in_features, self.out_features, depth=0, device="meta")
        del plain[:]
        plain.extend(layer.extract(subnet) if isinstance(layer, IndexedLayer) else copy.deepcopy(layer) for layer in self)
        *plain.num_cells, _ = (layer.out_features for layer in plain if isinstance(layer, nn.Linear))
        plain.depth = self.depth
        return plain.train(self.training)


class MaskedMLP(IndexedMLP):
    r"""A multi-layer perceptron that is N subnetworks: one set of weights under N fixed masks.

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
            Defaults to :func:`~omnet_torchrl.masks.bernoulli_masks`.
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
        for i, (shape, s) in enumerate(zip(shapes, sparsities, strict=True)):
            masks = mask_fn(num_subnets, shape, s, generator=generator, device=device)
            layer_kwargs.append({"masks": masks, "init_fn": init_fn})
            if mask_bias and i + 1 < len(shapes):
                layer_kwargs[-1]["bias_masks"] = mask_fn(num_subnets, shape[:1], s, generator=generator, device=device)
        super().__init__(
            in_features,
            out_features,
            depth,
            num_cells,
            layer_class=MaskedLinear,
            layer_kwargs=layer_kwargs,
            device=device,
            **kwargs,
        )
        # MLP keeps what it was built from; the masks live in the layers, and a second copy would follow no move.
        self.layer_kwargs = self._layer_kwargs_iter = None
        self.num_subnets = num_subnets


def initialise(weight: Tensor, bias: Tensor | None, init_fn: InitFn | None) -> None:
    """Fill a weight ``(out, in)`` and its bias: with ``init_fn`` and zeros, or as :class:`torch.nn.Linear` does."""
    with torch.no_grad():
        if init_fn is not None:
            init_fn(weight)
            if bias is not None:
                bias.zero_()
            return
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0
            bias.uniform_(-bound, bound)


def check_subnet(subnet: int, num_subnets: int, device: torch.device | None = None) -> Tensor:
    """Return ``subnet`` as an index of shape ``(1,)``; raise if it is not an int in ``[0, num_subnets)``."""
    if isinstance(subnet, bool) or not isinstance(subnet, int):
        raise TypeError(f"subnet must be an int, got {subnet!r}.")
    if not 0 <= subnet < num_subnets:
        raise ValueError(f"subnet must be in [0, num_subnets={num_subnets}), got {subnet}.")
    return torch.tensor([subnet], device=device)


def linear_shapes(
    in_features: int, out_features: int | Sequence[int], depth: int | None, num_cells: Sequence[int] | int | None
) -> list[tuple[int, int]]:
    """Shapes ``(out, in)`` of the linear layers that :class:`torchrl.modules.MLP` makes of these arguments."""
    if in_features is None:
        raise ValueError("in_features must be given: masks and separate weights have no lazy form.")
    num_cells = 32 if num_cells is None else num_cells
    cells = list(num_cells) if isinstance(num_cells, Sequence) else [num_cells] * (depth or 0)
    sizes = [in_features, *cells, out_features if isinstance(out_features, int) else math.prod(out_features)]
    return list(zip(sizes[1:], sizes[:-1], strict=True))
