r"""The contract of the index: what it means to call one module that is N networks.

``forward(*inputs, subnet)`` takes the index last. ``subnet`` is an int64 tensor that *broadcasts against the batch shape of the
input*, and the output has the broadcast batch shape. A Python int means the same as a tensor of shape ``()``.

===========================  ===========================  ============================================================
index                        input batch                  answers
===========================  ===========================  ============================================================
``()`` or ``(1,)``           ``(B,)``                     one subnetwork for everything
``(K, 1)``                   ``(B,)`` or ``(K, B)``       one subnetwork per leading row, output batch ``(K, B)``
``(B,)``                     ``(B,)``                     one subnetwork per element
===========================  ===========================  ============================================================

The way taken depends on shapes alone, never on values, so that it traces with ``torch.compile(fullgraph=True)``, runs under
``torch.vmap`` and never waits for the device.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import MLP

from omnet_torchrl.arguments import OURS, check_keywords
from omnet_torchrl.layers.sparse import sparsified

InitFn = Callable[[Tensor], Any]
SelectFn = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class IndexedLayer(nn.Module):
    """A layer that is N layers: called as ``layer(input, subnet)``; :meth:`extract` gives one of them."""

    num_subnets: int

    def extract(self, subnet: int) -> nn.Module:
        """Return layer ``subnet`` as a plain layer without an index, with parameters of its own."""
        raise NotImplementedError


class IndexedLinear(IndexedLayer):
    """A linear layer that is N linear layers; a subclass says what weights and biases an index selects."""

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weights ``(R, out, in)`` and biases ``(R, out)``, ``(1, out)`` or ``None`` of the layers ``index (R,)``."""
        raise NotImplementedError

    def forward(self, input: Tensor, subnet: Tensor | int) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*broadcast batch, out_features)``."""
        try:
            return indexed_linear(input, subnet, self.num_subnets, self.select)
        except RuntimeError as error:
            weight, _ = self.select(torch.zeros(1, dtype=torch.int64, device=input.device))
            if input.shape[-1:] == weight.shape[-1:] and input.dtype == weight.dtype:
                raise
            raise ValueError(
                f"{type(self).__name__} must have inputs (*batch, {weight.shape[-1]}) of {weight.dtype}, got "
                f"{tuple(input.shape)} of {input.dtype}: build the network for this size; for float64, append "
                "torchrl.envs.DoubleToFloat() to the environment."
            ) from error

    def extract(self, subnet: int) -> nn.Linear:
        """Return layer ``subnet`` as a plain :class:`torch.nn.Linear`, with parameters of its own."""
        index = check_subnet(subnet, self.num_subnets, next(self.parameters()).device)
        weight, bias = self.select(index)
        plain = nn.utils.skip_init(nn.Linear, weight.shape[2], weight.shape[1], bias is not None, device=weight.device)
        plain.weight = nn.Parameter(weight[0].detach().clone())
        if bias is not None:
            plain.bias = nn.Parameter(bias[0].detach().clone())
        return plain


class SharedLinear(IndexedLinear, nn.Linear):  # type: ignore[misc]
    """A linear layer that is N linear layers with one weight tensor; a subclass says what an index selects of it."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, num_subnets: int, init_fn: InitFn | None, **kwargs: Any
    ):
        self.init_fn = init_fn
        super().__init__(in_features, out_features, bias, **kwargs)
        self.num_subnets = num_subnets

    def reset_parameters(self) -> None:
        """Draw the weight and the bias anew; what the index selects stays as it is."""
        initialise(self.weight, self.bias, self.init_fn)


