"""The one rollout of everything that plays episodes beside training: evaluation, value bias, ways in the maze, ``play.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from omnet_torchrl.training.loop.environments import resting
from omnet_torchrl.training.loop.stopping import check_finite, check_stop

LONG = 10_000  # steps of an episode that somebody should know of
_ENDS = "a run with max_episode_steps=1000 ends them there, one with eval.episodes=0 plays none"


def rollout(
    env: EnvBase,
    act: Callable[[TensorDictBase], Tensor],
    state: TensorDictBase | None = None,
    *,
    observations: Sequence[NestedKey] = (),
    name: str = "",
    say: Callable[[str], object] = print,
) -> Iterator[tuple[TensorDictBase, Tensor]]:
    """Play one episode in each environment of a batch, until the last one ends.

    An environment whose episode has ended is stepped on, but its further steps are not counted.

    Args:
        env (EnvBase): of E environments, batch size ``(E,)`` or ``()``.
        act (callable): takes the state and returns the action, on any device.
        state (TensorDictBase or None): where the episodes start. ``None`` (default): ``env.reset()``.
        observations (sequence of NestedKey): what must be finite in each state, as actions and rewards must. Defaults to none.
        name (str): of what plays, for the error. ``""`` (default): nothing is checked.
        say (callable): gets a line when the episodes last for :data:`LONG` steps. Defaults to ``print``.

    Yields:
        the step, before anything is reset: ``action`` and what it led to under ``"next"``; and ``playing (E,)`` on the CPU:
        whether this step of an environment counts.

    Raises:
        DivergenceError: an observation, action or reward is not finite.
    """
    state = env.reset() if state is None else state
    playing, number = torch.ones(env.batch_size.numel(), dtype=torch.bool), 0
    if name:
        for key in observations:
            check_finite(key, state.get(key), f"at the start of {name}")
    watched = [env.action_key, *(("next", key) for key in observations), ("next", "reward")]
    with resting(env) as rest:
        while playing.any():
            check_stop()
            action = act(state).to(env.device or "cpu")
            step, number = env.step(state.set(env.action_key, action)), number + 1
            if number == LONG:
                say(f"{name or 'a rollout'} has played {LONG:,} steps, and its episodes have not ended: {_ENDS}")
            for key in watched if name else ():
                check_finite(key, step.get(key), f"at step {number} of {name}")
            yield step, playing
            playing = playing & ~step.get(("next", "done")).view(-1).cpu()
            rest(~playing)
            state = env.maybe_reset(step_mdp(step))
