"""What a run is judged by: pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def value_disagreement(value: Tensor) -> Tensor:
    """How far the subnetworks of a critic are apart: standard deviation over them, mean over the batch.

    Args:
        value (Tensor): ``(N, *batch)``, one value per subnetwork.

    Returns:
        Tensor: ``()``, in units of the value; 0 for one subnetwork.
    """
    return value.std(0, correction=0).mean()


def action_disagreement(action: Tensor) -> Tensor:
    """How far the subnetworks of an actor are apart: mean Euclidean distance between the actions of two different ones.

    Args:
        action (Tensor): ``(N, *batch, action_dim)``, one action per subnetwork for the same observations.

    Returns:
        Tensor: ``()``, in units of the action; 0 for one subnetwork.
    """
    num = action.shape[0]
    if num == 1:
        return action.new_zeros(())
    rows = action.reshape(num, -1, action.shape[-1]).transpose(0, 1)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum((-1, -2)).mean() / (num * (num - 1))


def sac_flops(
    observation_dim: int,
    action_dim: int,
    num_cells: Sequence[int] = (256, 256),
    *,
    num_online: int = 1,
    num_target: int = 2,
    num_value: int = 5,
    policy_update_delay: int = 20,
    batch_size: int = 256,
) -> float:
    r"""Training FLOPs of one critic update with its share of the actor's, by the convention of the paper's figure 3.

    :math:`2B\,[A + n_\text{target} C + 3 n_\text{online} C + (3A + 2 n_\text{value} C) / p]`: a multiply-add is two operations,
    a training pass three forward passes, and the actor differentiates through critics that are not trained (two). Matrix
    products only, counted dense: masked weights cost what the others do.

    Args:
        observation_dim, action_dim (int): sizes of observation and action.
        num_cells (sequence of int): hidden units of actor A and critic C; with masks over units, those that are kept.

    Keyword Args:
        num_online (int): critics trained in an update. Defaults to 1, OMNet's; 10 for REDQ, 2 for SAC and DroQ.
        num_target (int): critics in the target. Defaults to 2.
        num_value (int): critics that the actor is trained against. Defaults to 5; 10 for REDQ, 2 for SAC and DroQ.
        policy_update_delay (int): critic updates per actor update, p. Defaults to 20.
        batch_size (int): B.

    Examples:
        >>> round(sac_flops(11, 3) / 1e6, 1)  # OMNet on Hopper
        236.5
        >>> round(sac_flops(11, 3, num_online=10, num_value=10) / 1e6, 1)  # REDQ
        1213.3
    """

    def forward(*sizes: int) -> int:
        return sum(before * after for before, after in pairwise(sizes))

    actor = forward(observation_dim, *num_cells, 2 * action_dim)
    critic = forward(observation_dim + action_dim, *num_cells, 1)
    delayed = (3 * actor + 2 * num_value * critic) / policy_update_delay
    return 2 * batch_size * (actor + num_target * critic + 3 * num_online * critic + delayed)
