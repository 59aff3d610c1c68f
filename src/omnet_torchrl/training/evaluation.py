"""How good the policy is by now: deterministic episodes, one for each environment of a batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl.modules import SubnetActor
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.training.acting import CompiledPolicy
from omnet_torchrl.training.bias import evaluate_bias
from omnet_torchrl.training.divergence import check_finite
from omnet_torchrl.training.environments import MAZE, make_env, resting, seed_env
from omnet_torchrl.training.global_numbers import derived_seed
from omnet_torchrl.training.maze import subnet_trajectories, write_trajectories
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.stopping import check_stop

# Updates of the policy: the paper's gradient steps.
FIGURE_7 = (500, 4_800, 5_000, 6_000, 30_000)


class Evaluation:
    """A run's evaluation, a function of the number of frames: returns and, where the options ask for it, the value bias.

    The same frames give the same start states in every run of the seed, and in no run of another. In the maze,
    ``trajectories.csv`` in the run's folder gets the ways of the actor's subnetworks, at evaluations after just as many policy
    updates as figure 7 shows.

    Args:
        config (TrainConfig): the options of the run.
        policy (SubnetActor or CompiledPolicy): who plays.
        loss (OMNetSACLoss): whose critic has the bias.
    """

    def __init__(self, config: TrainConfig, policy: SubnetActor | CompiledPolicy, loss: OMNetSACLoss):
        make = partial(make_env, config.env, observation_offset=config.observation_offset, sum_episodes=False)
        self.config, self.policy, self.loss = config, policy, loss
        self.env = make(num_envs=config.eval.episodes)
        self.bias_env = make(num_envs=config.eval.bias_episodes) if config.eval.bias_episodes else None

    def prepare(self) -> None:
        """Compile the policy for what is played here, where it is one that can be."""
        if isinstance(self.policy, CompiledPolicy):
            actor, made_up = self.policy.actor, self.env.fake_tensordict()
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                self.policy.prepare(made_up.set(actor.subnet_key, torch.zeros(made_up.batch_size, dtype=torch.int64)))

    def __call__(self, frames: int) -> dict[str, float]:
        """Evaluate the policy as it is now."""
        config = self.config
        seed = derived_seed(config.seed, "evaluation", frames)
        policy_updates = int(max(0, frames - config.init_random_frames) * config.utd_ratio) // config.policy_update_delay
        metrics = evaluate(self.policy, self.env, seed=seed)
        if config.env == MAZE and policy_updates in FIGURE_7:
            ways = Path(config.folder) / "trajectories.csv"
            write_trajectories(ways, config.seed, policy_updates, subnet_trajectories(_actor(self.policy)))
        if self.bias_env is None:
            return metrics
        return metrics | evaluate_bias(self.loss, self.bias_env, gamma=config.loss.gamma, seed=seed)


@torch.no_grad()
def evaluate(policy: SubnetActor | CompiledPolicy, env: EnvBase, *, seed: int | None = None) -> dict[str, float]:
    """Undiscounted returns of deterministic episodes, one per environment; they cycle through the subnetworks.

    Args:
        policy (SubnetActor or CompiledPolicy): its subnetwork ``e % N`` plays the episode of environment ``e``.
        env (EnvBase): of batch size ``(episodes,)``, see :func:`~omnet_torchrl.training.environments.make_env`.

    Keyword Args:
        seed (int or None): of the environment; the start states are the same for the same seed.

    Returns:
        dict: ``eval/return`` and ``eval/length``, means over the episodes; ``eval/return_subnet_k`` for each subnetwork that
        played.

    Raises:
        DivergenceError: an observation, action or reward is not finite.
    """
    if seed is not None:
        seed_env(env, seed)
    actor = _actor(policy)
    device = next(actor.parameters()).device
    home = env.device or torch.device("cpu")
    episodes = env.batch_size.numel()
    subnet = torch.arange(episodes) % actor.num_subnets
    total, length, playing = torch.zeros(episodes), torch.zeros(episodes), torch.ones(episodes, dtype=torch.bool)
    state, steps = env.reset(), 0
    seen = [key for key in actor.in_keys if key != actor.subnet_key]
    watched = [actor.action_key, *(("next", key) for key in seen), ("next", "reward")]
    for key in seen:
        check_finite(key, state.get(key), "at the start of an evaluation")
    with set_exploration_type(ExplorationType.DETERMINISTIC), resting(env) as rest:
        while playing.any():
            check_stop()
            inputs = state.select(*actor.in_keys, strict=False).set(actor.subnet_key, subnet)
            action = policy(inputs.to(device) if device != home else inputs).get(actor.action_key)
            state.set(actor.action_key, action.to(home))
            # Who is done begins another episode, which does not count, and rests.
            state, following = env.step_and_maybe_reset(state)
            steps += 1
            for key in watched:
                check_finite(key, state.get(key), f"at step {steps} of an evaluation")
            step, state = state.get("next"), following
            total += step.get("reward").view(-1).cpu() * playing
            length += playing
            playing &= ~step.get("done").view(-1).cpu()
            rest(~playing)
    metrics = {"eval/return": total.mean().item(), "eval/length": length.mean().item()}
    for k in range(min(episodes, actor.num_subnets)):
        metrics[f"eval/return_subnet_{k}"] = total[subnet == k].mean().item()
    return metrics


def _actor(policy: SubnetActor | CompiledPolicy) -> SubnetActor:
    return policy.actor if isinstance(policy, CompiledPolicy) else policy
