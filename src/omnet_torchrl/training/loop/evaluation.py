"""How good the policy is by now: returns of deterministic episodes, and how far the critic's values are off (figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl.deterministic import AnyActor
from omnet_torchrl.envs import Maze2DEnv
from omnet_torchrl.metrics import soft_returns, value_bias
from omnet_torchrl.objectives import OMNetSACLoss, SubnetLoss
from omnet_torchrl.training.loop.environments import MAZE, env_options, make_env, seed_env
from omnet_torchrl.training.loop.rollout import rollout
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.loop.tasks import task_labels
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.record.files import append_positions
from omnet_torchrl.updates import CompiledPolicy

FIGURE_7 = (500, 4_800, 5_000, 6_000, 30_000)  # updates of the policy: the paper's gradient steps
TRAJECTORIES = ("seed", "updates", "subnet", "step", "x", "y")  # columns of trajectories.csv
MAX_TRAJECTORIES = 32  # masks that are redrawn at each call stand for 2^31 subnetworks


class Evaluation:
    """A run's evaluation, a function of the number of frames: returns and, where the options ask for it, the value bias.

    The same frames give the same start states in every run of the seed, and in no run of another. In the maze,
    ``trajectories.csv`` in the run's folder gets the ways of the actor's subnetworks, at evaluations after just as many policy
    updates as figure 7 shows.

    Args:
        config (TrainConfig): its ``eval.episodes`` (of each task) and ``eval.bias_episodes`` are so many environments; of 0,
            none is made.
        policy (SubnetActor or CompiledPolicy): what is evaluated.
        loss (OMNetSACLoss): whose values are.
        say (callable): gets lines for a person. Defaults to ``print``.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: AnyActor | CompiledPolicy,
        loss: SubnetLoss,
        say: Callable[[str], object] = print,
    ):
        options = {"observation_offset": config.observation_offset, "sum_episodes": False, **env_options(config)}
        make = partial(make_env, config.env, **options)
        self.config, self.policy, self.loss, self.say = config, policy, loss, say
        self.tasks = task_labels(config.env)
        counts = config.eval.episodes * max(1, len(self.tasks)), config.eval.bias_episodes
        self.env, self.bias_env = (make(num_envs=count) if count else None for count in counts)

    def prepare(self) -> None:
        """Compile the policy for what is played here, where it is one that can be."""
        if isinstance(self.policy, CompiledPolicy) and self.env is not None:
            actor, made_up = self.policy.actor, self.env.fake_tensordict()
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                self.policy.prepare(made_up.set(actor.subnet_key, torch.zeros(made_up.batch_size, dtype=torch.int64)))

    def __call__(self, frames: int) -> dict[str, float]:
        """Evaluate the policy as it is now."""
        config = self.config
        seed = derived_seed(config.seed, "evaluation", frames)
        options = {"seed": seed, "say": self.say, "tasks": self.tasks}
        metrics = {} if self.env is None else evaluate(self.policy, self.env, **options)
        policy_updates = int(max(0, frames - config.init_random_frames) * config.utd_ratio) // config.policy_update_delay
        if config.env == MAZE and policy_updates in FIGURE_7:
            positions = subnet_trajectories(_actor(self.policy))
            write_trajectories(Path(config.folder) / "trajectories.csv", config.seed, policy_updates, positions)
        if self.bias_env is None or not isinstance(self.loss, OMNetSACLoss):
            return metrics
        return metrics | evaluate_bias(self.loss, self.bias_env, gamma=config.loss.gamma, seed=seed, say=self.say)

    def close(self) -> None:
        """Close the environments."""
        for env in (self.env, self.bias_env):
            if env is not None and not env.is_closed:
                env.close()


