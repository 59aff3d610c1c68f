"""Matrix products of a compiled update by oneDNN, on the CPUs where MKL gets no more than half of what they can do.

PyTorch calls MKL for them, which has kernels for AVX-512 on Intel's own CPUs only: on an AMD Zen 5 a product of three times 256
takes it twice as long as oneDNN, which PyTorch has as well (for convolutions, and for products of half precision). Which one is
called depends on the kind of CPU, not on a measurement: a run that is resumed repeats its numbers.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORTH = 2**21  # multiply-adds of a product: below, oneDNN's longer call outweighs its kernels
MOST = 32  # products of a batch, which oneDNN makes one by one

_library = torch.library.Library("omnet_torchrl", "DEF")
_library.define("mm(Tensor a, Tensor b) -> Tensor")


@torch.library.impl(_library, "mm", "CPU")
def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


@torch.library.register_fake("omnet_torchrl::mm", lib=_library)
def _mm_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def mm(a: Tensor, b: Tensor) -> Any:
    """``a @ b`` by oneDNN, or ``NotImplemented`` where that is not faster."""
    if not _preferred(a, a.shape[0] * a.shape[1] * b.shape[1]):
        return NotImplemented
    _register()
    return torch.ops.omnet_torchrl.mm(a, b)


def bmm(a: Tensor, b: Tensor) -> Any:
    """See :func:`mm`, of each product of a batch."""
    count, rows, inner = a.shape
    if count > MOST or not _preferred(a, rows * inner * b.shape[2]):
        return NotImplemented
    _register()
    if count == 1:
        return torch.ops.omnet_torchrl.mm(a.squeeze(0), b.squeeze(0)).unsqueeze(0)
    return torch.stack([torch.ops.omnet_torchrl.mm(*pair) for pair in zip(a.unbind(0), b.unbind(0), strict=True)])


def _preferred(tensor: Tensor, size: int) -> bool:
    """Of a product of so many multiply-adds."""
    if size < WORTH or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return False
    return bool(torch.backends.mkldnn.enabled) and onednn_is_faster()


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
def _register() -> None:
    """Teach Inductor to call oneDNN from C++."""
    # Imported when something is compiled: it takes a second.
    from torch._inductor.ir import FixedLayout
    from torch._inductor.lowering import permute, register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary

    @register_lowering(torch.ops.omnet_torchrl.mm, type_promotion_kind=None)
    def lower(a: Any, b: Any) -> Any:
        # oneDNN reads b in any order. That of a is made by the kernel that writes it, which is faster than a copy at run time.
        left = LinearUnary.require_contiguous(LinearUnary.realize_input(a))
        right = LinearUnary.realize_input(permute(b, [1, 0]))
        layout = FixedLayout(device=a.get_device(), dtype=a.get_dtype(), size=[a.get_size()[0], b.get_size()[1]])
        product = LinearUnary(layout=layout, inputs=[left, right], constant_args=[None, "none", [-1], ""])
        return type(a).create(product)
