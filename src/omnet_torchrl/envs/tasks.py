"""Several tasks side by side: plain gymnasium environments of equal spaces as one batched environment of TorchRL.

The place of an environment in the batch is its task, and with ``SubnetPrimer(T, fixed=torch.arange(T))`` the task is the index
of the subnetwork that plays it, its pathway ("Efficient Reinforcement Learning by Discovering Neural Pathways", Arnob et al.,
2024, section on multi-task learning). Environments are stepped in a loop that writes into arrays: what TorchRL and gymnasium's
own vectors do for each environment and each step costs more than many an environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

ENDS = ("terminated", "truncated")


class TasksEnv(EnvBase):
    """T gymnasium environments with equal spaces, one for each task, stepped together.

    Each environment is reset when its own episode ends, by TorchRL's partial resets (``step_and_maybe_reset``, collectors).
    :meth:`set_seed` seeds the environments with successive numbers at their next reset.

    Args:
        envs (sequence of gymnasium.Env): observations are vectors and actions vectors with finite bounds. Nothing else is read
            of an environment, so that any object with these methods and spaces will do.
        names (sequence of str or None): of the task of each environment; several may have one task. ``None`` (default): the
            numbers from 0 on.

    Keyword Args:
        success (bool): the environments say in their info's ``"success"`` whether the task is solved, as Meta-World's do.
            Defaults to ``False``.

    Attributes:
        envs (list): the environments.
        tasks (tuple of str): the name of each environment's task.

    Keys:
        Reads ``action``, ``(T, action_dim)``. Writes ``observation``, ``(T, features)``, and ``reward``, float32; ``done``,
        ``terminated`` and ``truncated``; with ``success=True``, ``success (T, 1)``, boolean: whether the episode has been
        successful in any of its steps so far.

    Raises:
        ValueError: fewer than two environments, or another number of names; spaces that differ, or are not vectors.

    Examples:
        >>> import gymnasium
        >>> from torchrl.envs import TransformedEnv
        >>> from omnet_torchrl import SubnetPrimer
        >>> envs = [gymnasium.make("Pendulum-v1", g=g) for g in (1.0, 5.0, 10.0)]
        >>> env = TransformedEnv(TasksEnv(envs, ["moon", "mars", "earth"]), SubnetPrimer(3, fixed=torch.arange(3)))
        >>> env.rollout(10)["subnet"][:, 0].tolist()
        [0, 1, 2]
    """

    def __init__(self, envs: Sequence[Any], names: Sequence[str] | None = None, *, success: bool = False):
        envs = list(envs)
        tasks = tuple(map(str, range(len(envs)))) if names is None else tuple(names)
        check_tasks(envs, tasks)
        super().__init__(batch_size=torch.Size([len(envs)]))
        self.envs, self.tasks, self._success = envs, tasks, success
        count, (features,) = len(envs), envs[0].observation_space.shape
        seen: dict[str, Any] = {"observation": Unbounded((count, features))}
        if success:
            seen["success"] = Binary(shape=(count, 1), dtype=torch.bool)
        self.observation_spec = Composite(seen, shape=(count,))
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in _bounds(envs[0]))
        self.action_spec = Bounded(low.expand(count, -1), high.expand(count, -1), (count, *low.shape), dtype=torch.float32)
        self.reward_spec = Unbounded((count, 1))
        ends = {name: Binary(shape=(count, 1), dtype=torch.bool) for name in ("done", *ENDS)}
        self.done_spec = Composite(ends, shape=(count,))
        # Where the environments stand, and views on it for what gymnasium's environments return.
        self._state = {
            "observation": torch.zeros(count, features),
            **{name: torch.zeros(count, 1, dtype=torch.bool) for name in (*ENDS, "success")},
        }
        self._views = {name: value.numpy() for name, value in self._state.items()}
        self._seeds: list[int | None] = [None] * count

    def _set_seed(self, seed: int | None) -> None:
        self._seeds = [None if seed is None else seed + i for i in range(len(self.envs))]

    def _reset(self, tensordict: TensorDictBase | None = None, *, seed: int | None = None, **kwargs: object) -> TensorDictBase:
        if seed is not None:
            self._set_seed(seed)
        observation = self._views["observation"]
        for i in self._chosen(tensordict, "_reset"):
            observation[i] = self.envs[i].reset(seed=self._seeds[i])[0]
            self._seeds[i] = None
            for name in (*ENDS, "success"):
                self._views[name][i] = False
        return self._observe()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions, rewards = tensordict.get("action").numpy(force=True), torch.zeros(len(self.envs), 1)
        reward, observation = rewards.numpy(), self._views["observation"]
        terminated, truncated, success = (self._views[name] for name in (*ENDS, "success"))
        for i in self._chosen(tensordict, "_step"):
            observation[i], reward[i], terminated[i], truncated[i], info = self.envs[i].step(actions[i])
            if self._success:
                success[i] |= bool(info["success"])
        return self._observe().set("reward", rewards)

    def load_success(self, success: Tensor) -> None:
        """Which tasks have succeeded in the episodes that go on, boolean, ``(T, 1)``: after they were played again."""
        self._state["success"].copy_(success)

    def _chosen(self, tensordict: TensorDictBase | None, key: str) -> Sequence[int]:
        """The places that a reset or a step is of; the others stay as they are."""
        chosen = None if tensordict is None else tensordict.get(key, None)
        return range(len(self.envs)) if chosen is None else chosen.flatten().nonzero().flatten().tolist()

    def _observe(self) -> TensorDict:
        """Copies: what is returned must not change with the next step."""
        found: dict[str, Tensor] = {name: self._state[name].clone() for name in ("observation", *ENDS)}
        found["done"] = found["terminated"] | found["truncated"]
        if self._success:
            found["success"] = self._state["success"].clone()
        return TensorDict(found, batch_size=self.batch_size)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environments."""
        super().close(raise_if_closed=raise_if_closed)
        for env in self.envs:
            env.close()