class IndexedLayerNorm(IndexedLayer):
    """A layer normalisation of the last dimension that is N of them; a subclass says what an index selects."""

    eps: float

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and shifts, each ``(R, features)``, of the layers ``index (R,)``."""
        raise NotImplementedError

    def forward(self, input: Tensor, subnet: Tensor | int) -> Tensor:
        """Map ``(*batch, features)`` to ``(*broadcast batch, features)``."""
        subnet = as_index(subnet, self.num_subnets, input.device)
        weight, bias = self.select(subnet.reshape(-1))
        if weight.shape[0] == 1:
            output = F.layer_norm(input, input.shape[-1:], weight.squeeze(0), bias.squeeze(0), self.eps)
            return _with_dims(output, subnet.ndim + 1)
        shape = (*subnet.shape, input.shape[-1])
        return F.layer_norm(input, input.shape[-1:], eps=self.eps) * weight.reshape(shape) + bias.reshape(shape)

    def extract(self, subnet: int) -> nn.LayerNorm:
        """Return layer ``subnet`` as a plain :class:`torch.nn.LayerNorm`, with parameters of its own."""
        weight, bias = self.select(check_subnet(subnet, self.num_subnets, next(self.parameters()).device))
        plain = nn.LayerNorm(weight.shape[1], self.eps, device=weight.device, dtype=weight.dtype)
        plain.load_state_dict({"weight": weight[0], "bias": bias[0]})
        return plain


def as_index(subnet: Tensor | int, num_subnets: int, device: torch.device | None = None) -> Tensor:
    """Return an index as an int64 tensor: a tensor as it is, a Python int as a tensor of shape ``()`` on ``device``.

    Raises:
        TypeError: it is neither an int64 tensor nor an int.
        ValueError: it is an int outside ``[0, num_subnets)``. The values of a tensor are not read.
    """
    if isinstance(subnet, Tensor):
        if subnet.dtype != torch.int64:
            raise TypeError(f"the subnet index must be an int64 tensor or an int, got {subnet.dtype}.")
        return subnet
    return check_subnet(subnet, num_subnets, device, "an int64 tensor or an int").squeeze(0)


def indexed_linear(input: Tensor, subnet: Tensor | int, num_subnets: int, select: SelectFn) -> Tensor:
    r"""Apply one linear map out of N to each element: :math:`y_b = W_{k_b} x_b + b_{k_b}`.

    Args:
        input (Tensor): ``(*batch, in_features)``.
        subnet (Tensor or int): int64 index that broadcasts against ``batch``.
        num_subnets (int): N.
        select (callable): maps indices ``(R,)`` to weights ``(R, out, in)`` and biases ``(R, out)``, ``(1, out)`` or ``None``.

    Returns:
        Tensor: ``(*broadcast batch, out_features)``.

    Raises:
        TypeError, ValueError: see :func:`as_index`.
    """
    subnet = as_index(subnet, num_subnets, input.device)
    rows = subnet.ndim
    while rows and subnet.shape[rows - 1] == 1:
        rows -= 1
    if rows == 0:
        weight, bias = select(subnet.reshape(1))
        output = F.linear(input, weight.squeeze(0), None if bias is None else bias.squeeze(0))
        return _with_dims(output, subnet.ndim + 1)

    batch = _broadcast(subnet.shape, input.shape[:-1])
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


def _broadcast(index: Sequence[int], batch: Sequence[int]) -> tuple[int, ...]:
    """As :func:`torch.broadcast_shapes`, whose checks take longer than a small product; what doesn't fit fails to expand."""
    pairs = itertools.zip_longest(reversed(index), reversed(batch), fillvalue=1)
    return tuple(a if b == 1 else b for a, b in pairs)[::-1]


def _with_dims(output: Tensor, ndim: int) -> Tensor:
    """Add leading dimensions of size 1 to ``output``, so that it has at least ``ndim`` dimensions."""
    return output if output.ndim >= ndim else output.expand(*(1,) * (ndim - output.ndim), *output.shape)


