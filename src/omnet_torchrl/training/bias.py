"""How far the critic is off by now: its values against what episodes of the current policy return (figure 4)."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from omnet_torchrl.metrics import soft_returns, value_bias
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.training.divergence import check_finite
from omnet_torchrl.training.environments import resting, seed_env
from omnet_torchrl.training.stopping import check_stop


@torch.no_grad()
def evaluate_bias(
    loss: OMNetSACLoss,
    env: EnvBase,
    *,
    gamma: float = 0.99,
    first_steps: int | None = None,
    bootstrap: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """Value bias over the state-action pairs of one on-policy episode per environment, each played by one actor subnetwork.

    Args:
        loss (OMNetSACLoss): its actor plays, with random actions; subnetwork ``e % N`` in environment ``e``. All subnetworks of
            its critic are asked, without dropout.
        env (EnvBase): of batch size ``(episodes,)``, see :func:`~omnet_torchrl.training.environments.make_env`.

    Keyword Args:
        gamma (float): discount. Defaults to 0.99.
        first_steps (int or None): only the first steps of an episode count; REDQ takes 350. ``None`` (default): all.
        bootstrap (bool): where an episode is truncated, go on with the critic's own soft value of the last state (mean over its
            subnetworks), or, ``False``, cut the returns; see :func:`~omnet_torchrl.metrics.soft_returns`. Defaults to ``True``.
        seed (int): of the environment's start states and of the actions' noise. Defaults to 0.

    Returns:
        dict: of :func:`~omnet_torchrl.metrics.value_bias`, and ``bias/pairs``, how many counted.

    Raises:
        DivergenceError: an observation, action or reward is not finite.
    """
    device, critic, actor = loss.log_alpha.device, loss.qvalue_network, loss.actor_network
    generator = torch.Generator(device).manual_seed(seed)
    seed_env(env, seed)
    state, records = env.reset(), list[dict[str, Tensor]]()
    playing = torch.ones(env.batch_size.numel(), dtype=torch.bool, device=device)
    seen = [key for key in actor.in_keys if key != loss.tensor_keys.subnet]
    watched = [loss.tensor_keys.action, *(("next", key) for key in seen), ("next", "reward")]
    for key in seen:
        check_finite(key, state.get(key), "at the start of an evaluation of the value bias")
    with resting(env) as rest, ExitStack() as stack:
        stack.callback(critic.train, critic.training)
        critic.eval()
        while playing.any():
            check_stop()
            action, value, log_prob = _act(loss, state, generator)
            state.set(loss.tensor_keys.action, action.to(env.device or torch.device("cpu")))
            # Who is done begins another episode, which does not count, and rests.
            state, following = env.step_and_maybe_reset(state)
            for key in watched:
                check_finite(key, state.get(key), f"at step {len(records) + 1} of an evaluation of the value bias")
            step, state = state.get("next"), following
            reward, done, terminated = (step.get(key).view(-1).to(device) for key in ("reward", "done", "terminated"))
            record = {"value": value, "log_prob": log_prob, "reward": reward, "terminated": terminated, "counted": playing}
            record["truncated"], record["after"] = done & ~terminated, torch.zeros_like(log_prob)
            if bootstrap and record["truncated"].any():
                _, next_value, next_log_prob = _act(loss, step, generator)
                record["after"] = next_value.mean(0) - loss.log_alpha.exp() * next_log_prob
            records.append(record)
            playing = playing & ~done
            rest(~playing)
    data = {name: torch.stack([record[name] for record in records], -1) for name in records[0]}
    value, counted, after = data.pop("value"), data.pop("counted"), data.pop("after")
    returns = soft_returns(**data, alpha=loss.log_alpha.exp(), gamma=gamma, bootstrap=after)
    counted = counted[:, :first_steps]
    bias = value_bias(value[..., :first_steps][:, counted], returns[:, :first_steps][counted])
    return {**{name: float(number) for name, number in bias.items()}, "bias/pairs": float(counted.sum())}


def _act(loss: OMNetSACLoss, state: TensorDictBase, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random actions ``(E, action_dim)``, their values ``(N, E)`` and their log-probabilities ``(E,)``."""
    state, device = state.to(generator.device), generator.device
    subnet = torch.arange(state.batch_size.numel(), device=device) % loss.num_actor_subnets
    action_dim = loss.actor_network.spec[loss.tensor_keys.action].shape[-1]
    noise = torch.randn(*state.batch_size, action_dim, generator=generator, device=device)
    action, log_prob = loss._act(loss.actor_network_params, state, subnet, noise)
    every = torch.arange(loss.num_value_subnets, device=device)  # masks that are redrawn at each call are countless
    return action, loss._qvalue(loss.qvalue_network_params, state, action, every), log_prob
