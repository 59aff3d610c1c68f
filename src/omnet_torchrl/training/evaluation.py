"""How good the policy is by now: deterministic episodes, one for each environment of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl.modules import SubnetActor
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.training.bias import evaluate_bias
from omnet_torchrl.training.environments import MAZE, make_env, seed_env
from omnet_torchrl.training.maze import subnet_trajectories, write_trajectories
from omnet_torchrl.training.options import TrainConfig

# Frames after the random ones: with one policy update per frame, the paper's gradient steps of the policy.
FIGURE_7 = (500, 4_800, 5_000, 6_000, 30_000)


def make_evaluation(config: TrainConfig, actor: SubnetActor, loss: OMNetSACLoss) -> Callable[[int], dict[str, float]]:
    """A run's evaluation, a function of the number of frames: returns and, where the options ask for it, the value bias.

    The same frames give the same start states, in every run of the seed. In the maze, ``trajectories.csv`` in the run's folder
    gets the ways of the actor's subnetworks at the frames of figure 7.
    """
    make = partial(make_env, config.env, observation_offset=config.observation_offset)
    env = make(num_envs=config.eval.episodes)
    bias_env = make(num_envs=config.eval.bias_episodes) if config.eval.bias_episodes else None

    def evaluation(frames: int) -> dict[str, float]:
        seed, policy_updates = config.seed + 1_000_000 + frames, frames - config.init_random_frames
        metrics = evaluate(actor, env, seed=seed)
        if config.env == MAZE and policy_updates in FIGURE_7:
            ways = Path(config.folder) / "trajectories.csv"
            write_trajectories(ways, config.seed, policy_updates, subnet_trajectories(actor))
        return metrics if bias_env is None else metrics | evaluate_bias(loss, bias_env, gamma=config.loss.gamma, seed=seed)

    return evaluation


@torch.no_grad()
def evaluate(actor: SubnetActor, env: EnvBase, *, seed: int | None = None) -> dict[str, float]:
    """Undiscounted returns of deterministic episodes, one per environment; they cycle through the subnetworks.

    Args:
        actor (SubnetActor): its subnetwork ``e % N`` plays the episode of environment ``e``.
        env (EnvBase): of batch size ``(episodes,)``, see :func:`~omnet_torchrl.training.environments.make_env`.

    Keyword Args:
        seed (int or None): of the environment; the start states are the same for the same seed.

    Returns:
        dict: ``eval/return`` and ``eval/length``, means over the episodes; ``eval/return_subnet_k`` for each subnetwork that
        played.
    """
    if seed is not None:
        seed_env(env, seed)
    device = next(actor.parameters()).device
    episodes = env.batch_size.numel()
    subnet = torch.arange(episodes) % actor.num_subnets
    total, length, playing = torch.zeros(episodes), torch.zeros(episodes), torch.ones(episodes, dtype=torch.bool)
    state = env.reset()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        while playing.any():
            inputs = state.select(*actor.in_keys, strict=False).set(actor.subnet_key, subnet).to(device)
            state.set(actor.action_key, actor(inputs).get(actor.action_key).to(env.device))
            # Who is done begins another episode, which does not count.
            state, following = env.step_and_maybe_reset(state)
            step, state = state.get("next"), following
            total += step.get("reward").view(-1).cpu() * playing
            length += playing
            playing &= ~step.get("done").view(-1).cpu()
    metrics = {"eval/return": total.mean().item(), "eval/length": length.mean().item()}
    for k in range(min(episodes, actor.num_subnets)):
        metrics[f"eval/return_subnet_{k}"] = total[subnet == k].mean().item()
    return metrics
