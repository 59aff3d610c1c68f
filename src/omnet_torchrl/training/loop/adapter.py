"""An environment of TorchRL as one of gymnasium: what is true of these is then true of it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from tensordict import TensorDictBase
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp


class TorchRLAdapter(gymnasium.Env):
    """A single environment of TorchRL with a vector ``"observation"`` and one action.

    Args:
        env (EnvBase): without batch size.

    Raises:
        ValueError: a batch size, no ``"observation"``, or several actions.
    """

    def __init__(self, env: EnvBase):
        keys = list(env.observation_spec.keys(True, True))
        if env.batch_size.numel() != 1 or "observation" not in keys or len(env.action_keys) != 1:
            expected = "one environment without batch size, with an 'observation' and one action"
            got = f"batch size {tuple(env.batch_size)}, observations {keys} and actions {env.action_keys}"
            raise ValueError(f"a TorchRL environment must be {expected}, got {got}: change it by its transforms.")
        self.torchrl_env = env
        self.observation_space, self.action_space = map(_space, (env.observation_spec["observation"], env.action_spec))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Reset it, with a seed of its own where one is given."""
        super().reset(seed=seed)
        if seed is not None:
            self.torchrl_env.set_seed(seed)
        self._state = self.torchrl_env.reset()
        return self._observation(self._state), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, Any, Any, dict]:
        """Step it, and carry what it reads beside the action."""
        env = self.torchrl_env
        given = torch.from_numpy(action).to(env.device, env.action_spec.dtype).reshape(env.action_spec.shape)
        step = env.step(self._state.set(env.action_key, given))
        self._state, following = step_mdp(step), step.get("next")
        terminated, done = (following.get(key).item() for key in ("terminated", "done"))
        return self._observation(following), following.get("reward").item(), terminated, done and not terminated, {}

    def close(self) -> None:
        """Close it, unless it is."""
        if not self.torchrl_env.is_closed:
            self.torchrl_env.close()

    def _observation(self, state: TensorDictBase) -> np.ndarray:
        return state.get("observation").reshape(self.observation_space.shape).numpy(force=True)


def _space(spec: TensorSpec) -> gymnasium.Space:
    """A Box of the spec's bounds; whether they are those of a vector is checked later."""
    space, dtype = spec.space, np.dtype(str(spec.dtype).split(".")[1])
    if dtype.kind == "f" and hasattr(space, "low"):
        return Box(space.low.numpy(force=True), space.high.numpy(force=True), dtype=dtype.type)
    return Box(-np.inf, np.inf, spec.shape, np.float32)
