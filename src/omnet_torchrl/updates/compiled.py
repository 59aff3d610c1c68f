"""A function of tensors as compiled code.

The function is run once on copies, its tensor operations are recorded with every tensor of state, batch and draws as an input,
and Inductor translates them. Nothing else is looked at again: no guard and no Python of the function is left, and what was no
input (the bounds of the action, the discount) is a constant. Whoever calls it sees to it that inputs have the same shapes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from omnet_torchrl.updates.kernels import DECOMPOSITIONS
from omnet_torchrl.updates.private import as_if_compiling, inductor, trace

TRANSPOSE, VIEW_AS = torch.ops.aten.transpose.int, torch.ops.aten.view.dtype


class CompiledFunction:
    """A function that reads tensors and changes some of them in place, compiled whole.

    It holds no tensor of a state: the same code serves every state of the same shapes.

    Args:
        function (callable): maps a list of state tensors and a list of inputs to a dict of tensors.
        state (sequence of Tensor): what it changes or reads; only copies of them are touched here.
        inputs (sequence of Tensor): examples, whose values don't matter. Calls pass contiguous ones.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor], list[Tensor]], dict[str, Tensor]],
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
    ):
        count, dtypes = len(state), [tensor.dtype for tensor in state]

        def flat(*tensors: Tensor) -> list[Tensor]:
            pairs = zip(tensors[:count], dtypes, strict=True)
            own = [tensor != 0 if dtype == torch.bool else tensor for tensor, dtype in pairs]
            output = function(own, list(tensors[count:]))
            self.names = list(output)
            return list(output.values())

        every = [*as_bytes(state), *(tensor.contiguous() for tensor in inputs)]
        with as_if_compiling(), quiet():
            graph = trace(flat, *map(_copy, every))
        _reading_bytes(graph)
        _as_they_are_read(graph)
        self.used = _without_unused_inputs(graph)
        self.count = count
        self.code = translate(graph, [_copy(every[i]) for i in self.used])

    def __call__(self, state: Sequence[Tensor], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Call it with gradients disabled; ``state`` are :func:`as_bytes`'s, in the strides of the examples."""
        count = self.count
        output = self.code(*(state[i] if i < count else inputs[i - count] for i in self.used))
        return dict(zip(self.names, output, strict=True))


def as_bytes(state: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a state as compiled code takes them: boolean ones as bytes, in the same storage.

    A CPU reads a mask of bytes as fast as one of numbers, and one of booleans thirteen times slower.
    """
    return [tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in state]


def translate(graph: GraphModule, inputs: list[Tensor]) -> Callable:
    """The compiled form of a graph of tensor operations, that changes its inputs and needs no gradient."""
    # Inputs have been checked, and what is in between is as it was traced.
    options, private = {"size_asserts": False}, inductor()
    with quiet():
        if private is None:
            code = torch.no_grad()(torch.compile(graph.forward, fullgraph=True, dynamic=False))
            code(*inputs)  # which compiles, as the other branches do here
            return code
        if any(tensor.is_cuda for tensor in inputs):
            return private.compile_fx(graph, inputs, config_patches=options)
        graph = decomposed(graph, inputs)
        # Constants come first among the inputs of the code, as AOTAutograd puts them there.
        constants = [*graph.parameters(), *(buffer for _, buffer in graph.named_buffers(remove_duplicate=False))]
        codes: list[Any] = []

        def keep(module: GraphModule, examples: list[Tensor], **kwargs: Any) -> Any:
            if [example.shape for example in examples] != [tensor.shape for tensor in (*constants, *inputs)]:
                raise RuntimeError("AOTAutograd has changed the inputs of an update: this version of torch is not supported.")
            codes.append(private.compile_fx_inner(module, examples, **kwargs))
            return codes[-1]

        # Kernels are called from C++, and that without AOTAutograd's layers, which nothing here needs: calls from Python would
        # be a tenth of an update. (From a cache of its own the code would not come by.)
        with private.without_cache():
            private.compile_fx(graph, inputs, inner_compile=keep, config_patches={**options, "cpp_wrapper": True})

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        return codes[0].current_callable([*constants, *tensors])

    return call


def decomposed(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """The same numbers, to rounding, in operations that Inductor is good at on a CPU."""
    private = inductor()
    assert private is not None
    # All values of one mode, as Inductor expects where it writes C++; the constants of a step are real tensors.
    with private.fake_mode(allow_non_fake_inputs=True) as mode:
        return trace(graph, *map(mode.from_tensor, inputs), decompositions=DECOMPOSITIONS)


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which compiled code takes for given; of a slice :meth:`~Tensor.clone` has others."""
    copy = tensor.clone()
    if copy.stride() == tensor.stride():
        return copy
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def _reading_bytes(graph: GraphModule) -> None:
    """Read a mask as the bytes that come in, where a layer reads the boolean tensor made of them as bytes again."""
    for node in graph.graph.find_nodes(op="call_function", target=VIEW_AS):
        source, dtype = node.args
        while source.target is torch.ops.aten.detach.default:
            source = source.args[0]
        if dtype == torch.uint8 and source.target is torch.ops.aten.ne.Scalar and source.args[0].op == "placeholder":
            node.replace_all_uses_with(source.args[0])


def _as_they_are_read(graph: GraphModule) -> None:
    """Have products that are only read transposed written that way: (A B)^T is B^T A^T.

    Autograd makes the gradients of several networks' weights as (in, out), while the weights are (out, in). An optimiser that
    reads both would read one of them against its order in memory.
    """
    make = graph.graph.call_function
    for product in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
        readers = list(product.users)
        if not all(node.target is TRANSPOSE and {dim % 3 for dim in node.args[1:]} == {1, 2} for node in readers):
            continue
        with graph.graph.inserting_before(product):
            turned = [make(TRANSPOSE, (matrix, 1, 2)) for matrix in reversed(product.args)]
            other = make(product.target, tuple(turned))
        for node in readers:
            node.replace_all_uses_with(other)


def _without_unused_inputs(graph: GraphModule) -> list[int]:
    """Remove the inputs that nothing reads; the places of those that stay."""
    graph.graph.eliminate_dead_code()
    inputs = graph.graph.find_nodes(op="placeholder")
    for node in inputs:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return [i for i, node in enumerate(inputs) if node.users]


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
def quiet() -> Iterator[None]:
    """Within, libraries don't warn of what nobody can act on."""
    with warnings.catch_warnings():
        # tensordict reads a flag that torch 2.13 no longer uses, whenever something is compiled.
        warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules is deprecated", category=FutureWarning)
        # The precision of matrix products is the user's choice; Inductor would advise another one.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        yield