def check_tasks(envs: Sequence[Any], names: Sequence[str]) -> None:
    """Raise a ``ValueError`` unless there are at least two environments, a name for each, with equal spaces of vectors."""
    if len(envs) < 2:
        what = f"got {names[0]!r} alone" if envs else "got none"
        raise ValueError(f"tasks must be at least two, {what}: train a single task as an environment without tasks.")
    if len(names) != len(envs):
        raise ValueError(f"names must be one for each of {len(envs)} environments, got {len(names)}.")
    for env, name in zip(envs, names, strict=True):
        shapes = tuple(getattr(space, "shape", None) for space in (env.observation_space, env.action_space))
        if any(shape is None or len(shape) != 1 for shape in shapes) or not hasattr(env.action_space, "low"):
            raise ValueError(
                f"the tasks' observations and actions must be vectors, got {env.observation_space} and {env.action_space} from "
                f"{name!r}: change it by a wrapper."
            )
    first = _described(envs[0])
    for env, name in zip(envs, names, strict=True):
        for what, expected in first.items():
            got = _described(env)[what]
            if got != expected:
                raise ValueError(
                    f"the tasks must have equal spaces: the {what} of {names[0]!r} is {expected}, that of {name!r} is {got}; "
                    "choose tasks of one robot, or make them equal by wrappers."
                )


def _described(env: Any) -> dict[str, str]:
    low, high = (", ".join(f"{number:g}" for number in sorted(set(bound))) for bound in _bounds(env))
    (features,), (size,) = env.observation_space.shape, env.action_space.shape
    return {"observation": f"{features} numbers", "action": f"{size} numbers in [{low}] to [{high}]"}


def _bounds(env: Any) -> tuple[list[float], list[float]]:
    return env.action_space.low.tolist(), env.action_space.high.tolist()
