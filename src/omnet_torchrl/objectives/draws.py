"""What is random in an update, as data: indices of subnetworks, the noise of actions, seeds of dropout."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution
from torch.distributions.utils import _sum_rightmost
from torchrl.objectives.sac import compute_rsample_log_prob

from omnet_torchrl.objectives.networks import check_shape

# Who asks a network in an update; each has a seed of its own for the noise of dropout.
PASSES = ("critic", "target", "value", "next_actor", "actor")


def draw_indices(
    num: int,
    count: int,
    *,
    lead: tuple[int, ...] = (),
    replacement: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Uniform indices of subnetworks, ``(*lead, count)``, int64; without replacement in each row, unless told otherwise.

    One to choose from, or all of them, draws no random number.

    Args:
        num (int): indices are in ``[0, num)``.
        count (int): of a row; at most ``num``.

    Keyword Args:
        lead (tuple of int): so many rows. Defaults to ``()``, one.
        replacement (bool): indices of a row are independent. Defaults to ``False``.
        generator (torch.Generator or None): on ``device``. ``None``: torch's global generator.
        device (torch.device or None): of the indices.
    """
    if num == 1 or (count == num and not replacement):
        return torch.arange(count, device=device).expand(*lead, count)
    if count == 1 or replacement:
        return torch.randint(num, (*lead, count), generator=generator, device=device)
    if not lead:
        return torch.randperm(num, generator=generator, device=device)[:count]
    # The order of independent uniform numbers is a uniform permutation; ties of float64 are of no account.
    return torch.rand(*lead, num, generator=generator, device=device, dtype=torch.float64).argsort(-1)[..., :count]


def dropout_seed(draws: TensorDictBase, name: str) -> Tensor | None:
    """The seed of dropout's noise in a pass, one of ``PASSES``; ``None`` where there is no dropout."""
    seeds = draws.get("dropout", None)
    return None if seeds is None else seeds[..., PASSES.index(name)]


def rsample_with_noise(distribution: Distribution, noise: Tensor | None, key: NestedKey = "action") -> tuple[Tensor, Tensor]:
    """Sample with the given standard-normal noise, and score that very draw.

    Distributions that are no (transformed) diagonal Gaussian draw by themselves, from torch's global generator.
    """
    base, transforms = distribution, []
    if isinstance(distribution, TransformedDistribution):
        base, transforms = distribution.base_dist, distribution.transforms
    if noise is None or not (isinstance(base, Independent) and isinstance(base.base_dist, Normal)):
        return compute_rsample_log_prob(distribution)
    check_shape(key, noise, (*noise.shape[:-1], base.base_dist.loc.shape[-1]))  # it has the shape of the batch's action
    values = [base.base_dist.loc + noise.to(base.base_dist.loc.dtype) * base.base_dist.scale]
    for transform in transforms:
        values.append(transform(values[-1]))
    log_prob = base.log_prob(values[0])
    for transform, before, after in zip(transforms, values, values[1:], strict=False):
        jacobian = transform.log_abs_det_jacobian(before, after)
        log_prob = log_prob - _sum_rightmost(jacobian, jacobian.ndim - log_prob.ndim)
    return values[-1], log_prob
