"""Environments of a run: gymnasium's, as TorchRL's, whose episodes can be brought back in their middle.

No simulator state is saved. The current episode is played again, from its actions and the state of the random numbers at its
reset, and compared with what was seen; between two episodes, the last one is. This is exact wherever an environment is a
function of these. What an environment keeps over more than an episode without showing it in one is not noticed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor
from torchrl.envs import Compose, DoubleToFloat, EnvBase, GymWrapper, RewardSum, StepCounter, Transform, TransformedEnv

from omnet_torchrl.envs import Maze2DEnv
from omnet_torchrl.offset import ObservationOffset
from omnet_torchrl.transforms import EpisodePrimer

MAZE = "Maze2D"  # Maze2DEnv; every other name is gymnasium's


class ReplayError(RuntimeError):
    """An episode, played again, came out differently."""


class EpisodeRecorder(gymnasium.Wrapper):
    """Remembers the start and the actions of the current episode, so that it can be played again.

    The ``info`` of steps is left out: nothing reads it, and a vector environment would gather it key by key.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.resting = False  # whether steps do nothing and end nothing
        self._start, self._actions, self._observation = dict[str, Any](), list[np.ndarray](), None
        self._seen = hashlib.sha256()  # observations, rewards and ends of the current episode
        self._last: dict[str, Any] | None = None  # the episode before, as state_dict() has one

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Reset the environment, and keep the state of its random numbers."""
        if self._actions:
            self._last = self._episode()
        rng = None if seed is not None else json.dumps(self.unwrapped.np_random.bit_generator.state)
        self._start, self._actions, self._seen = {"seed": seed, "rng": rng}, [], hashlib.sha256()
        self._observation, info = self.env.reset(seed=seed, options=options)
        self._seen.update(np.asarray(self._observation).tobytes())
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Step the environment, and keep the action."""
        if self.resting:
            return self._observation, 0.0, False, False, {}
        self._actions.append(np.array(action))
        self._observation, reward, terminated, truncated, _ = self.env.step(action)
        self._seen.update(np.asarray(self._observation).tobytes())
        self._seen.update(np.array([reward, terminated, truncated], dtype=np.float64).tobytes())
        return self._observation, reward, terminated, truncated, {}

    def state_dict(self) -> dict[str, Any]:
        """Start and actions of the current episode, and a hash of all that was seen: strings, numbers and tensors.

        Where it has no step yet, which could tell whether the environment is the same again, the episode before comes with it.
        """
        return {**self._episode(), **({"last": self._last} if self._last and not self._actions else {})}

    def _episode(self) -> dict[str, Any]:
        actions, observation = (torch.from_numpy(np.array(each)) for each in (self._actions, self._observation))
        return {**self._start, "actions": actions, "observation": observation, "seen": self._seen.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play the episode of ``state`` again, and the one before where it has one.

        Raises:
            ReplayError: an observation, reward or end on the way is not the one that was seen, bit for bit.
        """
        if "last" in state:
            self.load_state_dict(state["last"])
        if state["rng"] is not None:
            self.unwrapped.np_random.bit_generator.state = json.loads(state["rng"])
        self.reset(seed=state["seed"])
        self._start = {"seed": state["seed"], "rng": state["rng"]}
        for action in state["actions"].numpy():
            self.step(action)
        if self._seen.hexdigest() != state["seen"]:
            name = type(self.unwrapped).__name__ if self.spec is None else self.spec.id
            distance = np.abs(np.asarray(self._observation) - state["observation"].numpy()).max()
            raise ReplayError(
                f"an episode of {name}, played again for {len(self._actions)} steps, came out differently: its "
                f"last observation is off by up to {distance:.3g}, or a reward or end is another; has the environment a state "
                "that neither its seed nor its actions tell?"
            )


def check_env(name: str) -> None:
    """Make the environment once; raise a ``ValueError`` if it is unknown, lacks a package, or its spaces are not supported."""
    if name == MAZE:
        return
    if ":" not in name and name not in gymnasium.registry:
        closest = ", ".join(difflib.get_close_matches(name, [MAZE, *gymnasium.registry], n=3, cutoff=0))
        raise ValueError(f"env must be a gymnasium id with its version, got {name!r}; the closest are {closest}.")
    try:
        env = _make_gymnasium(name)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ValueError(f"env {name!r} needs a package that can't be imported: {error}") from error
    except Exception as error:  # its own constructor may raise anything
        kind = "" if isinstance(error, gymnasium.error.Error) else f"{type(error).__name__}: "
        raise ValueError(f"env {name!r} can't be made: {kind}{error}") from error
    spaces = {"observation": env.observation_space, "action": env.action_space}
    env.close()
    for kind, space in spaces.items():
        box = space if isinstance(space, gymnasium.spaces.Box) else None
        if box is None or len(box.shape) != 1 or box.dtype.kind != "f" or (kind == "action" and not box.is_bounded()):
            expected = "a Box of floats with one dimension" + (" and finite bounds" if kind == "action" else "")
            advice = "choose another env, or register it with a wrapper of gymnasium.wrappers that changes it"
            raise ValueError(f"the {kind} of env must be {expected}, got {space} from {name!r}: {advice}.")


def make_env(
    name: str,
    *transforms: Transform,
    num_envs: int | None = None,
    seed: int | None = None,
    observation_offset: float = 0.0,
    sum_episodes: bool = True,
) -> EnvBase:
    """An environment for training or evaluation.

    Args:
        name (str): gymnasium id, or ``Maze2D`` for :class:`~omnet_torchrl.Maze2DEnv`.
        *transforms (Transform): appended, e.g. a :class:`~omnet_torchrl.SubnetPrimer`.
        num_envs (int or None): this many, stepped one after the other in this process, as one environment of batch size
            ``(num_envs,)``. ``None`` (default): a single one, without batch size.
        seed (int or None): of the environment's random numbers.
        observation_offset (float): scale of an :class:`~omnet_torchrl.ObservationOffset`; 0 (default): none.
        sum_episodes (bool): write each episode's return and length so far, ``episode_reward`` and ``step_count``. Defaults to
            ``True``.
    """
    if name == MAZE:
        base: EnvBase = Maze2DEnv(() if num_envs is None else num_envs)
    else:
        make = partial(_make_gymnasium, name)
        # The only mode of gymnasium's vector environments in which TorchRL sees each environment's own last observation.
        mode = gymnasium.vector.AutoresetMode.DISABLED
        base = GymWrapper(
            make() if num_envs is None else gymnasium.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=mode)
        )
    offset = [ObservationOffset(observation_offset, generator=seed)] if observation_offset else []
    sums = [RewardSum(), StepCounter()] if sum_episodes else []
    env = TransformedEnv(base, Compose(DoubleToFloat(), *offset, *sums, *transforms))
    if seed is not None:
        env.set_seed(seed)
    return env


def _make_gymnasium(name: str) -> EpisodeRecorder:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date")  # the paper's tasks are the -v4 ones
        return EpisodeRecorder(gymnasium.make(name))


def seed_env(env: EnvBase, seed: int) -> None:
    """Seed an environment and what its transforms draw: an evaluation is then a function of its seed."""
    env.set_seed(seed)
    transforms = env.transform if isinstance(env, TransformedEnv) else ()
    for transform in transforms if isinstance(transforms, Compose) else [transforms]:
        if isinstance(transform, EpisodePrimer):
            transform.generator.manual_seed(seed)


def recorders(env: EnvBase) -> list[EpisodeRecorder | Maze2DEnv]:
    """The objects that bring back the episodes of an environment of :func:`make_env`: one each, or the whole maze."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if isinstance(env, Maze2DEnv):
        return [env]
    base: Any = env._env if isinstance(env, GymWrapper) else None
    return list(getattr(base, "envs", [base]))


@contextmanager
def resting(env: EnvBase) -> Iterator[Callable[[Tensor], None]]:
    """Gives a function to say which environments of a batch rest: from then on, a step of theirs does nothing.

    An evaluation then takes the time of the steps that count. Only gymnasium's environments of :func:`make_env` can rest; the
    steps of all others, the maze's too, are made as usual. At the end no environment rests.
    """
    players = [player for player in recorders(env) if isinstance(player, EpisodeRecorder)]

    def rest(which: Tensor) -> None:
        for player, rests in zip(players, which.tolist(), strict=bool(players)):
            player.resting = rests

    try:
        yield rest
    finally:
        for player in players:
            player.resting = False
