"""A sequence of compiled steps captured in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CUDAGraph:
    """A function of tensors, captured once and replayed on copies of its inputs.

    Args:
        function (callable): of a list of tensors; returns a dict of tensors.
        inputs (sequence of Tensor): on a CUDA device, which must be the current one.
    """

    def __init__(self, function: Callable[[list[Tensor]], dict[str, Tensor]], inputs: Sequence[Tensor]):
        self.inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):  # torch's own stream is of the device that captured first
            self.output = function(self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Make all steps; the output's tensors are the same ones each time."""
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.output