@torch.no_grad()
@set_exploration_type(ExplorationType.DETERMINISTIC)
def evaluate(
    policy: AnyActor | CompiledPolicy,
    env: EnvBase,
    *,
    seed: int | None = None,
    say: Callable[[str], object] = print,
    tasks: Sequence[str] = (),
) -> dict[str, float]:
    """Undiscounted returns of deterministic episodes, one per environment; they cycle through the subnetworks.

    Args:
        policy (CompiledPolicy or an actor over subnetworks): its subnetwork ``e % N`` plays the episode of environment ``e``.
        env (EnvBase): of batch size ``(episodes,)``, see :func:`~omnet_torchrl.training.make_env`.
        seed (int or None): of the start states. ``None`` (default): the environment's random numbers go on.
        say (callable): gets a line where the episodes do not end for long. Defaults to ``print``.
        tasks (sequence of str): names of the tasks, which the environments cycle through as well. Defaults to none.

    Returns:
        dict: ``eval/return`` and ``eval/length``, means; ``eval/return_subnet_k`` of each subnetwork that played, or
        ``eval/return_<task>``; where the environment says it, ``eval/success``, the fraction of successful episodes, and
        ``eval/success_<task>``.

    Raises:
        DivergenceError: an observation, action or reward is not finite.
    """
    if seed is not None:
        seed_env(env, seed)
    actor, episodes = _actor(policy), env.batch_size.numel()
    subnet, total, length = torch.arange(episodes) % actor.num_subnets, torch.zeros(episodes), torch.zeros(episodes)
    observations = [key for key in actor.in_keys if key != actor.subnet_key]
    act, success = partial(_deterministic, policy, subnet), None
    for step, playing in rollout(env, act, observations=observations, name="an evaluation", say=say):
        total += step.get(("next", "reward")).view(-1).cpu() * playing
        length += playing
        succeeded = step.get(("next", "success"), None)
        if succeeded is not None:
            success = torch.where(playing, succeeded.view(-1).float(), torch.zeros(()) if success is None else success)
    metrics = {"eval/return": total.mean().item(), "eval/length": length.mean().item()}
    for k in range(min(episodes, actor.num_subnets)):
        metrics[f"eval/return_{tasks[k] if tasks else f'subnet_{k}'}"] = total[subnet == k].mean().item()
    if success is not None:
        each = {f"eval/success_{task}": success[subnet == k].mean().item() for k, task in enumerate(tasks)}
        metrics |= {"eval/success": success.mean().item(), **each}
    return metrics


@torch.no_grad()
def evaluate_bias(
    loss: OMNetSACLoss,
    env: EnvBase,
    *,
    gamma: float = 0.99,
    first_steps: int | None = None,
    bootstrap: bool = True,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, float]:
    """Value bias over the state-action pairs of one on-policy episode per environment, each played by one actor subnetwork.

    Args:
        loss (OMNetSACLoss): its actor plays, with random actions; subnetwork ``e % N`` in environment ``e``. All subnetworks of
            its critic are asked, without dropout.
        env (EnvBase): of batch size ``(episodes,)``.
        gamma (float): discount. Defaults to 0.99.
        first_steps (int or None): only the first steps of an episode count; REDQ takes 350. ``None`` (default): all.
        bootstrap (bool): where an episode is truncated, go on with the critic's own soft value of the last state (mean over its
            subnetworks), or, ``False``, cut the returns; see :func:`~omnet_torchrl.metrics.soft_returns`. Defaults to ``True``.
        seed (int): of the environment's start states and of the actions' noise. Defaults to 0.
        say (callable): as in :func:`evaluate`.

    Returns:
        dict: of :func:`~omnet_torchrl.metrics.value_bias`, and ``bias/pairs``, how many counted.

    Raises:
        DivergenceError: an observation, action or reward is not finite.
    """
    seed_env(env, seed)
    generator = torch.Generator(loss.log_alpha.device).manual_seed(seed)
    with ExitStack() as stack:
        stack.callback(loss.qvalue_network.train, loss.qvalue_network.training)
        loss.qvalue_network.eval()
        steps = list(_soft_steps(loss, env, generator, bootstrap, say))
    data = {key: torch.stack([each[key] for each in steps], -1) for key in steps[0]}
    value, counted, after = data.pop("value"), data.pop("counted"), data.pop("after")
    returns = soft_returns(**data, alpha=loss.log_alpha.exp(), gamma=gamma, bootstrap=after)
    counted = counted[:, :first_steps]
    bias = value_bias(value[..., :first_steps][:, counted], returns[:, :first_steps][counted])
    return {**{key: float(number) for key, number in bias.items()}, "bias/pairs": float(counted.sum())}


