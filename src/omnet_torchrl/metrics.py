r"""What a run is judged by: pure functions on tensors.

They measure the disagreement of subnetworks, the value bias (section 4.2 of https://arxiv.org/abs/2310.14009, after REDQ,
2021, https://arxiv.org/abs/2101.05982), training FLOPs (figure 3) by the paper's convention and as PyTorch computes them,
parameters and masks in memory, where an agent has been (figure 6), and how far trajectories of subnetworks differ (figure 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn


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
    if action.ndim < 2:
        raise ValueError(f"action must have shape (N, *batch, action_dim), got {tuple(action.shape)}.")
    return _mean_distance(action.reshape(action.shape[0], -1, action.shape[-1]))


def trajectory_diversity(position: Tensor) -> Tensor:
    """How far the trajectories of an actor's subnetworks are apart: mean distance of two different ones at the same step.

    Two that follow the same path at different speeds count as different. Continue a trajectory that has ended with its last
    position, so that all have the same length; ``position[:, -1:]`` compares the ends alone.

    Args:
        position (Tensor): ``(N, T, dim)``, one trajectory per subnetwork, from one start.

    Returns:
        Tensor: ``()``, in units of the position; 0 for one subnetwork.
    """
    if position.ndim != 3:
        raise ValueError(f"position must have shape (N, T, dim), got {tuple(position.shape)}.")
    return _mean_distance(position)


def _mean_distance(points: Tensor) -> Tensor:
    """Return the mean Euclidean distance of points ``(N, M, dim)``, over the pairs of different n and over m."""
    num, count, _ = points.shape
    if num == 1:
        return points.new_zeros(())
    rows = points.transpose(0, 1)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum() / (count * num * (num - 1))


def soft_returns(
    reward: Tensor,
    log_prob: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    alpha: float | Tensor,
    gamma: float = 0.99,
    bootstrap: Tensor | None = None,
) -> Tensor:
    r"""Monte-Carlo estimate of the soft value of each state-action pair of on-policy episodes.

    :math:`G_t = r_t + \gamma\,(G_{t+1} - \alpha \log\pi(a_{t+1} \mid s_{t+1}))`: the entropy of an action belongs to the value
    of its state, not to the value of the action. Nothing follows a terminal state.

    An episode that is *truncated* would go on. Without ``bootstrap`` the return is cut there, as if nothing followed: d steps
    before the cut, it is too small by a factor of :math:`1 - \gamma^d` if rewards are steady. Then judge a critic by steps long
    before the cut, as REDQ's code does by the first 350 of 1,000. With ``bootstrap`` every step can be used, but the critic's
    own value of the last state enters the returns it is compared with, by a factor of :math:`\gamma^d`.

    Args:
        reward, log_prob (Tensor): ``(*batch, T)``, time last: of each step and of its action. TorchRL's rewards and ends are
            ``(*batch, T, 1)``: ``squeeze(-1)`` them. A sequence may hold several episodes, one after the other; its last
            step counts as truncated unless it is terminal.
        terminated, truncated (Tensor): boolean, ``(*batch, T)``: the step that ends an episode.

    Keyword Args:
        alpha (float or Tensor): temperature; 0 gives the returns without entropy.
        gamma (float): discount, in [0, 1]. Defaults to 0.99.
        bootstrap (Tensor or None): ``(*batch, T)``, the soft value :math:`Q(s_{t+1}, a') - \alpha \log\pi(a' \mid s_{t+1})` of
            the state after each step; read where an episode is truncated. ``None`` (default): cut.

    Returns:
        Tensor: ``(*batch, T)``.
    """
    _same_shape(reward=reward, log_prob=log_prob, terminated=terminated, truncated=truncated, bootstrap=bootstrap)
    if not reward.is_floating_point():
        raise TypeError(f"the reward must be floating point, got {reward.dtype}.")
    goes_on = ~(terminated | truncated)
    goes_on[..., -1] = False
    cut = torch.zeros_like(reward) if bootstrap is None else bootstrap.masked_fill(terminated, 0.0)
    returns = torch.empty_like(reward)
    following = torch.zeros_like(reward[..., 0])  # soft value of the state after the step
    for t in reversed(range(reward.shape[-1])):
        following = torch.where(goes_on[..., t], following, cut[..., t])
        returns[..., t] = reward[..., t] + gamma * following
        following = returns[..., t] - alpha * log_prob[..., t]
    return returns


def min_of_two(value: Tensor) -> Tensor:
    """The mean, over all pairs of different subnetworks, of the smaller value: the expected target of two random ones.

    Args:
        value (Tensor): ``(N, *batch)``. For one subnetwork, its value is returned.

    Returns:
        Tensor: ``(*batch,)``.
    """
    num = value.shape[0]
    if num == 1:
        return value[0]
    # In ascending order, the k-th value is the smaller one in its pairs with all that follow it.
    pairs = torch.arange(num - 1, -1, -1, device=value.device, dtype=value.dtype)
    return torch.tensordot(pairs, value.sort(0).values, 1) / (num * (num - 1) / 2)


def value_bias(value: Tensor, returns: Tensor) -> dict[str, Tensor]:
    r"""How far the critic is off: :math:`Q_\theta(s, a) - Q^\pi(s, a)` over visited pairs (figure 4).

    Args:
        value (Tensor): ``(N, *batch)``, of each subnetwork of the critic.
        returns (Tensor): ``(*batch,)``, :func:`soft_returns` of the same pairs.

    Returns:
        dict: 0-dimensional. ``bias/mean`` and ``bias/std`` over the pairs, Q being the mean over the subnetworks;
        ``bias/normalised_mean`` and ``bias/normalised_std``, the same over :math:`|\text{mean return}|`, as in REDQ's paper;
        ``bias/min_mean`` and ``bias/min_std``, Q being :func:`min_of_two`; ``bias/return``, the mean return.
    """
    if value.shape[1:] != returns.shape:
        raise ValueError(f"value must have shape (N, *{tuple(returns.shape)}), N and the returns', got {tuple(value.shape)}.")
    bias, low, scale = value.mean(0) - returns, min_of_two(value) - returns, returns.mean().abs()
    mean, std = bias.mean(), bias.std(correction=0)
    return {
        "bias/mean": mean,
        "bias/std": std,
        "bias/normalised_mean": mean / scale,
        "bias/normalised_std": std / scale,
        "bias/min_mean": low.mean(),
        "bias/min_std": low.std(correction=0),
        "bias/return": returns.mean(),
    }


def sac_flops(
    observation_dim: int,
    action_dim: int,
    num_cells: Sequence[int] = (256, 256),
    *,
    actor_cells: Sequence[int] | None = None,
    num_online: int = 1,
    num_target: int = 2,
    num_value: int = 5,
    policy_update_delay: int = 20,
    batch_size: int = 256,
    exact: bool = False,
) -> float:
    r"""Training FLOPs of one critic update with its share of the actor's, by the convention of the paper's figure 3 or exactly.

    :math:`2B\,[A + n_\text{target} C + 3 n_\text{online} C + (3A + 2 n_\text{value} C) / p]`: a multiply-add is two operations,
    a training pass three forward passes, and the actor differentiates through critics that are not trained (two). Matrix
    products only, counted dense: masked weights cost what the others do.

    The convention counts the gradient with respect to a trained network's input, which is not needed and which PyTorch does not
    compute. Exactly, :math:`C_1` and :math:`A_1` being the products of the first layers, a training pass of the critic costs
    :math:`3C - C_1` and the actor's :math:`3A - A_1`: what :class:`torch.utils.flop_counter.FlopCounterMode` counts.

    Args:
        observation_dim, action_dim (int): sizes of observation and action.
        num_cells (sequence of int): hidden units of actor A and critic C; with masks over units, those that are kept.

    Keyword Args:
        actor_cells (sequence of int or None): those of the actor, where they are others. Defaults to ``None``.
        num_online (int): critics trained in an update. Defaults to 1, OMNet's; 10 for REDQ, 2 for SAC and DroQ.
        num_target (int): critics in the target. Defaults to 2.
        num_value (int): critics that the actor is trained against. Defaults to 5; 10 for REDQ, 2 for SAC and DroQ.
        policy_update_delay (int): critic updates per actor update, p. Defaults to 20.
        batch_size (int), exact (bool): B; whether what is not computed is left out. Defaults to ``False``, the convention.

    Examples:
        >>> round(sac_flops(11, 3) / 1e6, 1)  # OMNet on Hopper
        236.5
        >>> round(sac_flops(11, 3, num_online=10, num_value=10) / 1e6, 1)  # REDQ
        1213.3
    """

    def products(*sizes: int) -> tuple[int, int]:
        each = [before * after for before, after in pairwise(sizes)]
        return sum(each), 3 * sum(each) - each[0] * exact

    actor, trained_actor = products(observation_dim, *(num_cells if actor_cells is None else actor_cells), 2 * action_dim)
    critic, trained_critic = products(observation_dim + action_dim, *num_cells, 1)
    delayed = (trained_actor + 2 * num_value * critic) / policy_update_delay
    return 2 * batch_size * (actor + num_target * critic + num_online * trained_critic + delayed)


def network_memory(network: nn.Module) -> dict[str, int]:
    """How many parameters a network has, and what it and its masks take in memory.

    Args:
        network (nn.Module): shared parameters count once. A loss's target network consists of buffers and is not counted.

    Returns:
        dict: ``parameters``, those that are trained; ``parameter_bytes``, of all parameters; ``mask_bytes``, of all boolean
        buffers, a byte per weight and subnetwork.
    """
    parameters = list(network.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "mask_bytes": sum(b.numel() for b in network.buffers() if b.dtype == torch.bool),
    }


def visitation(position: Tensor, bins: int = 30, low: float = 0.0, high: float = 1.0) -> Tensor:
    """How often an agent has been in each cell of a grid (appendix B.2, figure 6).

    Args:
        position (Tensor): ``(*batch, 2)``, x and y in [``low``, ``high``].
        bins (int): cells along x and along y. Defaults to 30.
        low, high (float): the sides of the square.

    Returns:
        Tensor: int64, ``(bins, bins)``, a row for each y and a column for each x, from ``low`` on; divided by its sum, the
        visit frequency.

    Raises:
        ValueError: positions of another shape, or outside the square.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    if position.ndim < 1 or position.shape[-1] != 2:
        raise ValueError(f"position must have shape (*batch, 2), x and y, got {tuple(position.shape)}.")
    position = position.reshape(-1, 2)
    if not ((position >= low) & (position <= high)).all():
        raise ValueError(f"position must be in [{low}, {high}], got {position.min():.6g} to {position.max():.6g}.")
    # A cell holds its lower edge; the last one also the upper.
    x, y = ((position - low) / (high - low) * bins).long().clamp_max(bins - 1).unbind(-1)
    return torch.bincount(y * bins + x, minlength=bins * bins).view(bins, bins)


