"""The operations of a compiled update, in the form in which a CPU computes them fast; and matrix products of lower precision.

For matrix products of float32, PyTorch calls MKL, which has kernels for AVX-512 on Intel's own CPUs only: on an AMD Zen 5 a
product of three times 256 takes it twice as long as oneDNN, which PyTorch has too. Which one is called depends on the kind of
CPU, not on a measurement: a run that is resumed repeats its numbers.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omnet_torchrl.updates.adam import materialised
from omnet_torchrl.updates.private import has_onednn_mm, lower_to_onednn, onednn_mm

WORTH = 2**21  # multiply-adds of a product: below, oneDNN's longer call outweighs its kernels
MAX_PRODUCTS = 32  # of a batch, which oneDNN makes one by one
SMALL = 4096  # of the size of a layer's bias, not of its weights
FEW_ROWS, MANY_INPUTS = range(16, 65), 256  # of a product that MKL makes faster with the weight, as it lies, on the left
MAX_PATCH = 128  # numbers that a unit of a convolution sees, for which a matrix of patches is worth its memory
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class LowPrecision(TorchDispatchMode):
    """Within, matrix products take inputs of a lower precision, where they are large; everything else stays as it is.

    Inputs are rounded to ``dtype``, the product is converted back at once: weights, moments, targets and losses keep their
    type. What several products read is rounded once.

    Args:
        dtype (torch.dtype): e.g. ``torch.bfloat16``.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._rounded: dict[Any, tuple[Tensor, Tensor]] = {}  # with what was rounded, which must live as long as its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Replace the products of float32 matrices."""
        kwargs = kwargs or {}
        place = PRODUCTS.get(func)
        if place is None or args[place].dtype != torch.float32:
            return func(*args, **kwargs)
        a, b = args[place : place + 2]
        # Small products gain nothing; with a size of 1 they are none, and the last layer's values keep their precision.
        if a.shape[-2] * a.shape[-1] * b.shape[-1] < WORTH:
            return func(*args, **kwargs)
        multiply = torch.ops.aten.mm.default if a.ndim == 2 else torch.ops.aten.bmm.default
        product = multiply(self._round(a), self._round(b)).to(a.dtype)
        if not place:
            return product
        return _biased(product, args[0], **kwargs)

    def _round(self, matrix: Tensor) -> Tensor:
        """The matrix in the lower precision, in its own order in memory: a transposed one is read, not written, transposed."""
        if matrix.stride(-1) != 1:
            return self._round(matrix.mT).mT if matrix.stride(-2) == 1 else matrix.to(self.dtype)
        place = matrix.untyped_storage()._cdata, matrix.storage_offset(), matrix.shape, matrix.stride()
        key = *place, matrix._version
        if key not in self._rounded:
            self._rounded[key] = matrix, matrix.to(self.dtype)
        return self._rounded[key][1]


# The products of matrices, and which of their arguments is the first matrix.
PRODUCTS: dict[Any, int] = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}


def _layer_norm(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation of the last dimensions, and the means and inverse deviations that its gradient needs."""
    dims = list(range(-len(shape), 0))
    mean = materialised(input.mean(dims, keepdim=True))
    centred = input - mean
    scale = materialised((centred.square().mean(dims, keepdim=True) + eps).rsqrt())
    output = centred * scale
    output = output if weight is None else output * weight
    return output if bias is None else output + bias, mean, scale


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The bias apart, for Inductor to fuse with what follows; the dimension between keeps it from undoing that."""
    product = torch.mm(b.t(), a.t()).t() if _turned(a, b) else torch.mm(a, b)
    return _biased(product.unsqueeze(0), bias, beta, alpha).squeeze(0)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """See :func:`_addmm`."""
    product = torch.bmm(b.mT, a.mT).mT if _turned(a, b) else torch.bmm(a, b)
    return _biased(product, bias, beta, alpha)


def _turned(a: Tensor, b: Tensor) -> bool:
    """Whether MKL computes ``a @ b`` faster as ``(b' @ a')'``: for few rows, and a weight ``b'`` that is contiguous."""
    rows, inputs = a.shape[-2:]
    few = rows in FEW_ROWS and inputs >= MANY_INPUTS and b.stride(-2) == 1 and b.device.type == "cpu"
    return few and not _preferred(a, rows * inputs * b.shape[-1])


def _biased(product: Tensor, bias: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return (product if alpha == 1 else alpha * product) + (bias if beta == 1 else beta * bias)


def _mm(a: Tensor, b: Tensor) -> Any:
    """A product with a size of one is none: Inductor fuses it with what is around it."""
    if b.shape[1] == 1:
        return (a * b.squeeze(1)).sum(1, keepdim=True)
    if a.shape[1] == 1:
        return a * b
    if a.shape[0] == 1:
        return (a.t() * b).sum(0, keepdim=True)
    return mm(a, b)


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], *how: Any
) -> Any:
    """A convolution as a product of matrices, where a unit sees few numbers: faster there than oneDNN's own."""
    if not _has_small_patches(input, weight, padding, *how):
        return NotImplemented
    patches, kernels = _patches(input, weight, stride), weight.permute(2, 3, 1, 0).flatten(0, 2)
    output = (patches.flatten(0, 2) @ kernels).unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)
    return (output if bias is None else output + bias.view(-1, 1, 1)).contiguous()


