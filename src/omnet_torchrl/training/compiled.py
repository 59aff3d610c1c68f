"""A step of (state, batch, draws) as one compiled function, and a sequence of such steps as one CUDA graph.

The step is run once on copies, its tensor operations are recorded with every tensor of state, batch and draws as an input,
and Inductor translates them. Nothing else is looked at again: no guard and no Python of the step is left, and what was no input
(the bounds of the action, the discount) is a constant. That inputs have the same shapes is checked once a call, by
:class:`Inputs`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._subclasses import FakeTensorMode
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from omnet_torchrl.training.products import bmm, mm

Step = Callable[[Any, TensorDictBase, TensorDictBase], dict[str, Tensor]]
Schedule = tuple[tuple[str, int], ...]
Kind = tuple[torch.Size, torch.dtype, torch.device]
FEW = 4096  # of the size of a layer's bias, not of its weights


class Inputs:
    """The leaves of batches ``(U, B)`` and draws ``(U,)``, of the kinds that a step was compiled for.

    Args:
        batch (TensorDictBase): ``(B,)``, one batch.
        draws (TensorDictBase): the draws of one update.

    Keyword Args:
        shared (bool): all updates read the same ``batch``, of any size; it is never copied. Defaults to ``False``.

    Raises:
        ValueError: a shared leaf is not contiguous.
    """

    def __init__(self, batch: TensorDictBase, draws: TensorDictBase, *, shared: bool = False):
        self.keys = [list(each.keys(True, True)) for each in (batch, draws)]
        self.sizes = [batch.batch_size, draws.batch_size]
        self.shared = len(self.keys[0]) if shared else 0  # so many of the leaves, the first ones
        leaves = [each.get(key) for each, keys in self._pairs(batch, draws) for key in keys]
        self.examples = self._contiguous(leaves)
        self.kinds = [(leaf.shape, leaf.dtype, leaf.device) for leaf in self.examples]

    def leaves(self, batches: TensorDictBase, draws: TensorDictBase) -> list[Tensor]:
        """The leaves ``(U, ...)``, contiguous; the shared ones as they are.

        Raises:
            ValueError: a leaf is missing or of another shape, dtype or device.
        """
        leaves = [each.get(key, None) for each, keys in self._pairs(batches, draws) for key in keys]
        for i, (leaf, kind) in enumerate(zip(leaves, self.kinds, strict=True)):
            got = None if leaf is None else (leaf.shape[int(i >= self.shared) :], leaf.dtype, leaf.device)
            if got != kind:
                name = [key for keys in self.keys for key in keys][i]
                raise ValueError(f"the update is compiled for {name!r} of {_said(kind)}, got {_said(got)}: build another one.")
        return self._contiguous(leaves)

    def rows(self, leaves: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The leaves of each update, the shared ones first."""
        own = zip(*(leaf.unbind(0) for leaf in leaves[self.shared :]), strict=True)
        return [(*leaves[: self.shared], *row) for row in own]

    def tensordicts(self, leaves: Sequence[Tensor]) -> tuple[TensorDict, TensorDict]:
        """Batch and draws of one row's leaves."""
        split = len(self.keys[0])
        parts = zip(self.keys, (leaves[:split], leaves[split:]), self.sizes, strict=True)
        batch, draws = (TensorDict(dict(zip(keys, part, strict=True)), batch_size=size) for keys, part, size in parts)
        return batch, draws

    def _contiguous(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        for i, leaf in enumerate(leaves[: self.shared]):
            if not leaf.is_contiguous():
                strides = f"strides {leaf.stride()} for shape {tuple(leaf.shape)}"
                raise ValueError(f"rows must be contiguous, got {self.keys[0][i]!r} with {strides}: a GatherStorage's are.")
        return [leaf.contiguous() for leaf in leaves]

    def _pairs(self, batch: TensorDictBase, draws: TensorDictBase) -> Iterator[tuple[TensorDictBase, list[NestedKey]]]:
        return zip((batch, draws), self.keys, strict=True)


class CompiledStep:
    """A step, compiled whole: called with the leaves of one row, it changes the tensors of ``state`` in place.

    Args:
        step (callable): of (state, batch, draws); returns a dict of tensors.
        state: nested dicts and lists of the tensors that it changes or reads; only copies of them are touched here.
        inputs (Inputs): what it is compiled for.
    """

    def __init__(self, step: Step, state: Any, inputs: Inputs):
        self.state, spec = pytree.tree_flatten(state)
        count = len(self.state)

        def flat(*tensors: Tensor) -> list[Tensor]:
            output = step(pytree.tree_unflatten(list(tensors[:count]), spec), *inputs.tensordicts(tensors[count:]))
            self.names = list(output)
            return list(output.values())

        every = [*self.state, *inputs.examples]
        with _tracing():
            graph = make_fx(flat)(*(tensor.clone() for tensor in self.state), *inputs.examples)
        used = _without_unused_inputs(graph)
        self.function = translate(graph, [every[i].clone() if i < count else every[i] for i in used])
        self.state, self.leaves = [every[i] for i in used if i < count], [i - count for i in used if i >= count]

    def __call__(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Make the step; with gradients disabled around it."""
        output = self.function(*self.state, *(leaves[i] for i in self.leaves))
        return dict(zip(self.names, output, strict=True))


class CUDAGraph:
    """A sequence of steps captured once, and replayed on copies of its inputs.

    Args:
        steps (mapping): name to compiled step.
        schedule (tuple): ``(name, row)`` of each step to make.
        inputs (Inputs): of the steps.
        leaves (list of Tensor): see :meth:`Inputs.leaves`. The shared ones are read where they are.
    """

    def __init__(self, steps: Mapping[str, Callable], schedule: Schedule, inputs: Inputs, leaves: Sequence[Tensor]):
        self.shared = list(leaves[: inputs.shared])
        self.own = [leaf.clone() for leaf in leaves[inputs.shared :]]
        rows = inputs.rows([*self.shared, *self.own])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(steps, schedule, rows)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):  # torch's own stream is of the device that captured first
            self.output = run(steps, schedule, rows)

    def __call__(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Make all steps; the output's tensors are the same ones each time.

        Raises:
            ValueError: a shared leaf lies elsewhere than the one that was captured.
        """
        split = len(self.shared)
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(self.shared, leaves, strict=False)):
            raise ValueError("the update is captured for the rows of one storage, got others: build another one.")
        torch._foreach_copy_(self.own, list(leaves[split:]))
        self.graph.replay()
        return self.output


@torch.no_grad()
def run(steps: Mapping[str, Callable], schedule: Schedule, rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Make the steps ``(name, row)`` of a schedule, one after the other; the newest outputs."""
    output: dict[str, Tensor] = {}
    for name, row in schedule:
        output |= steps[name](rows[row])
    return output


def translate(graph: GraphModule, inputs: list[Tensor]) -> Callable:
    """The compiled form of a graph of tensor operations, that changes its inputs and needs no gradient."""
    # Inputs have been checked, and what is in between is as it was traced.
    options = {"size_asserts": False}
    with _quiet():
        if any(tensor.is_cuda for tensor in inputs):
            return torch._inductor.compile(graph, inputs, options=options)  # type: ignore[arg-type]
        graph = decomposed(graph, inputs)
        # Constants come first among the inputs of the code, as AOTAutograd puts them there.
        constants = [*graph.parameters(), *(buffer for _, buffer in graph.named_buffers(remove_duplicate=False))]
        codes: list[Any] = []

        def keep(module: GraphModule, examples: list[Tensor], **kwargs: Any) -> Any:
            if [example.shape for example in examples] != [tensor.shape for tensor in (*constants, *inputs)]:
                raise RuntimeError("AOTAutograd has changed the inputs of an update: this version of torch is not supported.")
            codes.append(compile_fx_inner(module, examples, **kwargs))
            return codes[-1]

        # Kernels are called from C++, and that without AOTAutograd's layers, which nothing here needs: calls from Python would
        # be a tenth of an update. (From a cache of its own the code would not come by.)
        with torch._functorch.config.patch(enable_autograd_cache=False):
            compile_fx(graph, inputs, inner_compile=keep, config_patches={**options, "cpp_wrapper": True})

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        return codes[0].current_callable([*constants, *tensors])

    return call


def _without_unused_inputs(graph: GraphModule) -> list[int]:
    """Remove the inputs that nothing reads; the places of those that stay."""
    graph.graph.eliminate_dead_code()
    inputs = graph.graph.find_nodes(op="placeholder")
    for node in inputs:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return [i for i, node in enumerate(inputs) if node.users]


def decomposed(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """The same numbers, to rounding, in operations that Inductor is good at on a CPU."""
    # All values of one mode, as Inductor expects where it writes C++; the constants of a step are real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return make_fx(graph, decomposition_table=DECOMPOSITIONS)(*map(mode.from_tensor, inputs))


def materialised(tensor: Tensor) -> Tensor:
    """The same numbers, computed once: Inductor would compute small tensors anew for each few of the elements they serve."""
    return tensor.as_strided(tensor.shape, tensor.stride())


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
    product = torch.mm(a, b).unsqueeze(0)
    return ((product if alpha == 1 else alpha * product) + (bias if beta == 1 else beta * bias)).squeeze(0)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """See :func:`_addmm`."""
    product = torch.bmm(a, b)
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


def _index_select(tensor: Tensor, dim: int, index: Tensor) -> Any:
    """A few numbers are gathered once, rather than anew for each row that they serve."""
    if tensor.numel() // tensor.shape[dim] * index.numel() > FEW:
        return NotImplemented
    where: list[Any] = [slice(None)] * tensor.ndim
    where[dim] = index
    return materialised(tensor[tuple(where)])


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
}


@contextlib.contextmanager
def preserved(tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Whatever happens inside, the values of ``tensors`` and the state of torch's global generator are as before after it."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    # As in torch.compile: libraries leave out what looks at values, such as the checks of a distribution's arguments.
    compiling, validate = torch.compiler._is_compiling_flag, Distribution._validate_args
    torch.compiler._is_compiling_flag = True
    Distribution.set_default_validate_args(False)
    try:
        with _quiet():
            yield
    finally:
        torch.compiler._is_compiling_flag = compiling
        Distribution.set_default_validate_args(validate)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # tensordict reads a flag that torch 2.13 no longer uses, whenever something is compiled.
        warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules is deprecated", category=FutureWarning)
        # The precision of matrix products is the user's choice; Inductor would advise another one.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        yield


def _said(kind: Kind | None) -> str:
    return "None" if kind is None else f"shape {tuple(kind[0])}, {kind[1]}, {kind[2]}"