def coverage(visits: Tensor, reachable: Tensor | None = None) -> Tensor:
    """The fraction of the cells that an agent has been in.

    Args:
        visits (Tensor): ``(*batch, bins, bins)``, see :func:`visitation`.
        reachable (Tensor or None): boolean, ``(bins, bins)``, the cells that count, e.g. of
            :meth:`~omnet_torchrl.Maze2DEnv.reachable`. ``None`` (default): all.

    Returns:
        Tensor: ``(*batch,)``, in [0, 1].
    """
    if reachable is not None and reachable.shape != visits.shape[-2:]:
        raise ValueError(f"reachable must have the grid's shape {tuple(visits.shape[-2:])}, got {tuple(reachable.shape)}.")
    visited = (visits > 0).flatten(-2).float()
    return visited.mean(-1) if reachable is None else visited[..., reachable.flatten()].mean(-1)


def _same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"expected tensors of one shape (*batch, T), got {shapes}; TorchRL's (*batch, T, 1) need squeeze(-1).")


MAX_COMPARED = 32  # subnetworks that a disagreement is over, where there are more


@torch.no_grad()
def subnet_disagreement(loss: Any, batch: TensorDictBase) -> dict[str, Tensor]:
    """How far the subnetworks of a loss are apart on a batch, without dropout.

    Args:
        loss (SubnetLoss): whose critic and, where there is one, actor are asked; of more than 32 subnetworks, the first 32.
        batch (TensorDictBase): ``(B,)``, with observation and action.

    Returns:
        dict: 0-dimensional: ``subnets/q_std``, of the values of the batch's actions, or, of a DQN, of all actions
        (:func:`value_disagreement`); with an actor, ``subnets/action_distance``, of the deterministic actions
        (:func:`action_disagreement`).
    """
    acts = loss.num_actor_subnets > 0
    action, critic = batch.get(loss.tensor_keys.action), loss.qvalue_network if acts else loss.value_network
    device, training = action.device, critic.training
    critic.eval()
    values = loss.value(batch, action if acts else None, torch.arange(min(loss.num_subnets, MAX_COMPARED), device=device))
    critic.train(training)
    metrics = {"subnets/q_std": value_disagreement(values)}
    if acts:
        count = min(loss.num_actor_subnets, MAX_COMPARED)
        every = torch.arange(count, device=device).view(-1, *(1 for _ in batch.batch_size))
        actions = loss.deterministic_action(batch, every).expand(count, *action.shape)
        metrics["subnets/action_distance"] = action_disagreement(actions)
    return metrics
