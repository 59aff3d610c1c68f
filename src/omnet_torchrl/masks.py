r"""Mask families, and what a set of masks looks like.

OMNet (section 3.1 of "One is More: Diverse Perspectives within a Single Network for Efficient DRL", 2023,
https://arxiv.org/abs/2310.14009) keeps one weight tensor :math:`\theta` and :math:`N` binary masks :math:`m_k`; subnetwork
:math:`k` is :math:`\theta \odot m_k`. The masks are drawn once, independently, and frozen.

A mask is a boolean tensor (``True`` keeps the weight), so that it costs a byte per weight and can never be optimised or
averaged by accident. Kept weights are *not* rescaled by :math:`1/(1-S)`, as in the paper.

Masks may also lie over whole units (:func:`unit_masks`). Such a subnetwork can be sliced out, while the paper's
forward passes compute with the full weight matrix, a limitation that it names.

Everything here is a pure function. The networks of :mod:`~omnet_torchrl.layers` draw their masks from a generator of their own
(:func:`as_generator`), so that masking a network leaves its initial weights as they were.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

MaskFn = Callable[..., Tensor]
# A warning is given above this fraction of units without any input; a few among many do no harm.
MAX_DEAD = 0.01
_UINT32 = 2**32 - 1


def as_generator(generator: torch.Generator | int | None = None) -> torch.Generator:
    """Return a generator for the masks of one network.

    Args:
        generator (torch.Generator, int or None): a generator is returned as it is; an integer seeds a new one; ``None`` seeds
            a new one on the CPU from the state of torch's global generator, which is read but not advanced: runs with
            different global seeds get different masks, and nothing else in the run changes. Two networks get the same stream
            unless the generator advances in between, as initial weights on the CPU make it: on a GPU, give each a seed.
    """
    if isinstance(generator, torch.Generator):
        return generator
    if generator is None:
        with torch.random.fork_rng(devices=[]):
            generator = int(torch.randint(2**62, (), device="cpu"))
    if isinstance(generator, bool) or not isinstance(generator, Integral):  # NumPy's integers are
        raise TypeError(f"generator must be a torch.Generator, an int or None, got {generator!r}.")
    return torch.Generator(device="cpu").manual_seed(int(generator))


def bernoulli_masks(
    num_subnets: int,
    shape: Sequence[int],
    sparsity: float,
    *,
    generator: torch.Generator | int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw independent Bernoulli masks, :math:`m_k \sim \mathrm{Bernoulli}(1 - S)` (section 3.1 of the paper).

    Args:
        num_subnets (int): number of masks N, at least 1.
        shape (sequence of int): shape of the weight, e.g. ``(out_features, in_features)``.
        sparsity (float): fraction masked out S, in [0, 1). 0 keeps every weight.
        generator (torch.Generator, int or None): where the draw comes from; an integer seeds a new one. ``None``: torch's
            global generator, which advances.
        device (torch.device or None): where the masks go. They are drawn on the generator's device, so that they do not
            depend on it.

    Returns:
        Tensor: boolean, of shape ``(num_subnets, *shape)``.

    Raises:
        ValueError: ``num_subnets`` below 1, or ``sparsity`` outside [0, 1).

    Examples:
        >>> bernoulli_masks(5, (256, 17), 0.5, generator=0).shape
        torch.Size([5, 256, 17])
    """
    check_num_subnets(num_subnets)
    check_sparsity(sparsity)
    generator = torch.default_generator if generator is None else as_generator(generator)
    uniform = torch.rand((num_subnets, *shape), generator=generator, device=generator.device)
    return (uniform >= sparsity).to(device if device is not None else torch.get_default_device())


