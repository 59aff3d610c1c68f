r"""Masks that follow the weights, between updates: DAPD, RigL, SET, and masks that stay, as settings of one schedule.

What scores a weight and which weights are kept is in :mod:`omnet_torchrl.topology`; here it is done to the networks of a loss.
Masks are live (:mod:`omnet_torchrl.layers.masked`): what is written into them counts from the next call on, in the online
network, its target, the acting policy and the compiled update, which is not compiled again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import grad

from omnet_torchrl.topology import (
    cosine_decay,
    drop_and_grow,
    erdos_renyi_densities,
    global_top_k,
    layer_top_k,
    mask_overlap,
    moving_average,
    saliency,
    uniform_densities,
)
from omnet_torchrl.updates.masked_networks import MaskedNetwork, Path, masked_networks
from omnet_torchrl.updates.update import Update

METHODS = ("saliency", "rigl", "set", "static")
LAYERS = ("global", "erk", "uniform")


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
        end (int or None): no change after this frame; where RigL's and SET's share has decayed to 0. ``None``: no end, and no
            decay. Defaults to ``None``.
        fraction (float): share of the weights that RigL and SET replace at first. Defaults to 0.5.
        average_decay (float): of the moving average of the scores of saliency, in [0, 1). Defaults to 0, the newest alone.
        freeze_overlap (float or None): masks stay from the change on that leaves this overlap (Jaccard) with those before.
        freeze_return (float or None): masks stay from the evaluation on that is above this return (DAPD's threshold).
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

    def __init__(
        self,
        update: Update,
        *,
        density: float,
        method: str = "saliency",
        layers: str | None = None,
        interval: int = 1_000,
        end: int | None = None,
        fraction: float = 0.5,
        average_decay: float = 0.0,
        freeze_overlap: float | None = None,
        freeze_return: float | None = None,
        grown_weights: str = "kept",
        reset_moments: bool = True,
        seed: int = 0,
    ):
        layers = layers or ("global" if method == "saliency" else "erk")
        for name, value, known in (("method", method, METHODS), ("layers", layers, LAYERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
        if grown_weights not in ("kept", "zero"):
            raise ValueError(f"grown_weights must be 'kept' or 'zero', got {grown_weights!r}.")
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}.")
        if interval < 1 or (end is not None and end < 1):
            raise ValueError(f"interval and end must be at least 1, got {interval} and {end}.")
        self.update, self.density, self.method, self.layers = update, density, method, layers
        self.interval, self.end, self.fraction, self.average_decay = interval, end, fraction, average_decay
        self.freeze_overlap, self.freeze_return = freeze_overlap, freeze_return
        self.grown_weights, self.reset_moments, self.seed = grown_weights, reset_moments, seed
        self.frozen_at: int | None = None
        self._last: int | None = None  # the frame of the newest change
        self._average: dict[str, dict[str, Tensor]] = {}
        self._networks = masked_networks(update)
        if method != "saliency":
            self._begin()

    @torch.no_grad()
    def step(self, batch: TensorDictBase, frames: int, *, evaluation: float | None = None) -> dict[str, float]:
        """Change the masks, if ``interval`` frames have passed since the last change and they are not frozen.

        Args:
            batch (TensorDictBase): ``(B,)`` transitions, or ``(U, B)``, of which the last are taken; only read by saliency and
                RigL.
            frames (int): collected so far.

        Keyword Args:
            evaluation (float or None): the newest mean return, for ``freeze_return``.

        Returns:
            dict: empty where nothing was due; else, over all masked layers, ``masks/overlap``, of the masks with those before,
            ``masks/density``, and ``masks/units_without_inputs``, how many units of a subnetwork are constants. A layer that
            keeps no weight at all is a warning.
        """
        if evaluation is not None and self.freeze_return is not None and evaluation > self.freeze_return:
            self._freeze(frames)
        passed = self._last is None or frames // self.interval > self._last // self.interval
        if self.method == "static" or self.frozen_at is not None or not passed or frames > (self.end or frames):
            return {}
        first, self._last = self._last is None, frames
        batch = batch[-1] if batch.ndim == 2 else batch
        # All networks are scored before the masks of any of them change.
        changed = [self._changed(network, network.masks(self.update), batch, frames) for network in self._networks]
        before, after = dict[str, Tensor](), dict[str, Tensor]()
        for network, new in zip(self._networks, changed, strict=True):
            old = network.masks(self.update)
            before |= {".".join(path): mask.clone() for path, mask in old.items()}
            after |= {".".join(path): mask for path, mask in new.items()}
            self._write(network, old, new)
        overlap = mask_overlap(before, after)
        if self.freeze_overlap is not None and not first and overlap >= self.freeze_overlap:
            self._freeze(frames)
        kept, total = (sum(int(each(mask)) for mask in after.values()) for each in (torch.sum, torch.numel))
        dead = sum(int((~mask.any(-1)).sum()) for mask in after.values())
        return {"masks/overlap": overlap, "masks/density": kept / total, "masks/units_without_inputs": float(dead)}

    def _changed(self, network: MaskedNetwork, old: Mapping[Path, Tensor], batch: Any, frames: int) -> dict[Path, Tensor]:
        """The new masks of a network."""
        new = {path: mask.clone() for path, mask in old.items()}
        for k in network.rankings:
            masks = {path: mask[k] for path, mask in old.items()}
            weights = network.weights(self.update)
            if self.method == "saliency":
                chosen = self._most_salient(network, k, weights, batch, frames)
            else:
                grow = None
                if self.method == "rigl":
                    grow = {path: g.abs() for path, g in self._gradients(network, k, masks, batch, frames).items()}
                chosen = self._replaced(k, masks, weights, grow, frames)
            for path, mask in chosen.items():
                new[path][k] = mask
        return new

    def _most_salient(
        self, network: MaskedNetwork, k: Any, weights: Mapping[Path, Tensor], batch: Any, frames: int
    ) -> dict[Path, Tensor]:
        gradients = self._gradients(network, k, None, batch, frames)
        names = {".".join(path): path for path in weights}
        scores = saliency(*({".".join(path): value for path, value in each.items()} for each in (weights, gradients)))
        place = f"{network.group}/{k if isinstance(k, int) else 'all'}"
        scores = self._average[place] = moving_average(self._average.get(place), scores, self.average_decay)
        if self.layers == "global":
            masks = global_top_k(scores, self.density)
        else:  # each of several separate networks by itself
            separate, densities = not isinstance(k, int), self._densities(scores)
            count = len(next(iter(scores.values()))) if separate else 1
            each = [{name: score[i] if separate else score for name, score in scores.items()} for i in range(count)]
            parts = [layer_top_k(own, densities) for own in each]
            masks = {name: torch.stack([part[name] for part in parts]) if separate else parts[0][name] for name in scores}
        return {names[name]: mask for name, mask in masks.items()}

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
            layers = mask if mask.ndim == 3 else mask.unsqueeze(0)
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
        """The loss's gradient with respect to the weights as they enter the network, those outside the masks too.

        With ``masks``, at the masked network; without, at the dense one. The target network is masked as the online one.
        """
        update, device = self.update, self.update.device
        params, loss = update.state.get("params"), update.loss
        generator = torch.Generator(device).manual_seed(_seed(self.seed, frames, network.group))
        batch = batch.to(device)
        draws = loss.draw(batch, generator)
        count = next(iter(network.masks(update).values())).shape[0]
        asked = torch.tensor([k], device=device) if isinstance(k, int) else torch.arange(count, device=device)
        if network.draw == "critic":
            draws.set("critic", asked)
            if isinstance(k, int):  # under one mask, the target too
                draws.set("target", asked.expand(draws.get("target").shape))
        elif isinstance(k, int):
            draws.set(network.draw, asked.squeeze(0))
        compute = network.step.objective
        assert compute is not None  # of a step that trains a network
        ones = {path: torch.ones_like(mask) for path, mask in network.masks(update).items()}
        replaced = {network.mask_path(path): one for path, one in ones.items()}
        weights = dict(network.weights(update))
        for path, mask in (masks or {}).items():
            weights[path] = weights[path] * mask
            target = (f"target_{path[0]}", *path[1:])
            if target in params.keys(True, True):
                replaced[target] = params.get(target) * mask

        def objective(weights: dict[Path, Tensor]) -> Tensor:
            return compute(batch, draws, params.copy().update(TensorDict({**replaced, **weights})))[0]

        return grad(objective)(weights)

    def _densities(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        rule = erdos_renyi_densities if self.layers == "erk" else uniform_densities
        layers = {name: score[0] if score.ndim == 3 else score for name, score in scores.items()}
        return rule(layers, self.density)

    @torch.no_grad()
    def _begin(self) -> None:
        """Random masks, as many weights in each layer as the rule says."""
        generator = torch.Generator().manual_seed(self.seed)
        for network in self._networks:
            old = network.masks(self.update)
            densities = self._densities({".".join(path): mask for path, mask in old.items()})
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
        weights = network.weights(self.update)
        moments = network.moments(self.update)
        empty = [".".join(path[1:-1]) for path, mask in new.items() if not mask.flatten(1).any(1).all()]
        if empty:
            warnings.warn(
                f"{len(empty)} layer{'s' * (len(empty) > 1)} of {network.group} ({', '.join(empty)}) keep no weight of a "
                f"subnetwork, whose output is constant: raise density={self.density}, or share it out with layers='erk'.",
                stacklevel=3,
            )
        for path, mask in new.items():
            shared = weights[path].ndim < mask.ndim  # one weight under several masks sleeps where none has it
            was, now = (each.any(0) if shared else each for each in (old[path], mask))
            if self.grown_weights == "zero":
                weights[path].masked_fill_(now & ~was, 0.0)
            for moment in moments[path] if self.reset_moments else ():
                moment.masked_fill_(~now, 0.0)
            old[path].copy_(mask)

    def _freeze(self, frames: int) -> None:
        if self.frozen_at is None:
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
