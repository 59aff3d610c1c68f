"""Where the masked layers of a loss's networks are in the state of an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omnet_torchrl.masks import mask_iou
from omnet_torchrl.topology import mask_overlap
from omnet_torchrl.updates.adam import MOMENTS
from omnet_torchrl.updates.update import Update

Path = tuple[str, ...]


class MaskedNetwork:
    """The masked layers of one parameter group of a loss: where their weights, masks and moments are in an update's state."""

    def __init__(self, update: Update, group: str, paths: Sequence[Path]):
        self.group, self.paths = group, list(paths)
        self.step = next(step for step in update.steps.values() if group in step.trains)
        self.role = "actor" if "actor" in group else "critic"
        masks, weights = self.masks(update), self.weights(update)
        shared = any(weights[path].ndim < masks[path].ndim for path in self.paths)
        # Which masks are chosen together: each of those over one weight by itself, or those of separate networks.
        self.rankings: list[Any] = list(range(len(next(iter(masks.values()))))) if shared else [slice(None)]

    @staticmethod
    def mask_path(path: Path) -> Path:
        """Where the masks of the weight at ``path`` are."""
        return (*path[:-1], "masks")

    def masks(self, update: Update) -> dict[Path, Tensor]:
        """The masks themselves, each ``(N, *shape)``."""
        params = update.state.get("params")
        return {path: params.get(self.mask_path(path)) for path in self.paths}

    def weights(self, update: Update) -> dict[Path, Tensor]:
        """The weights themselves: ``(*shape)`` under N masks, or ``(N, *shape)``, a mask each."""
        params = update.state.get("params")
        return {path: params.get(path) for path in self.paths}

    def moments(self, update: Update) -> dict[Path, list[Tensor]]:
        """Adam's moments of the weights."""
        groups = update.state.get(("optim", self.step.name)).values()
        found: dict[Path, list[Tensor]] = {path: [] for path in self.paths}
        for group in groups:
            for moment in MOMENTS:
                for path in self.paths:
                    value = group.get((moment, *path), None)
                    if value is not None:
                        found[path].append(value)
        return found


def masked_networks(update: Update) -> list[MaskedNetwork]:
    """The networks that a loss trains and whose layers have masks; a ``ValueError`` where there is none."""
    keys = set(update.state.get("params").keys(True, True))
    trained = {name for step in update.steps.values() for name in step.trains}
    found: dict[str, list[Path]] = {}
    for key in keys:
        path = (*key[:-1], "weight")
        if key[-1] == "masks" and key[0] in trained and path in keys:
            found.setdefault(key[0], []).append(path)
    if not found:
        raise ValueError(
            "no network of the loss has weights with masks: build it of MaskedMLP, or of EnsembleMLP with a sparsity."
        )
    return [MaskedNetwork(update, group, sorted(paths, key=_place)) for group, paths in sorted(found.items())]


def mask_statistics(
    networks: Sequence[MaskedNetwork], before: Sequence[Mapping[Path, Tensor]], after: Sequence[Mapping[Path, Tensor]]
) -> dict[str, float]:
    """What is logged of a change of masks; numbers of layers and units are summed over the subnetworks.

    Args:
        networks (sequence of MaskedNetwork): all of a loss.
        before, after (sequence of mapping): the masks of each.

    Returns:
        dict: ``masks/overlap`` (Jaccard) and ``masks/density`` over everything; ``masks/layers_without_weights`` and
        ``masks/units_without_inputs``; ``masks/density_critic_0`` and so on, of each layer; and, where one weight tensor has N
        masks, ``masks/overlap_subnets``, the mean overlap of two of them.
    """
    was, now = ({".".join(path): mask for each in masks for path, mask in each.items()} for masks in (before, after))
    kept, total = (sum(int(each(mask)) for mask in now.values()) for each in (torch.sum, torch.numel))
    units = [mask.flatten(2).any(-1) for mask in now.values()]  # (N, out) of each layer: whether it has an input
    metrics = {
        "masks/overlap": mask_overlap(was, now),
        "masks/density": kept / total,
        "masks/layers_without_weights": float(sum(int((~layer.any(-1)).sum()) for layer in units)),
        "masks/units_without_inputs": float(sum(int((~layer).sum()) for layer in units)),
    }
    overlaps = []
    for network, masks in zip(networks, after, strict=True):
        for i, mask in enumerate(masks.values()):
            metrics[f"masks/density_{network.role}_{i}"] = mask.sum().item() / mask.numel()
        if (count := len(network.rankings)) > 1:
            pairs = mask_iou(torch.cat([mask.flatten(1) for mask in masks.values()], 1))
            overlaps.append((pairs.sum().item() - count) / (count * (count - 1)))
    return metrics | ({"masks/overlap_subnets": sum(overlaps) / len(overlaps)} if overlaps else {})


def _place(path: Path) -> list[tuple[int, str]]:
    """Of a layer in its network: the tenth comes after the ninth."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path]
