"""A linear layer of the weights that a sparse structure keeps: an update costs what they cost, not what all weights would."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnet_torchrl.layers.indexed import IndexedLayer, as_index, check_subnet


class StructuredLinear(IndexedLayer):
    r"""A linear layer with the weights of a structure alone, which is one for all N subnetworks; for training.

    The numbers are those of a :class:`~omnet_torchrl.MaskedLinear` with the structure as its mask, up to rounding; weights,
    moments and target are as many as the structure keeps. With 1,000 units of 36 inputs out of 400, an update of DQN on a CPU
    takes half of the time (``benchmarks/speed/games.py``). The structure can't change.

    Args:
        layer (MaskedLinear or nn.Linear): its weights and biases are copied. See
            :func:`~omnet_torchrl.structures.set_structure` for weights that are drawn for the inputs that a unit keeps.
        structure (Tensor): boolean, ``(out_features, in_features)``, ``True`` where a weight is kept.

    Shape:
        input ``(*batch, in_features)``, subnet: an index that broadcasts against ``batch``; output
        ``(*broadcast batch, out_features)``. ``weight`` is ``(E,)``, row by row, of the E kept weights.

    Raises:
        ValueError: a structure of another shape or type, a layer with masks of its bias, inputs of another size or type.

    Examples:
        >>> from omnet_torchrl.structures import random_structure
        >>> layer = StructuredLinear(nn.Linear(400, 1000), random_structure(1000, 400, 36, generator=0))
        >>> layer
        StructuredLinear(in_features=400, out_features=1000, weights=36,000 (9.0%), bias=True)
        >>> layer(torch.zeros(32, 400), torch.tensor(0)).shape
        torch.Size([32, 1000])
    """

    rows: Tensor
    columns: Tensor
    starts: Tensor

    def __init__(self, layer: nn.Linear, structure: Tensor):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._shape, self.num_subnets = (self.out_features, self.in_features), getattr(layer, "num_subnets", 1)
        if getattr(layer, "bias_masks", None) is not None:
            raise ValueError("a layer with a structure has one bias for all subnetworks: build it with mask_bias=False.")
        if structure.shape != layer.weight.shape or structure.dtype != torch.bool:
            got = f"{structure.dtype} of {tuple(structure.shape)}"
            raise ValueError(f"structure must be boolean of the weight's shape {tuple(layer.weight.shape)}, got {got}.")
        rows, columns = structure.to(layer.weight.device).nonzero(as_tuple=True)
        starts = torch.zeros(self.out_features + 1, dtype=torch.int32, device=rows.device)
        starts[1:] = torch.bincount(rows, minlength=self.out_features).cumsum(0)
        for name, each in (("rows", rows), ("columns", columns), ("starts", starts)):
            self.register_buffer(name, each.to(torch.int32))
        self.weight = nn.Parameter(layer.weight.detach()[rows, columns])
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and biases anew, as :func:`~omnet_torchrl.structures.set_structure` does; the structure stays."""
        bound = self.starts.diff().clamp(min=1).to(self.weight.dtype).rsqrt()
        self.weight.uniform_(-1, 1).mul_(bound[self.rows])
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_(bound)

    def forward(self, input: Tensor, subnet: Tensor | int) -> Tensor:
        """Map ``(*batch, in_features)`` to ``(*broadcast batch, out_features)``."""
        index = as_index(subnet, self.num_subnets, input.device)
        if input.shape[-1:] != (self.in_features,) or input.dtype != self.weight.dtype:
            raise ValueError(
                f"StructuredLinear must have inputs (*batch, {self.in_features}) of {self.weight.dtype}, got "
                f"{tuple(input.shape)} of {input.dtype}."
            )
        rows = input.reshape(-1, self.in_features)
        # One observation of a policy; within an update, whose code is traced, the weight is no parameter.
        if len(rows) == 1 and isinstance(self.weight, nn.Parameter) and not torch.is_grad_enabled():
            output = torch.mv(self._matrix(), rows[0])
        else:
            output = _Product.apply(self.weight, rows, self.rows, self.columns, self.starts).t()
        output = (output if self.bias is None else output + self.bias).view(*input.shape[:-1], self.out_features)
        return output.expand(*torch.broadcast_shapes(index.shape, input.shape[:-1]), self.out_features)

    def _matrix(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            return torch.sparse_csr_tensor(self.starts, self.columns, self.weight, self._shape, check_invariants=False)

    @property
    def structure(self) -> Tensor:
        """Boolean, ``(out_features, in_features)``."""
        return scattered(torch.ones_like(self.rows, dtype=torch.bool), self.rows, self.columns, self._shape)

    def extract(self, subnet: int) -> nn.Linear:
        """Return the layer as a plain :class:`torch.nn.Linear`, with zeros for the weights that the structure leaves out."""
        check_subnet(subnet, self.num_subnets)
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        plain = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None, **like)
        with torch.no_grad():
            plain.weight.copy_(scattered(self.weight, self.rows, self.columns, self._shape))
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain

    def extra_repr(self) -> str:
        """Describe the layer as :class:`torch.nn.Linear` does, with the number of its weights."""
        kept = len(self.rows)
        share = f"weights={kept:,} ({kept / (self.in_features * self.out_features):.1%})"
        return f"in_features={self.in_features}, out_features={self.out_features}, {share}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """Sparse weights times inputs ``(B, in)``: ``(out, B)``.

    The forward pass is a weighted sum of rows of the transposed inputs, which PyTorch has as a bag of embeddings. The backward
    pass makes the gradient of all weights as a dense product, and keeps those of the structure.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, input: Tensor, rows: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
        table = input.t().contiguous()
        return F.embedding_bag(columns, table, starts, mode="sum", per_sample_weights=weight, include_last_offset=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.units = len(inputs[4]) - 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, input, rows, columns = ctx.saved_tensors
        of_weight, of_input, *_ = ctx.needs_input_grad
        change = (gradient @ input)[rows, columns] if of_weight else None
        back = gradient.t() @ scattered(weight, rows, columns, (ctx.units, input.shape[1])) if of_input else None
        return change, back, None, None, None


def scattered(values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a matrix with these values at these places, and zeros elsewhere."""
    return values.new_zeros(shape).index_put((rows, columns), values)
