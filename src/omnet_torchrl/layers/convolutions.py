"""Networks for images that are N networks: convolutions under N masks, and a sequence of layers behind one index.

Where all subnetworks see the same images, they are one convolution whose kernels are those of all that are asked, side by side;
where each sees its own, one convolution in groups. See :mod:`~omnet_torchrl.layers.indexed` for how the index broadcasts.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnet_torchrl.layers.indexed import IndexedLayer, IndexedMLP, InitFn, as_index, check_subnet, initialise
from omnet_torchrl.layers.masked import apply_masks
from omnet_torchrl.masks import check_masks


class MaskedConv2d(IndexedLayer, nn.Conv2d):
    r"""A convolution under N masks, :math:`y = (W \odot m_k) * x + b`; one bias for all.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, device, dtype: as in :class:`torch.nn.Conv2d`,
            without groups.
        masks (Tensor): boolean, ``(N, out_channels, in_channels, *kernel_size)``; ``True`` keeps the weight. They are a buffer,
            as those of :class:`~omnet_torchrl.MaskedLinear`.
        init_fn (callable or None): initialises the weight in place, with a zero bias. ``None``: as :class:`torch.nn.Conv2d`.

    Shape:
        input ``(*batch, in_channels, H, W)``, of numbers or booleans; subnet: an index that broadcasts against ``batch``;
        output ``(*broadcast batch, out_channels, H', W')``.

    Raises:
        TypeError, ValueError: masks of a wrong dtype or shape, an index that is not int64.

    Examples:
        >>> from omnet_torchrl.masks import bernoulli_masks
        >>> layer = MaskedConv2d(4, 16, 3, masks=bernoulli_masks(5, (16, 4, 3, 3), 0.5, generator=0))
        >>> layer(torch.zeros(32, 4, 10, 10), torch.arange(5)[:, None]).shape
        torch.Size([5, 32, 16, 8, 8])
    """

    masks: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        masks: Tensor,
        init_fn: InitFn | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("groups", 1) != 1 or kwargs.get("padding_mode", "zeros") != "zeros":
            raise ValueError("MaskedConv2d has no groups, and pads with zeros.")
        self.init_fn = init_fn
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        check_masks(masks, self.weight.shape)
        self.num_subnets = masks.shape[0]
        self.register_buffer("masks", masks.to(self.weight.device, copy=True))

    def reset_parameters(self) -> None:
        """Draw the weight and the bias anew; masks stay."""
        super().reset_parameters()
        if self.init_fn is not None:
            initialise(self.weight, self.bias, self.init_fn)

    def forward(self, input: Tensor, subnet: Tensor | int) -> Tensor:  # type: ignore[override]
        """Convolve each image with the kernels of its subnetwork."""
        subnet, image = as_index(subnet, self.num_subnets, input.device), input.shape[-3:]
        if image[:-2] != (self.in_channels,):
            raise ValueError(f"MaskedConv2d must have inputs (*batch, {self.in_channels}, H, W), got {tuple(input.shape)}.")
        input = input.to(self.weight.dtype)
        rows = subnet.ndim
        while rows and subnet.shape[rows - 1] == 1:
            rows -= 1
        batch = torch.broadcast_shapes(subnet.shape, input.shape[:-3])
        # Dimensions of the batch that the index tells apart come first, the images that share an index after them.
        shared = len(batch) - (subnet.ndim - rows) if rows else 0
        index = subnet.reshape(subnet.shape[:rows]).expand(batch[:shared]).reshape(-1)
        num_rows, per_row = index.shape[0], math.prod(batch[shared:])
        if input.ndim - 3 <= len(batch) - shared:  # all rows see the same images
            output = self._side_by_side(input.expand(*batch[shared:], *image).reshape(-1, *image), index)
            return output.transpose(0, 1).reshape(*batch, *output.shape[2:])
        input = input.expand(*batch, *image)
        if per_row == 1 and num_rows > self.num_subnets:
            # One image per index: rather than kernels for each image, ask all subnetworks and keep one answer.
            output = self._side_by_side(input.reshape(-1, *image), torch.arange(self.num_subnets, device=index.device))
            output = output[torch.arange(num_rows, device=index.device), index]
            return output.reshape(*batch, *output.shape[1:])
        grouped = input.reshape(num_rows, per_row, *image).transpose(0, 1).reshape(per_row, -1, *image[1:])
        output = self._convolve(grouped, index, groups=num_rows)
        return output.transpose(0, 1).reshape(*batch, *output.shape[2:])

    def _side_by_side(self, input: Tensor, index: Tensor) -> Tensor:
        """The answers of the subnetworks ``index (R,)`` to the same images ``(I, C, H, W)``: ``(I, R, out, H', W')``."""
        return self._convolve(input, index, groups=1)

    def _convolve(self, input: Tensor, index: Tensor, groups: int) -> Tensor:
        kernels = apply_masks(self.weight, self.masks, index).flatten(0, 1)
        bias = None if self.bias is None else self.bias.repeat(len(index))
        output = F.conv2d(input, kernels, bias, self.stride, self.padding, self.dilation, groups)
        return output.unflatten(1, (len(index), self.out_channels))

    def extract(self, subnet: int) -> nn.Conv2d:
        """Return layer ``subnet`` as a plain :class:`torch.nn.Conv2d`, with parameters of its own."""
        index = check_subnet(subnet, self.num_subnets, self.weight.device)
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        plain = nn.utils.skip_init(nn.Conv2d, *sizes, bias=self.bias is not None, device=self.weight.device)
        plain.weight = nn.Parameter(apply_masks(self.weight, self.masks, index)[0].detach().clone())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain

    def extra_repr(self) -> str:
        """Describe the layer as :class:`torch.nn.Conv2d` does, with N."""
        return f"{super().extra_repr()}, num_subnets={self.num_subnets}"


class IndexedSequential(nn.Sequential):
    """A sequence of layers that is N sequences: those that take an index get it, the others are shared by all.

    Args:
        *layers (nn.Module): :class:`MaskedConv2d`, :class:`~omnet_torchrl.MaskedLinear`, :class:`~omnet_torchrl.MaskedMLP` and
            other layers of this package, and plain ones that don't mix elements of the batch and work for any number of batch
            dimensions: activations, LayerNorm, ``nn.Flatten(-3)``.

    Raises:
        ValueError: layers that disagree on the number of subnetworks, or of which none takes an index.

    Examples:
        >>> from omnet_torchrl import MaskedMLP
        >>> from omnet_torchrl.masks import bernoulli_masks
        >>> first = MaskedConv2d(4, 16, 3, masks=bernoulli_masks(5, (16, 4, 3, 3), 0.5, generator=0))
        >>> network = IndexedSequential(first, nn.ReLU(), nn.Flatten(-3), MaskedMLP(16 * 8 * 8, 6, num_cells=[128]))
        >>> network(torch.zeros(32, 4, 10, 10), torch.arange(5)[:, None]).shape
        torch.Size([5, 32, 6])
    """

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        numbers = {layer.num_subnets for layer in layers if isinstance(layer, IndexedLayer | IndexedMLP)}
        if len(numbers) != 1:
            raise ValueError(f"the layers must be of one number of subnetworks, got {sorted(numbers) or 'none'}.")
        self.num_subnets = numbers.pop()

    def forward(self, input: Tensor, subnet: Tensor | int) -> Tensor:  # type: ignore[override]
        """Call one layer after the other."""
        for layer in self:
            input = layer(input, subnet) if isinstance(layer, IndexedLayer | IndexedMLP) else layer(input)
        return input

    def extract(self, subnet: int) -> nn.Sequential:
        """Return subnetwork ``subnet`` as a plain :class:`torch.nn.Sequential` without an index, with parameters of its own."""
        check_subnet(subnet, self.num_subnets)
        indexed = IndexedLayer | IndexedMLP
        layers = [layer.extract(subnet) if isinstance(layer, indexed) else copy.deepcopy(layer) for layer in self]
        return nn.Sequential(*layers).train(self.training)
