"""What is around a run's policy: TorchRL's noise for a deterministic one, and the running statistics that it begins with."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import AdditiveGaussianModule, EGreedyModule

from omnet_torchrl.layers import RunningNormalization
from omnet_torchrl.training.options import TrainConfig, row
from omnet_torchrl.updates import CompiledPolicy


class Exploring(TensorDictModuleBase):
    """A policy of TD3 or DQN that explores: Gaussian noise on the action, or a random action with probability epsilon.

    Its ``state_dict`` is the policy's: the noise follows from options and frames.

    Args:
        policy (CompiledPolicy): what acts.
        config (TrainConfig): the options, ``exploration`` among them.
        action_spec (TensorSpec): of the environment.
    """

    def __init__(self, policy: CompiledPolicy, config: TrainConfig, action_spec: TensorSpec):
        super().__init__()
        self.policy, self.options = policy, config.exploration
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys
        device, key = next(policy.actor.parameters()).device, policy.actor.action_key
        spec = action_spec.to(device)
        if row(config.algorithm).loss == "dqn":
            start, end = self.options.epsilon_start, self.options.epsilon_end
            self.noise: Any = EGreedyModule(
                spec, eps_init=max(start, end), eps_end=min(start, end), action_key=key, device=device
            )
        else:
            sigma = float(self.options.noise)
            self.noise = AdditiveGaussianModule(spec, sigma_init=sigma, sigma_end=sigma, action_key=key, device=device)
            self.noise.std = (spec.space.high - spec.space.low) / 2
        self.set_frames(0)

    def set_frames(self, frames: int) -> None:
        """Explore as a run does at this frame."""
        if isinstance(self.noise, EGreedyModule):
            part = min(frames / self.options.epsilon_frames, 1.0)
            self.noise.eps.fill_(self.options.epsilon_start + part * (self.options.epsilon_end - self.options.epsilon_start))

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write an action; a random one under ``ExplorationType.RANDOM`` alone."""
        tensordict = self.policy(tensordict)
        return self.noise(tensordict) if exploration_type() in (None, ExplorationType.RANDOM) else tensordict

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The policy's."""
        return self.policy.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's."""
        return self.policy.load_state_dict(*args, **kwargs)


def normalizations(policy: nn.Module, config: TrainConfig) -> list[RunningNormalization]:
    """The running statistics of a policy; a ``ValueError`` unless there are some just where the options ask for them."""
    found = [each for each in policy.modules() if isinstance(each, RunningNormalization)]
    if bool(found) != config.normalize_observations:
        got = f"normalize_observations={str(config.normalize_observations).lower()} and {len(found) or 'none'}"
        raise ValueError(f"the policy must have running statistics where normalize_observations is true, got {got}.")
    return found
