"""The private names of torch that compiled updates use, in one place.

An update runs at the speed of its matrix products only where its kernels are called from C++ with nothing in between, which
torch offers in no public function. The tests have run with the versions in :data:`TESTED`. Outside of them, or where a name is
missing, :func:`inductor` returns ``None`` with one warning, and :func:`torch.compile` compiles updates: the numbers are the
same, to rounding, and each call has some overhead.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributions import Distribution
from torch.fx import GraphModule

TESTED = (2, 13), (2, 14)  # the oldest and the newest version of torch that the tests have run with


@cache
def inductor() -> SimpleNamespace | None:
    """Inductor's own entry points, or ``None`` where they can't be used; imported at the first call, which takes seconds."""
    try:
        return _entry_points()
    except (ImportError, AttributeError) as error:
        oldest, newest = (".".join(map(str, version)) for version in TESTED)
        warnings.warn(
            f"updates are compiled by torch.compile, with the same numbers but slower calls: {error}. "
            f"For full speed, install a version of torch from {oldest} to {newest}.",
            stacklevel=2,
        )
        return None


def _entry_points() -> SimpleNamespace:
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if not TESTED[0] <= version <= TESTED[1]:
        raise ImportError(f"torch {torch.__version__} has not been tested")
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.ir import FixedLayout
    from torch._inductor.lowering import permute, register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary
    from torch._inductor.output_code import CompiledFxGraph
    from torch._subclasses import FakeTensorMode

    for found, name in (
        (hasattr(config, "enable_autograd_cache"), "enable_autograd_cache"),
        ("current_callable" in CompiledFxGraph.__annotations__, "current_callable"),
    ):
        if not found:
            raise AttributeError(f"torch {torch.__version__} has no {name}")
    return SimpleNamespace(
        compile_fx=compile_fx,
        compile_fx_inner=compile_fx_inner,
        fake_mode=FakeTensorMode,
        without_cache=partial(config.patch, enable_autograd_cache=False),
        layout=FixedLayout,
        permute=permute,
        register_lowering=register_lowering,
        linear=LinearUnary,
    )


@contextlib.contextmanager
def as_if_compiling() -> Iterator[None]:
    """Within, libraries leave out what looks at values (the checks of a distribution's arguments), as in ``torch.compile``."""
    asked, validate = torch.compiler.is_compiling, Distribution._validate_args
    answer = asked.__code__
    asked.__code__ = (lambda: True).__code__  # of the function itself, since libraries hold it by names of their own
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        asked.__code__ = answer
        Distribution.set_default_validate_args(validate)


def trace(function: Callable, *inputs: Any, decompositions: dict[Any, Callable] | None = None) -> GraphModule:
    """The tensor operations that a function makes of its inputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, decomposition_table=decompositions)(*inputs)


def onednn_mm(a: Any, b: Any) -> Any:
    """``a @ b`` by oneDNN, whatever torch would call."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def has_onednn_mm() -> bool:
    """Whether this build of torch has :func:`onednn_mm`, and Inductor can be taught to call it."""
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return built and inductor() is not None


def lower_to_onednn(operation: Any) -> None:
    """Teach Inductor to call oneDNN from C++ for an operation (a, b) -> a @ b."""
    private = inductor()
    assert private is not None
    linear = private.linear

    @private.register_lowering(operation, type_promotion_kind=None)
    def lower(a: Any, b: Any) -> Any:
        # oneDNN reads b in any order. That of a is made by the kernel that writes it, which is faster than a copy at run time.
        left = linear.require_contiguous(linear.realize_input(a))
        right = linear.realize_input(private.permute(b, [1, 0]))
        layout = private.layout(device=a.get_device(), dtype=a.get_dtype(), size=[a.get_size()[0], b.get_size()[1]])
        product = linear(layout=layout, inputs=[left, right], constant_args=[None, "none", [-1], ""])
        return type(a).create(product)
