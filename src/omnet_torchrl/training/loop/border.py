"""The border between a run and an environment that somebody else wrote.

What crosses it is copied, both ways: the environment may go on using the array that it returned, and change the action that it
is given. Observations and actions are float32 on our side, rewards and ends are single numbers; anything else is an error that
says what came.

No simulator state is saved. The current episode is played again, from its actions and the state of the random numbers at its
reset, and compared with what was seen; between two episodes, the last one is. This is exact wherever an environment is a
function of these. What an environment keeps over more than an episode without showing it in one is not noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box

from omnet_torchrl.training.loop.generators import OwnGlobals, dumps, held_generators, loads, restore, states


class ReplayError(RuntimeError):
    """An episode, played again, came out differently."""


class Border(gymnasium.Wrapper):
    """Everything that a run gives to an environment and gets from it; the outermost wrapper.

    It remembers the start and the actions of the current episode, so that it can be played again, and gives the environment
    global random generators of its own. The ``info`` of resets and steps is left out, but for ``"success"``, which a task has.

    Args:
        env (gymnasium.Env): its spaces have passed :func:`check_spaces`.
        own_globals (OwnGlobals or None): those that it was made with. ``None`` (default): new ones.
    """

    def __init__(self, env: gymnasium.Env, own_globals: OwnGlobals | None = None):
        super().__init__(env)
        self.name = type(self.unwrapped).__name__ if self.spec is None else self.spec.id
        self._close = weakref.finalize(self, env.close)  # once, when it is let go of at the latest
        self.resting = False  # whether steps do nothing and end nothing
        self._globals = OwnGlobals(0) if own_globals is None else own_globals
        self._shape: tuple[int, ...] = env.observation_space.shape  # type: ignore[assignment]
        self.observation_space = Box(-np.inf, np.inf, self._shape, np.float32)
        self.action_space: Box = _float32(env.action_space)  # type: ignore[override]
        self._observation = np.zeros(self._shape)  # as the environment's own type
        self._start, self._actions = dict[str, Any](), list[np.ndarray]()
        self._seen = hashlib.sha256()  # observations, rewards and ends of the current episode
        self._last: dict[str, Any] | None = None  # the episode before, as state_dict() has one

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Reset the environment, and keep the state of its random numbers; a seed is for all of these."""
        if self._actions:
            self._last = self._episode()
        self._start, self._actions, self._seen = {"seed": seed, "rng": states(self._generators())}, [], hashlib.sha256()
        if seed is not None:
            self._globals.seed(seed)
            self.unwrapped.action_space.seed(seed)
            self.unwrapped.observation_space.seed(seed)
        with self._globals:
            outcome = self.env.reset(seed=seed, options=options)
        return self._see(self._parts("reset", "observation, info", outcome)[0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Step the environment, and keep the action."""
        if self.resting:
            return self._shown(), 0.0, False, False, {"success": 0.0}
        self._actions.append(np.array(action))
        with self._globals:
            outcome = self.env.step(np.array(action, self.env.action_space.dtype))
        parts = self._parts("step", "observation, reward, terminated, truncated, info", outcome)
        observation, reward = self._see(parts[0]), self._number("reward", parts[1])
        terminated, truncated = self._number("terminated", parts[2]), self._number("truncated", parts[3])
        self._seen.update(np.array([reward, terminated, truncated], dtype=np.float64).tobytes())
        success = parts[4].get("success") if isinstance(parts[4], dict) else None
        kept = {} if success is None else {"success": self._number("success", success)}
        return observation, float(reward), bool(terminated), bool(truncated), kept

    def close(self) -> None:
        """Close the environment, unless it is."""
        self._close()

    def _parts(self, method: str, expected: str, outcome: Any) -> tuple[Any, ...]:
        if not isinstance(outcome, tuple) or len(outcome) != len(expected.split(", ")):
            got = f"{type(outcome).__name__} of {len(outcome)}" if hasattr(outcome, "__len__") else type(outcome).__name__
            raise ValueError(f"{method} of {self.name} must return a tuple ({expected}), got a {got}: {_MEND}.")
        return outcome

    def _see(self, observation: Any) -> np.ndarray:
        array = np.asarray(observation).copy()
        if array.size != self._shape[0] or array.dtype.kind not in "fiub":
            expected = f"{self._shape[0]} numbers, as its observation_space says"
            raise ValueError(f"an observation of {self.name} must be {expected}, got {_text(observation, array)}: {_MEND}.")
        self._seen.update(array.tobytes())
        self._observation = array
        return self._shown()

    def _shown(self) -> np.ndarray:
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, which the run finds out
            return self._observation.astype(np.float32).reshape(self._shape)  # a copy in any case

    def _number(self, what: str, value: Any) -> float:
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in "fiub":
            raise ValueError(f"{what} of a step of {self.name} must be one number, got {_text(value, array)}: {_MEND}.")
        return array.item()

    def _generators(self) -> dict[str, Any]:
        with contextlib.suppress(Exception):
            self.unwrapped.np_random  # noqa: B018, which makes it
        spaces = self.unwrapped.action_space, self.unwrapped.observation_space  # which may be the class's
        return {"global": self._globals, **held_generators(self.unwrapped, self.env, *spaces)}

    def state_dict(self) -> dict[str, Any]:
        """Start and actions of the current episode, and a hash of all that was seen: strings, numbers and tensors.

        Where it has no step yet, which could tell whether the environment is the same again, the episode before comes with it.
        """
        return {**self._episode(), **({"last": self._last} if self._last and not self._actions else {})}

    def _episode(self) -> dict[str, Any]:
        actions, observation = (torch.from_numpy(np.array(each)) for each in (self._actions, self._observation))
        start = {"seed": self._start["seed"], "rng": dumps(self._start["rng"])}
        return {**start, "actions": actions, "observation": observation, "seen": self._seen.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play the episode of ``state`` again, and the one before where it has one.

        Raises:
            ReplayError: an observation, reward or end on the way is not the one that was seen, bit for bit; or the environment
                has a generator that can't be brought back.
        """
        if "last" in state:
            self.load_state_dict(state["last"])
        rng = loads(state["rng"] or "{}")
        if "bit_generator" in rng:  # of a checkpoint that was written before others were kept
            rng = {"0._np_random": rng}
        if restore(self._generators(), rng):
            self.reset(seed=0)  # which makes those that an environment makes late
        missing = restore(self._generators(), rng)
        if missing:
            raise ReplayError(f"the random generators of {self.name} can't be brought back: {', '.join(missing)}.")
        self.reset(seed=state["seed"])
        self._start = {"seed": state["seed"], "rng": rng}
        for action in state["actions"].numpy():
            self.step(action)
        if self._seen.hexdigest() != state["seen"]:
            distance = np.abs(self._observation.astype(float) - state["observation"].numpy()).max()
            raise ReplayError(
                f"an episode of {self.name}, played again for {len(self._actions)} steps, came out differently: "
                f"its last observation is off by up to {distance:.3g}, or a reward or end is another; has the environment a "
                "state that neither its seed nor its actions tell?"
            )


def check_spaces(name: str, observation: gymnasium.Space, action: gymnasium.Space) -> None:
    """Raise a ``ValueError`` unless an environment has vectors of numbers for observations and bounded ones for actions."""
    advice = "flatten_observation=true flattens it" if not isinstance(observation, Box) or len(observation.shape) != 1 else ""
    _check_box(name, "observation", observation, "fiub", "a Box of numbers", advice)
    _check_box(name, "action", action, "f", "a Box of floats", "")
    low, high = (bound.astype(np.float64) for bound in (action.low, action.high))  # type: ignore[attr-defined]
    # Beyond 1e18 the square of an action is not finite in float32.
    if not ((low < high) & (np.maximum(abs(low), abs(high)) < 1e18)).all():
        expected = "low < high, both within (-1e18, 1e18)"
        raise ValueError(f"the action of env must have finite bounds, {expected}, got {action} from {name!r}: {_WRAP}.")


_WRAP = "choose another env, or change it by a wrapper (wrappers=[module.Class])"
_MEND = "mend the environment, or change what it returns by a wrapper (wrappers=[module.Class])"


def _check_box(name: str, what: str, space: gymnasium.Space, kinds: str, expected: str, advice: str) -> None:
    box = space if isinstance(space, Box) else None
    if box is None or len(box.shape) != 1 or not box.shape[0] or box.dtype.kind not in kinds:
        expected = f"{expected} with one dimension, of at least one number"
        raise ValueError(f"the {what} of env must be {expected}, got {space} from {name!r}: {advice or _WRAP}.")


def _float32(space: Any) -> Box:
    """The space of actions as float32, within the bounds of one in float64."""
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    low[low < space.low] = np.nextafter(low, np.float32(np.inf))[low < space.low]
    high[high > space.high] = np.nextafter(high, np.float32(-np.inf))[high > space.high]
    return Box(low, high, dtype=np.float32)


def _text(value: Any, array: np.ndarray) -> str:
    """What came, short enough for a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{type(value).__name__} of shape {array.shape} and type {array.dtype}"
