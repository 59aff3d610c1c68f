"""Layers that compute with the weights of a mask alone, to deploy a subnetwork: the numbers in compressed rows (CSR).

On one thread of a CPU, an actor of two layers of 256 units with 5 % of its weights takes a ninth of the memory; it is 1.9 times
slower than the dense one for one observation, and 1.4 times faster for 256 of them; with layers of 1,024 units it is 2.5 times
faster for either. With half of the weights it is about twice as slow, and no smaller (``benchmarks/speed/sparsity.py``).
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class SparseLinear(nn.Module):
    """A :class:`torch.nn.Linear` that keeps the weights that are not 0. For inference: weights and bias get no gradient.

    Args:
        linear (nn.Linear): its weights and bias are copied.

    Shape:
        input ``(*batch, in_features)``, output ``(*batch, out_features)``.

    Examples:
        >>> linear = torch.nn.Linear(4, 2)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]))
        >>> SparseLinear(linear)
        SparseLinear(in_features=4, out_features=2, weights=2 (25.0%), bias=True)
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        rows, columns = weight.nonzero(as_tuple=True)
        starts = torch.zeros(self.out_features + 1, dtype=torch.int32, device=weight.device)
        starts[1:] = torch.bincount(rows, minlength=self.out_features).cumsum(0)
        # Kernels of MKL take indices of 32 bits: those of 64 would be converted at each call.
        self.register_buffer("starts", starts)
        self.register_buffer("columns", columns.to(torch.int32))
        self.register_buffer("values", weight[rows, columns])
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        self._matrix: tuple[Tensor, Tensor] | None = None  # the weights, and the values in whose storage they are
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        weight, rows = self.weight, input.reshape(-1, self.in_features)
        output = torch.mv(weight, rows[0]).unsqueeze(0) if len(rows) == 1 else (weight @ rows.T).T
        output = output.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    @property
    def weight(self) -> Tensor:
        """The weights as a sparse matrix, in the storage of the module's buffers."""
        matrix, values = self._matrix or (None, None)
        if matrix is None or values is not self.values:
            size = (self.out_features, self.in_features)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
                matrix = torch.sparse_csr_tensor(self.starts, self.columns, self.values, size, check_invariants=True)
            self._matrix = matrix, self.values
        return matrix

    def __getstate__(self) -> dict[str, Any]:
        """Without the matrix, which can't be copied, and is made again."""
        return {**self.__dict__, "_matrix": None}

    def extra_repr(self) -> str:
        """Describe the layer as :class:`torch.nn.Linear` does, with the number of its weights."""
        kept = len(self.values)
        share = f"weights={kept:,} ({kept / (self.in_features * self.out_features):.1%})"
        return f"in_features={self.in_features}, out_features={self.out_features}, {share}, bias={self.bias is not None}"


def sparsified(module: Module) -> Module:
    """Replace every :class:`torch.nn.Linear` in ``module``, in place, by a :class:`SparseLinear`; returns the module.

    Raises:
        TypeError: the module has subnetworks, which share weights: extract one of them first.

    Examples:
        >>> from omnet_torchrl import MaskedMLP
        >>> net = MaskedMLP(in_features=8, out_features=1, num_cells=[64], num_subnets=3, sparsity=0.5, generator=0)
        >>> [type(layer).__name__ for layer in sparsified(net.extract(0))]
        ['SparseLinear', 'Tanh', 'SparseLinear']
    """
    shared = next((each for each in module.modules() if hasattr(each, "num_subnets")), None)
    if shared is not None:
        raise TypeError(f"a {type(shared).__name__} is several subnetworks: extract one, as extract(0, sparse=True) does.")
    if isinstance(module, nn.Linear):
        return SparseLinear(module)  # type: ignore[return-value]
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, SparseLinear(child))
    return module