def _soft_steps(
    loss: OMNetSACLoss, env: EnvBase, generator: torch.Generator, bootstrap: bool, say: Callable[[str], object]
) -> Iterator[dict[str, Tensor]]:
    """What :func:`~omnet_torchrl.metrics.soft_returns` takes of each step, the critic's values, and which of them count."""
    answers: list[tuple[Tensor, Tensor]] = []

    def act(state: TensorDictBase) -> Tensor:
        action, value, log_prob = _act(loss, state, generator)
        answers.append((value, log_prob))
        return action

    observations = [key for key in loss.actor_network.in_keys if key != loss.tensor_keys.subnet]
    name = "an evaluation of the value bias"
    for step, playing in rollout(env, act, observations=observations, name=name, say=say):
        following, (value, log_prob) = step.get("next"), answers.pop()
        reward, done, terminated = (following.get(key).view(-1).to(value.device) for key in ("reward", "done", "terminated"))
        truncated, after = done & ~terminated, torch.zeros_like(log_prob)
        if bootstrap and truncated.any():
            _, next_value, next_log_prob = _act(loss, following, generator)
            after = next_value.mean(0) - loss.log_alpha.exp() * next_log_prob
        data = {"value": value, "log_prob": log_prob, "reward": reward, "terminated": terminated, "truncated": truncated}
        yield {**data, "after": after, "counted": playing.to(value.device)}


@torch.no_grad()
@set_exploration_type(ExplorationType.DETERMINISTIC)
def subnet_trajectories(actor: AnyActor, env: EnvBase | None = None) -> Tensor:
    """The way that each of N subnetworks (of more than 32, the first) goes through the maze, its actions deterministic.

    Returns:
        Tensor: ``(N, T + 1, 2)`` on the CPU, the observed positions of T steps, the start first. A point that reaches the goal
        before the others stays there.
    """
    device, count = next(actor.parameters()).device, min(actor.num_subnets, MAX_TRAJECTORIES)
    env = Maze2DEnv(count, device=device) if env is None else env
    if env.batch_size != (count,):
        raise ValueError(f"env must have batch size ({count},), one per subnetwork, got {tuple(env.batch_size)}.")
    start = env.reset()
    positions = [start.get("observation").cpu()]
    for step, playing in rollout(env, partial(_deterministic, actor, torch.arange(count)), start):
        positions.append(torch.where(playing[:, None], step.get(("next", "observation")).cpu(), positions[-1]))
    return torch.stack(positions, 1)


def write_trajectories(path: str | Path, seed: int, updates: int, positions: Tensor) -> None:
    """Append the ways ``(N, T + 1, 2)`` of a run's subnetworks after ``updates`` gradient steps of the policy to a CSV file."""
    ways = ((seed, updates, n, t, x, y) for n, way in enumerate(positions.tolist()) for t, (x, y) in enumerate(way))
    append_positions(Path(path), TRAJECTORIES, ways)


def _actor(policy: AnyActor | CompiledPolicy) -> AnyActor:
    return policy.actor if isinstance(policy, CompiledPolicy) else policy


def _deterministic(policy: AnyActor | CompiledPolicy, subnet: Tensor, state: TensorDictBase) -> Tensor:
    """The action of each environment's subnetwork."""
    actor = _actor(policy)
    inputs = state.select(*actor.in_keys, strict=False).set(actor.subnet_key, subnet)
    device, home = next(actor.parameters()).device, state.device or torch.device("cpu")
    return policy(inputs.to(device) if device != home else inputs).get(actor.action_key)


def _act(loss: OMNetSACLoss, state: TensorDictBase, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random actions ``(E, action_dim)``, their values ``(N, E)`` and their log-probabilities ``(E,)``."""
    state, device = state.to(generator.device), generator.device
    subnet = torch.arange(state.batch_size.numel(), device=device) % loss.num_actor_subnets
    action_dim = loss.actor_network.spec[loss.tensor_keys.action].shape[-1]
    noise = torch.randn(*state.batch_size, action_dim, generator=generator, device=device)
    action, log_prob = loss.act(state, subnet, noise=noise)
    every = torch.arange(loss.num_value_subnets, device=device)  # masks that are redrawn at each call are countless
    return action, loss.value(state, action, every), log_prob