def _convolution_backward(
    gradient: Tensor, input: Tensor, weight: Tensor, sizes: Any, stride: Sequence[int], padding: Sequence[int], *how: Any
) -> Any:
    """The gradients of weight and bias, see :func:`_convolution`; where the input's is asked for, oneDNN makes all three."""
    *others, (of_input, of_weight, _) = how
    if of_input or not of_weight or not _has_small_patches(input, weight, padding, *others):
        return NotImplemented
    patches, rows = _patches(input, weight, stride), gradient.permute(0, 2, 3, 1).flatten(0, 2)
    out, channels, *kernel = weight.shape
    change = (rows.t() @ patches.flatten(0, 2)).view(out, *kernel, channels).permute(0, 3, 1, 2)
    return None, change.contiguous(), rows.sum(0)


def _has_small_patches(
    input: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int], transposed: bool, _: Any, groups: int
) -> bool:
    plain = weight.ndim == 4 and groups == 1 and not transposed and not any(padding) and set(dilation) == {1}
    return plain and input.device.type == "cpu" and weight[0].numel() <= MAX_PATCH


def _patches(input: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """What each unit sees of ``(B, C, H, W)``: ``(B, H', W', kernel * C)``, the channels last, as they mostly lie."""
    seen = input.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[-1])
    return materialised(seen.permute(0, 2, 3, 4, 5, 1).flatten(3))


def _index_select(tensor: Tensor, dim: int, index: Tensor) -> Any:
    """A few numbers are gathered once, rather than anew for each row that they serve."""
    if tensor.numel() // tensor.shape[dim] * index.numel() > SMALL:
        return NotImplemented
    where: list[Any] = [slice(None)] * tensor.ndim
    where[dim] = index
    return materialised(tensor[tuple(where)])


def mm(a: Tensor, b: Tensor) -> Any:
    """``a @ b`` by oneDNN, or ``NotImplemented`` where that is not faster."""
    if not _preferred(a, a.shape[0] * a.shape[1] * b.shape[1]):
        return NotImplemented
    return _operation()(a, b)


def bmm(a: Tensor, b: Tensor) -> Any:
    """See :func:`mm`, of each product of a batch."""
    count, rows, inner = a.shape
    if count > MAX_PRODUCTS or not _preferred(a, rows * inner * b.shape[2]):
        return NotImplemented
    if count == 1:
        return _operation()(a.squeeze(0), b.squeeze(0)).unsqueeze(0)
    return torch.stack([_operation()(*pair) for pair in zip(a.unbind(0), b.unbind(0), strict=True)])


def _preferred(tensor: Tensor, size: int) -> bool:
    """Whether oneDNN makes a product of so many multiply-adds."""
    if size < WORTH or tensor.dtype not in (torch.float32, torch.bfloat16) or tensor.device.type != "cpu":
        return False
    if not (torch.backends.mkldnn.enabled and has_onednn_mm()):
        return False
    return tensor.dtype == torch.bfloat16 or onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Whether this is a CPU of AMD with AVX-512; ``torch.backends.mkldnn.enabled = False`` leaves all products to MKL."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _cpu()


def _cpu() -> str:
    """What the system says of the CPU, its vendor among it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()


@cache
def _operation() -> Any:
    """The operation ``omnet_torchrl::mm``, which Inductor translates to a call of oneDNN from C++; defined at its first use."""
    if not hasattr(torch.ops.omnet_torchrl, "mm"):  # there already, where this module is loaded again
        torch.library.define("omnet_torchrl::mm", "(Tensor a, Tensor b) -> Tensor")
        torch.library.impl("omnet_torchrl::mm", "CPU", onednn_mm)
        torch.library.register_fake("omnet_torchrl::mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
        lower_to_onednn(torch.ops.omnet_torchrl.mm)
    return torch.ops.omnet_torchrl.mm


# What Inductor computes slowly on a CPU as it stands: a product with a bias copies the bias over its whole output before,
# the products of a layer with one output are calls of a library, the deviation of a row is computed anew for every few of its
# elements, and on some CPUs the library of products is not the fastest.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.index_select.default: _index_select,
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.bmm.default: bmm,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.baddbmm.default: _baddbmm,
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
}
