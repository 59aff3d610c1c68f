"""Dense networks that all tasks share, to compare pathways with: told the task, or with an output layer for each.

The same index and the same loss as for :class:`~omnet_torchrl.MaskedMLP`. Of N subnetworks and G networks, subnetwork k is that
of task k // G in network k % G: with G 2, the two critics of task t are 2t and 2t + 1, as they are for pathways, and all tasks'
first critics are one network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from omnet_torchrl.layers.ensembles import EnsembleLayerNorm, EnsembleLinear
from omnet_torchrl.layers.indexed import IndexedMLP, InitFn, linear_shapes
from omnet_torchrl.masks import check_num_subnets


class SharedTaskLinear(EnsembleLinear):
    """A linear layer of G networks that tasks share, behind an index of N subnetworks.

    Args:
        in_features, out_features, bias, init_fn, device, dtype: as in :class:`~omnet_torchrl.EnsembleLinear`.
        num_subnets (int): N.
        num_networks (int): G.
        task (str or None): ``"input"``: the layer reads a one-hot vector of the task too; ``"output"``: each task has its own
            layer. ``None`` (default): neither.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_subnets: int,
        num_networks: int,
        task: str | None = None,
        **kwargs: Any,
    ):
        tasks = num_subnets // num_networks
        count = num_subnets if task == "output" else num_networks
        super().__init__(in_features + tasks * (task == "input"), out_features, bias, num_subnets=count, **kwargs)
        self.in_features, self.num_subnets, self.num_networks, self.task = in_features, num_subnets, num_networks, task

    def select(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weights and biases of the subnetworks ``index (R,)``."""
        weight, bias = super().select(index if self.task == "output" else index % self.num_networks)
        if self.task != "input":
            return weight, bias
        # The product with a one-hot vector is a column of the weight.
        place = (self.in_features + index // self.num_networks).view(-1, 1, 1).expand(-1, weight.shape[1], 1)
        column = weight.gather(2, place).squeeze(2)
        return weight[..., : self.in_features], column if bias is None else bias + column


class SharedTaskLayerNorm(EnsembleLayerNorm):
    """A layer normalisation of G networks that tasks share; arguments as in :class:`SharedTaskLinear`."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, num_subnets: int, num_networks: int, **kwargs: Any):
        super().__init__(normalized_shape, eps, num_subnets=num_networks, **kwargs)
        self.num_subnets, self.num_networks = num_subnets, num_networks

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales and shifts of the subnetworks ``index (R,)``."""
        return super().select(index % self.num_networks)


class SharedMLP(IndexedMLP):
    """Dense multi-layer perceptrons that all tasks share.

    Args:
        in_features, out_features, depth, num_cells, activation_class, dropout, device, ...: as in
            :class:`torchrl.modules.MLP`.
        norm_class (type or None): ``None`` or :class:`torch.nn.LayerNorm` over the last dimension.

    Keyword Args:
        num_subnets (int): N, tasks times networks.
        num_networks (int): G, networks that each task has, e.g. 2 critics. Defaults to 1.
        heads (bool): each task has an output layer of its own (multi-head), instead of the task as a further input, one-hot.
            Defaults to ``False``.
        init_fn (callable or None): see :class:`~omnet_torchrl.MaskedLinear`.

    Shape:
        As :class:`~omnet_torchrl.MaskedMLP`.

    Raises:
        ValueError: N is no multiple of G; another normalisation.

    Examples:
        >>> import torch
        >>> critics = SharedMLP(in_features=23, out_features=1, num_cells=[256, 256], num_subnets=8, num_networks=2)
        >>> task = torch.arange(4)[:, None]  # of each row of 32 transitions
        >>> critics(torch.zeros(4, 32, 23), torch.stack([2 * task, 2 * task + 1])).shape
        torch.Size([2, 4, 32, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        depth: int | None = None,
        num_cells: Sequence[int] | int | None = None,
        *,
        num_subnets: int,
        num_networks: int = 1,
        heads: bool = False,
        norm_class: type[nn.Module] | None = None,
        norm_kwargs: list[dict[str, Any]] | None = None,
        init_fn: InitFn | None = None,
        **kwargs: Any,
    ):
        check_num_subnets(num_subnets)
        if num_networks < 1 or num_subnets % num_networks:
            raise ValueError(f"num_subnets must be a multiple of num_networks={num_networks}, got {num_subnets}.")
        if norm_class not in (None, nn.LayerNorm):
            raise ValueError(f"SharedMLP has no other normalisation than LayerNorm, got norm_class={norm_class}.")
        group = {"num_subnets": num_subnets, "num_networks": num_networks}
        *hidden, _ = shapes = linear_shapes(in_features, out_features, depth, num_cells)
        layer_kwargs: list[dict[str, Any]] = [{**group, "init_fn": init_fn} for _ in shapes]
        layer_kwargs[-1 if heads else 0]["task"] = "output" if heads else "input"
        ours: dict[str, Any] = {"layer_class": SharedTaskLinear, "layer_kwargs": layer_kwargs}
        if norm_class is not None:
            norms = norm_kwargs or [{"normalized_shape": units} for units, _ in hidden]
            ours |= {"norm_class": SharedTaskLayerNorm, "norm_kwargs": [{**each, **group} for each in norms]}
        super().__init__(in_features, out_features, depth, num_cells, **ours, **kwargs)
        self.layer_kwargs = self._layer_kwargs_iter = None  # which MLP keeps, and nothing reads any more
        self.num_subnets = num_subnets
