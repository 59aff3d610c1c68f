r"""Masks that follow the weights, between updates: DAPD, RigL, SET, and masks that stay, as settings of one schedule.

What scores a weight and which weights are kept is in :mod:`omnet_torchrl.topology`; here it is done to the networks of a loss.
Masks are live (:mod:`omnet_torchrl.layers.masked`): what is written into them counts from the next call on, in the online
network, its target, the acting policy and the compiled update, which is not compiled again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from omnet_torchrl.arguments import suggesting
from omnet_torchrl.masks import empty_subnets
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.topology import (
    cosine_decay,
    drop_and_grow,
    erdos_renyi_densities,
    global_top_k,
    layer_top_k,
    moving_average,
    saliency,
    uniform_densities,
)
from omnet_torchrl.updates.mask_scores import loss_gradients
from omnet_torchrl.updates.masked_networks import MaskedNetwork, Path, mask_statistics, masked_networks
from omnet_torchrl.updates.update import Update

CHOICES = {
    "method": ("saliency", "rigl", "set", "static"),
    "layers": ("global", "erk", "uniform"),
    "scored_under": ("dense", "own"),
    "scored_by": ("critic", "both"),
    "grown_weights": ("kept", "zero"),
}


class MaskSchedule:
    r"""Changes the masks of an update's networks, at an interval of frames.

    =============  ============================================================================================================
    method         masks
    =============  ============================================================================================================
    ``saliency``   DAPD: the weights of the largest :math:`|\theta\,\partial L/\partial\theta|` of the dense network, until
                   they are frozen
    ``rigl``       RigL: the smallest weights leave, those of the largest gradient come
    ``set``        SET: the smallest weights leave, random ones come
    ``static``     random ones, which stay
    =============  ============================================================================================================

    The networks are those whose layers have masks: one weight tensor under N masks (OMNet), of which each follows its own
    scores, or N separate networks under a mask each (:class:`~omnet_torchrl.EnsembleMLP` with ``sparsity``), which are ranked
    together. Actor and critic are ranked apart. Masks of biases are left alone.

    Args:
        update (Update): whose loss is scored, and whose masks and moments are changed in place.
        density (float): fraction of the weights that each subnetwork keeps, in (0, 1].

    Keyword Args:
        method (str): see above. Defaults to ``"saliency"``.
        layers (str): ``"global"``: one ranking of all layers (DAPD's); or how many weights each layer keeps: ``"erk"`` (the
            Erdos-Renyi-Kernel rule) or ``"uniform"``. ``None`` (default): ``"global"`` with saliency, else ``"erk"``.
        interval (int): frames between two changes. Defaults to 1,000.
        warm_up_frames (int): no freeze rule counts before this frame. Defaults to 0.
        end (int or None): no change after this frame; where RigL's and SET's share has decayed to 0. ``None``: no end, and no
            decay. Defaults to ``None``.
        fraction (float): share of the weights that RigL and SET replace at first. Defaults to 0.5.
        average_decay (float): of the moving average of the scores of saliency, in [0, 1). Defaults to 0, the newest alone.
        freeze_overlap (float or None): masks stay from the change on that leaves this overlap (Jaccard) with those before.
        freeze_return (float or None): masks stay from the evaluation on that is above this return (DAPD's threshold).
        scored_under (str): the network that saliency scores: without masks (``"dense"``, default; DAPD's), where N masks over
            one weight tensor become one, or under the masks that it has (``"own"``).
        scored_by (str): whose loss scores the critic: its own (``"critic"``, default), or the sum of its own and the actor's
            (``"both"``, as DAPD's released code).
        grown_weights (str): a weight that comes has the value that it had (``"kept"``, default; DAPD's) or 0 (``"zero"``,
            RigL's).
        reset_moments (bool): set Adam's moments of weights in no mask to 0, so that they do not move. Defaults to ``True``.
        seed (int): of random masks and of the draws with which the loss is scored. Defaults to 0.

    Attributes:
        frozen_at (int or None): the frame at which the masks were frozen.

    Raises:
        ValueError: options out of range; no network has masks.

    Examples:
        >>> from torchrl.data import Bounded, Unbounded
        >>> from omnet_torchrl import EnsembleMLP, OMNetSACLoss, make_actor, make_qvalue
        >>> specs = Unbounded(11), Bounded(-1, 1, (3,))
        >>> qvalue = make_qvalue(*specs, network_class=EnsembleMLP, num_subnets=2, sparsity=0.0)
        >>> actor = make_actor(*specs, num_subnets=1, sparsity=0.0)
        >>> update = Update(OMNetSACLoss(actor, qvalue, num_trained_subnets=None), lr=1e-3)
        >>> schedule = MaskSchedule(update, density=0.05, freeze_overlap=0.8)
        >>> for frames, batch in training:  # doctest: +SKIP
        ...     metrics = update(batch)
        ...     metrics |= schedule.step(batch, frames)
    """

    @suggesting
    def __init__(
        self,
        update: Update,
        *,
        density: float,
        method: str = "saliency",
        layers: str | None = None,
        interval: int = 1_000,
        warm_up_frames: int = 0,
        end: int | None = None,
        fraction: float = 0.5,
        average_decay: float = 0.0,
        freeze_overlap: float | None = None,
        freeze_return: float | None = None,
        scored_under: str = "dense",
        scored_by: str = "critic",
        grown_weights: str = "kept",
        reset_moments: bool = True,
        seed: int = 0,
    ):
        if not isinstance(update, Update):
            raise TypeError(
                f"update must be an Update, got {type(update).__name__}: of a loss, MaskSchedule(Update(loss), ...)."
            )
        layers = layers or ("global" if method == "saliency" else "erk")
        given = {"method": method, "layers": layers, "scored_under": scored_under, "scored_by": scored_by}
        for name, value in {**given, "grown_weights": grown_weights}.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}.")
        if layers == "global" and method != "saliency":
            raise ValueError(f"layers must be 'erk' or 'uniform' with method={method!r}, whose layers keep their densities.")
        if scored_by == "both" and not isinstance(update.loss, OMNetSACLoss):
            raise ValueError(f"scored_by must be 'critic' but with OMNetSACLoss, got 'both' with {type(update.loss).__name__}.")
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}.")
        if interval < 1 or (end is not None and end < 1):
            raise ValueError(f"interval and end must be at least 1, got {interval} and {end}.")
        self.update, self.density, self.method, self.layers = update, density, method, layers
        self.interval, self.end, self.fraction, self.average_decay = interval, end, fraction, average_decay
        self.warm_up_frames, self.freeze_overlap, self.freeze_return = warm_up_frames, freeze_overlap, freeze_return
        self.scored_under, self.scored_by, self._warned = scored_under, scored_by, False
        self.grown_weights, self.reset_moments, self.seed = grown_weights, reset_moments, seed
        self.frozen_at: int | None = None
        self._last: int | None = None  # the frame of the newest change
        self._average: dict[str, dict[str, Tensor]] = {}
        self._networks = masked_networks(update)
        if method != "saliency":
            self._begin()

    def due(self, frames: int) -> bool:
        """Whether :meth:`step` changes the masks at this frame, unless a freeze rule is met before."""
        last = self._last
        passed = last is None or (self.method != "static" and frames // self.interval > last // self.interval)
        return passed and self.frozen_at is None and frames <= (self.end or frames)

    @torch.no_grad()
    def step(
        self, batch: TensorDictBase | Callable[[], TensorDictBase], frames: int, *, evaluation: float | None = None
    ) -> dict[str, float]:
        """Change the masks, if ``interval`` frames have passed since the last change and they are not frozen.

        Args:
            batch (TensorDictBase or callable): ``(B,)`` transitions, or ``(U, B)``, of which the last are taken; or what
                returns them, called where they are needed. Only saliency and RigL read them. Where the loss has
                ``choose="batch"``, ``(T, B)`` with a row of each task, or ``(U, T, B)``: a mask follows its own task's.
            frames (int): collected so far; on a dataset, updates made so far: one call before the first of them chooses the
                masks in a single shot, a call after each lets them follow, every ``interval`` updates until ``end``.

        Keyword Args:
            evaluation (float or None): the newest mean return, for ``freeze_return``.

        Returns:
            dict: empty where nothing was due; else, over all masked layers, ``masks/overlap`` with the masks before, where
            there were some, and the densities and counts of ``masks/*``. The first layer or unit that keeps no weight at all is
            a warning. Static masks are counted once.

        Raises:
            ValueError: a score is not finite.
        """
        if evaluation is not None and self.freeze_return is not None and evaluation > self.freeze_return:
            self._freeze(frames)
        if not self.due(frames):
            return {}
        first, self._last = self._last is None, frames
        if self.method in ("saliency", "rigl"):
            batch = batch if isinstance(batch, TensorDictBase) else batch()
            batch = batch[-1] if batch.ndim > self.update.loss.batch_dims else batch
        # All networks are scored before the masks of any of them change.
        changed = [self._changed(network, network.masks(self.update), batch, frames) for network in self._networks]
        before = [{path: mask.clone() for path, mask in each.masks(self.update).items()} for each in self._networks]
        for network, new in zip(self._networks, changed, strict=True):
            self._write(network, network.masks(self.update), new)
        metrics = mask_statistics(self._networks, before, changed)
        if first and self.method == "saliency":
            del metrics["masks/overlap"]
        elif self.freeze_overlap is not None and metrics["masks/overlap"] >= self.freeze_overlap and not first:
            self._freeze(frames)
        self._warn(metrics, changed)
        return metrics

    def _changed(self, network: MaskedNetwork, old: Mapping[Path, Tensor], batch: Any, frames: int) -> dict[Path, Tensor]:
        """The new masks of a network."""
        new = {path: mask.clone() for path, mask in old.items()}
        for k in network.rankings if self.method != "static" else ():
            masks = {path: mask[k] for path, mask in old.items()}
            weights = network.weights(self.update)
            if self.method == "saliency":
                chosen = self._most_salient(network, k, weights, masks if self.scored_under == "own" else None, batch, frames)
            else:
                grow = None
                if self.method == "rigl":
                    grow = {path: g.abs() for path, g in self._gradients(network, k, masks, batch, frames).items()}
                chosen = self._replaced(k, masks, weights, grow, frames)
            for path, mask in chosen.items():
                new[path][k] = mask
        return new

    def _most_salient(
        self,
        network: MaskedNetwork,
        k: Any,
        weights: Mapping[Path, Tensor],
        masks: Mapping[Path, Tensor] | None,
        batch: Any,
        frames: int,
    ) -> dict[Path, Tensor]:
        gradients = self._gradients(network, k, masks, batch, frames)
        names = {".".join(path): path for path in weights}
        scores = saliency(*({".".join(path): value for path, value in each.items()} for each in (weights, gradients)))
        place = f"{network.group}/{k if isinstance(k, int) else 'all'}"
        scores = self._average[place] = moving_average(self._average.get(place), scores, self.average_decay)
        if self.layers == "global":
            chosen = global_top_k(scores, self.density)
        else:  # each of several separate networks by itself
            separate = not isinstance(k, int)
            densities = self._densities({name: score[0] if separate else score for name, score in scores.items()})
            count = len(next(iter(scores.values()))) if separate else 1
            each = [{name: score[i] if separate else score for name, score in scores.items()} for i in range(count)]
            parts = [layer_top_k(own, densities) for own in each]
            chosen = {name: torch.stack([part[name] for part in parts]) if separate else parts[0][name] for name in scores}
        return {names[name]: mask for name, mask in chosen.items()}

    def _replaced(
        self,
        k: Any,
        masks: Mapping[Path, Tensor],
        weights: Mapping[Path, Tensor],
        grow: Mapping[Path, Tensor] | None,
        frames: int,
    ) -> dict[Path, Tensor]:
        """RigL's and SET's change: each layer, of each network, keeps as many weights as it has."""
        fraction = cosine_decay(frames, self.end, self.fraction) if self.end else self.fraction
        changed = {}
        for path, mask in masks.items():
            layers = mask.unsqueeze(0) if isinstance(k, int) else mask
            parts = []
            for i, layer in enumerate(layers):
                keep = weights[path].view(layers.shape)[i].abs()
                scores = None if grow is None else grow[path].view(layers.shape)[i]
                seed = _seed(self.seed, frames, path, k, i)
                parts.append(drop_and_grow(layer, fraction, keep=keep, grow=scores, generator=seed))
            changed[path] = torch.stack(parts).view(mask.shape)
        return changed

    def _gradients(
        self, network: MaskedNetwork, k: Any, masks: Mapping[Path, Tensor] | None, batch: Any, frames: int
    ) -> dict[Path, Tensor]:
        generator = torch.Generator(self.update.device).manual_seed(_seed(self.seed, frames, network.group))
        return loss_gradients(self.update, network, k, masks, batch, generator, actors_too=self.scored_by == "both")

    def _densities(self, layers: Mapping[str, Tensor]) -> dict[str, float]:
        return (erdos_renyi_densities if self.layers == "erk" else uniform_densities)(layers, self.density)

    @torch.no_grad()
    def _begin(self) -> None:
        """Random masks, as many weights in each layer as the rule says."""
        generator = torch.Generator().manual_seed(self.seed)
        for network in self._networks:
            old = network.masks(self.update)
            densities = self._densities({".".join(path): mask[0] for path, mask in old.items()})
            new = {}
            for path, mask in old.items():
                layers = []
                for layer in mask:
                    scores = {"layer": torch.rand(layer.shape, generator=generator, dtype=torch.float64)}
                    layers.append(layer_top_k(scores, {"layer": densities[".".join(path)]})["layer"])
                new[path] = torch.stack(layers).to(mask.device)
            self._write(network, old, new)

    def _write(self, network: MaskedNetwork, old: Mapping[Path, Tensor], new: Mapping[Path, Tensor]) -> None:
        """Put new masks in the place of the old ones, and do to weights and moments what the options say."""
        weights, moments = network.weights(self.update), network.moments(self.update)
        for path, mask in new.items():
            shared = weights[path].ndim < mask.ndim  # one weight under several masks sleeps where none has it
            was, now = (each.any(0) if shared else each for each in (old[path], mask))
            if self.grown_weights == "zero":
                weights[path].masked_fill_(now & ~was, 0.0)
            for moment in moments[path] if self.reset_moments else ():
                moment.masked_fill_(~now, 0.0)
            old[path].copy_(mask)

    def _warn(self, metrics: Mapping[str, float], changed: list[dict[Path, Tensor]]) -> None:
        layers, units = (int(metrics[f"masks/{what}"]) for what in ("layers_without_weights", "units_without_inputs"))
        if (layers or units) and not self._warned:
            self._warned = True
            found = ((path, empty_subnets(mask)) for each in changed for path, mask in each.items())
            which = "".join(f", {'.'.join(path[:-1])} of the subnetworks {empty}" for path, empty in found if empty)
            warnings.warn(
                f"{layers} layer{'s' * (layers != 1)} and {units} units of the subnetworks keep no weight and are "
                f"constants{which}: raise density={self.density:g}, or share it out with layers='erk'.",
                stacklevel=3,
            )

    def _freeze(self, frames: int) -> None:
        if self.frozen_at is None and frames >= self.warm_up_frames:
            self.frozen_at = frames

    def state_dict(self) -> dict[str, Any]:
        """What the changes to come depend on, beside the networks: averages of scores, the last change, whether frozen."""
        average = {place: dict(scores) for place, scores in self._average.items()}
        return {"average": average, "last": self._last, "frozen_at": self.frozen_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the masks are those of the loss's."""
        device = self.update.device
        self._average = {
            place: {name: score.to(device) for name, score in scores.items()} for place, scores in state["average"].items()
        }
        self._last, self.frozen_at = state["last"], state["frozen_at"]

    def __repr__(self) -> str:
        frozen = "" if self.frozen_at is None else f", frozen at frame {self.frozen_at:,}"
        return f"{type(self).__name__}({self.method}, density={self.density}, layers={self.layers}{frozen})"


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