def unit_masks(
    num_subnets: int,
    num_units: int,
    sparsity: float,
    *,
    generator: torch.Generator | int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw independent masks over the units of a hidden layer, each a uniform choice of exactly k units.

    A subnetwork without some units is a smaller dense network; all have one shape, since each keeps equally many. Between two
    layers of sparsity S, :math:`(1-S)^2` of the weights are left: units at S 0.29 keep as many as Bernoulli masks at 0.5.

    Args:
        num_subnets (int): number of masks N, at least 1.
        num_units (int): units of the layer, at least 1.
        sparsity (float): fraction masked out S, in [0, 1): :math:`k = \max(1, \mathrm{round}(\text{num\_units}\,(1-S)))`.
        generator, device: see :func:`bernoulli_masks`.

    Returns:
        Tensor: boolean, of shape ``(num_subnets, num_units)``, with k times ``True`` in each row.

    Raises:
        ValueError: ``num_subnets`` or ``num_units`` below 1, or ``sparsity`` outside [0, 1).

    Examples:
        >>> unit_masks(5, 256, 0.5, generator=0).sum(-1)
        tensor([128, 128, 128, 128, 128])
    """
    check_num_subnets(num_subnets)
    check_sparsity(sparsity)
    if num_units < 1:
        raise ValueError(f"num_units must be at least 1, got {num_units}.")
    generator = torch.default_generator if generator is None else as_generator(generator)
    # The order of independent uniform numbers is a uniform permutation; ties of float64 are of no account.
    uniform = torch.rand(num_subnets, num_units, generator=generator, device=generator.device, dtype=torch.float64)
    kept = uniform.argsort(-1)[:, : kept_units(num_units, sparsity)]
    masks = torch.zeros_like(uniform, dtype=torch.bool).scatter(1, kept, True)
    return masks.to(device if device is not None else torch.get_default_device())


def kept_units(num_units: int, sparsity: float) -> int:
    """Return k, the number of units that each mask of :func:`unit_masks` keeps."""
    return max(1, round(num_units * (1 - sparsity)))


def hashed_masks(index: Tensor, shape: Sequence[int], sparsity: float, key: Tensor) -> Tensor:
    r"""Compute the Bernoulli masks of some of :math:`2^{31}` subnetworks, instead of storing all.

    A mask is a function of its index: a random one of so many indices names a mask that was never seen ("infinity", section
    4.6), and the same index always names the same mask.

    Args:
        index (Tensor): int64 in :math:`[0, 2^{31})`, ``(R,)``.
        shape (sequence of int): of the weight.
        sparsity (float): fraction masked out S, in [0, 1).
        key (Tensor): int64 in :math:`[0, 2^{32})`, ``()``; layers of different keys have independent masks.

    Returns:
        Tensor: boolean, ``(R, *shape)``.

    Examples:
        >>> hashed_masks(torch.tensor([3, 2_000_000_000]), (256, 17), 0.5, torch.tensor(7)).shape
        torch.Size([2, 256, 17])
    """
    check_sparsity(sparsity)
    return (random_bits(index, math.prod(shape), key) >= round(sparsity * 2**32)).unflatten(-1, tuple(shape))


def random_bits(seed: Tensor, size: int, key: Tensor | int = 0) -> Tensor:
    """Compute random 32-bit numbers as a function of a seed: the same eagerly, compiled, and on every device.

    Element i is a hash (Wellons' ``lowbias32``, https://github.com/skeeto/hash-prospector) of i plus a hash of seed and key.

    Args:
        seed, key (Tensor or int): int64 in :math:`[0, 2^{32})`, ``(*batch)`` and broadcasting.
        size (int): of the last dimension.

    Returns:
        Tensor: int64 in :math:`[0, 2^{32})`, ``(*batch, size)``.
    """
    # A view that changes nothing makes Inductor compute these few numbers once. Otherwise each ``x ^ (x >> k)`` doubles what it
    # inlines in the place of x, and nine of them take it minutes.
    start = _lowbias32(_lowbias32(seed) ^ key)
    start = start.as_strided(start.shape, start.stride())
    return _lowbias32((start.unsqueeze(-1) + torch.arange(size, device=seed.device)) & _UINT32)


def _lowbias32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _UINT32
    # Less 2^32, so that no product leaves int64.
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & _UINT32
    return x ^ (x >> 16)


def bernoulli_module_masks(
    network: nn.Module, num_subnets: int, sparsity: float, *, generator: torch.Generator | int | None = None
) -> dict[str, Tensor]:
    """Draw Bernoulli masks for the weights of any network, for :class:`~omnet_torchrl.SubnetModule`.

    Every parameter of two or more dimensions is masked (kernels of linear, convolution and recurrent layers); biases and the
    vectors of normalisation layers are not.

    Args:
        network (nn.Module): the network; it is only read.
        num_subnets, sparsity, generator: see :func:`bernoulli_masks`.

    Returns:
        dict: parameter name to boolean masks of shape ``(num_subnets, *parameter.shape)``.
    """
    generator = None if generator is None else as_generator(generator)
    return {
        name: bernoulli_masks(num_subnets, p.shape, sparsity, generator=generator, device=p.device)
        for name, p in network.named_parameters()
        if p.ndim > 1
    }


def mask_density(masks: Tensor) -> Tensor:
    r"""Fraction of weights that each subnetwork keeps. Bernoulli masks: :math:`1 - S` in expectation.

    Args:
        masks (Tensor): boolean, ``(N, *shape)``. For a whole network, concatenate its layers flattened to ``(N, -1)``.

    Returns:
        Tensor: float, ``(N,)``, in [0, 1].
    """
    return _flat(masks).mean(-1)


def mask_iou(masks: Tensor) -> Tensor:
    r"""Overlap of each pair of subnetworks, intersection over union of the weights they keep.

    Independent Bernoulli masks: two keep the same weight with probability :math:`(1-S)^2` and at least one keeps it with
    :math:`1-S^2`, so that the IoU of two different masks tends to :math:`(1-S)/(1+S)`; 1/3 at :math:`S = 0.5`.

    Args:
        masks (Tensor): boolean, ``(N, *shape)``.

    Returns:
        Tensor: float, ``(N, N)``, symmetric, in [0, 1], ones on the diagonal. Two empty masks overlap fully.
    """
    flat = _flat(masks, dtype=torch.float64)
    both = flat @ flat.T
    kept = flat.sum(-1)
    either = kept[:, None] + kept[None] - both
    return torch.where(either > 0, both / either.clamp_min(1), 1.0).float()


def unused_fraction(masks: Tensor) -> Tensor:
    r"""Fraction of weights that are in no subnetwork. Bernoulli masks: :math:`S^N`; 3.1 % at N 5, S 0.5.

    Args:
        masks (Tensor): boolean, ``(N, *shape)``.

    Returns:
        Tensor: float scalar in [0, 1].
    """
    return (~masks.flatten(1).any(0)).float().mean()


def shared_fraction(masks: Tensor) -> Tensor:
    r"""Fraction of weights that are in every subnetwork. Bernoulli masks: :math:`(1-S)^N`; 3.1 % at N 5, S 0.5.

    Args:
        masks (Tensor): boolean, ``(N, *shape)``.

    Returns:
        Tensor: float scalar in [0, 1].
    """
    return masks.flatten(1).all(0).float().mean()


def check_num_subnets(num_subnets: int) -> None:
    """Raise if ``num_subnets`` is not a positive integer."""
    if isinstance(num_subnets, bool) or not isinstance(num_subnets, int):
        raise TypeError(f"num_subnets must be an int, got {num_subnets!r}.")
    if num_subnets < 1:
        raise ValueError(f"num_subnets must be at least 1, got {num_subnets}.")


def check_sparsity(sparsity: float) -> None:
    """Raise if ``sparsity`` is no number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity must be a number in [0, 1), got {sparsity!r}.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity, the fraction of weights masked out, must be in [0, 1), got {sparsity}.")


def each_sparsity(sparsity: float | Sequence[float], count: int, layer: str) -> list[float]:
    """Return a sparsity for each of ``count`` layers, from one number or one per layer; raise at another number of them."""
    each = [sparsity] * count if isinstance(sparsity, float | int | str) else list(sparsity)
    if len(each) != count:
        raise ValueError(f"sparsity must be one number or one per {layer} ({count}), got {len(each)}.")
    return each


def check_masks(masks: Tensor, shape: Sequence[int], name: str = "masks") -> None:
    """Raise if ``masks`` is not boolean of shape ``(N, *shape)``; warn if a unit of a subnetwork has lost every input.

    A unit is an entry of the parameter's first dimension; the rest are its inputs. A unit without inputs is a constant.
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"{name} must be a boolean tensor (True keeps the weight), got {got}; compare or call .bool() first.")
    if masks.ndim == 0 or masks.shape[0] < 1 or masks.shape[1:] != torch.Size(shape):
        raise ValueError(
            f"{name} must have shape (num_subnets, {', '.join(map(str, shape))}), one mask of the parameter's shape for each "
            f"subnetwork, got {tuple(masks.shape)}."
        )
    if masks.ndim > 2 and masks.device.type != "meta":
        dead, empty = ~masks.flatten(2).any(-1), empty_subnets(masks)
        if empty or dead.sum() > MAX_DEAD * dead.numel():
            said = f" Of {name}, those of the subnetworks {empty} keep no weight at all." if empty else f" See {name}."
            warnings.warn(
                f"{int(dead.sum())} of {dead.numel()} units ({masks.shape[1]} units in each of {masks.shape[0]} subnetworks) "
                f"lose every one of their {masks[0, 0].numel()} inputs to the masks and are constant. Lower the sparsity of "
                f"this layer, or widen its input.{said}",
                stacklevel=3,
            )


def empty_subnets(masks: Tensor) -> list[int]:
    """Return the subnetworks, at most ten, whose mask of a layer, of ``masks (N, *shape)``, keeps no weight at all."""
    return (~masks.flatten(1).any(1)).nonzero()[:10].flatten().tolist()


def check_module_masks(masks: Mapping[str, Tensor], network: nn.Module) -> int:
    """Raise if ``masks`` do not fit the parameters of ``network``; return the number of subnetworks."""
    if not masks:
        raise ValueError("masks is empty: expected at least one parameter name with its masks, see bernoulli_module_masks.")
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"masks name the parameter {name!r}, the network has {sorted(parameters)}.")
        check_masks(mask, parameters[name].shape, f"masks[{name!r}]")
    sizes = {name: mask.shape[0] for name, mask in masks.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"every parameter must have masks for the same number of subnetworks, got {sizes}.")
    return next(iter(sizes.values()))


def _flat(masks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return masks.flatten(1).to(dtype)