def _linear_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply ``(R, I, in)`` by ``(R, out, in)``, row by row, to ``(R, I, out)``."""
    if bias is None:
        return torch.bmm(input, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), input, weight.transpose(1, 2))


class IndexedMLP(MLP):
    """A :class:`torchrl.modules.MLP` whose layers may take an index; the base of the networks that are N networks."""

    num_subnets: int

    def __init__(self, *args: Any, **kwargs: Any):
        check_keywords(type(self), kwargs.keys() - OURS)
        super().__init__(*args, **kwargs)

    def forward(self, *inputs: Any) -> Tensor:
        """Call with the inputs, which are concatenated along the last dimension, and then the index."""
        *features, subnet = inputs
        if not features:
            name = type(self).__name__
            raise TypeError(
                f"{name} takes its inputs and then the subnet index, got one argument. nn.Sequential hands on one only: give "
                f"SubnetActor the {name} alone, without NormalParamExtractor, since it splits the output itself."
            )
        subnet = as_index(subnet, self.num_subnets, features[0].device)
        hidden = torch.cat(features, -1) if len(features) > 1 else features[0]
        for layer in self:
            hidden = layer(hidden, subnet) if isinstance(layer, IndexedLayer) else layer(hidden)
        return hidden.unflatten(-1, tuple(self.out_features)) if self._reshape_out else hidden

    def extract(self, subnet: int, *, sparse: bool = False) -> MLP:
        """Return subnetwork ``subnet`` as a plain :class:`torchrl.modules.MLP` without an index, with parameters of its own.

        Its outputs equal this network's for the index ``subnet``. Later updates do not reach it: extract it again. With
        ``sparse=True`` its linear layers are :class:`~omnet_torchrl.SparseLinear`, which keep the weights of the
        mask alone; see there where that is faster.
        """
        check_subnet(subnet, self.num_subnets)
        plain = MLP(self.in_features, self.out_features, depth=0, device="meta")
        del plain[:]
        plain.extend(layer.extract(subnet) if isinstance(layer, IndexedLayer) else copy.deepcopy(layer) for layer in self)
        *plain.num_cells, _ = (layer.out_features for layer in plain if isinstance(layer, nn.Linear))
        plain.depth = self.depth
        return (sparsified(plain) if sparse else plain).train(self.training)


def initialise(weight: Tensor, bias: Tensor | None, init_fn: InitFn | None) -> None:
    """Fill a weight ``(out, in)`` and its bias: with ``init_fn`` and zeros, or as :class:`torch.nn.Linear` does."""
    with torch.no_grad():
        if init_fn is not None:
            if not callable(init_fn):
                expected = "a function that fills a weight in place, such as torch.nn.init.xavier_uniform_"
                raise TypeError(f"init_fn must be {expected}, got {init_fn!r}.")
            init_fn(weight)
            if bias is not None:
                bias.zero_()
            return
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] else 0
            bias.uniform_(-bound, bound)


def check_subnet(subnet: int, num_subnets: int, device: torch.device | None = None, expected: str = "an int") -> Tensor:
    """Return ``subnet`` as an index of shape ``(1,)``; raise if it is not an int in ``[0, num_subnets)``."""
    if isinstance(subnet, bool) or not isinstance(subnet, int):
        raise TypeError(f"subnet must be {expected}, got {subnet!r}.")
    if not 0 <= subnet < num_subnets:
        raise ValueError(f"subnet must be in [0, num_subnets={num_subnets}), got {subnet}.")
    return torch.tensor([subnet], device=device)


def linear_shapes(
    in_features: int, out_features: int | Sequence[int], depth: int | None, num_cells: Sequence[int] | int | None
) -> list[tuple[int, int]]:
    """Return the shapes ``(out, in)`` of the linear layers that :class:`torchrl.modules.MLP` makes of these arguments."""
    if in_features is None:
        raise ValueError("in_features must be given: masks and separate weights have no lazy form.")
    num_cells = 32 if num_cells is None else num_cells
    cells = list(num_cells) if isinstance(num_cells, Sequence) else [num_cells] * (depth or 0)
    sizes = [in_features, *cells, out_features if isinstance(out_features, int) else math.prod(out_features)]
    return list(zip(sizes[1:], sizes[:-1], strict=True))
