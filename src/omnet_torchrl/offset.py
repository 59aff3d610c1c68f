"""The noise of an episode's observations.

Section 4.4 of https://arxiv.org/abs/2310.14009: "for each episode, we sample an observation noise", which "remains constant
throughout an episode".
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec

from omnet_torchrl.transforms import EpisodePrimer


class ObservationOffset(EpisodePrimer):
    r"""Add a constant to an environment's observations that is drawn for each episode, in training and in evaluation.

    The noise of section 4.4 of the paper (figure 8), :math:`\sigma \sim \mathcal{U}[-\sigma_m, \sigma_m]`: a robot whose
    sensors have another offset each day. Uniform, and independent between dimensions, environments and episodes.

    Args:
        scale (float): :math:`\sigma_m`, in units of the observation; at least 0.

    Keyword Args:
        per_dimension (bool): draw a number for each dimension of the observation (default), or one for all of them. The paper
            leaves it open.
        observation_key (NestedKey): what is changed. Defaults to ``"observation"``.
        generator, reset_key: see :class:`EpisodePrimer`. A :class:`SubnetPrimer` of the same seed draws other numbers.

    Keys:
        Changes ``observation_key``; its bounds, if it has any, are widened by ``scale``. Written at reset and carried at each
        step: ``observation_offset``, beside it, of its type and shape (not ``per_dimension``: of 1 in each of its dimensions).

    Raises:
        ValueError: a ``scale`` that is negative or no finite number; an environment that computes its next state from the
            observation in the TensorDict, which would be the wrong one.
        TypeError: an observation that is not floating point: append the transform after the one that makes it so.
        KeyError: no observation under ``observation_key``.

    Examples:
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> env = TransformedEnv(GymEnv("Pendulum-v1"), ObservationOffset(0.1, generator=0))
        >>> data = env.rollout(3)
        >>> true = data["observation"] - data["observation_offset"]
    """

    def __init__(
        self,
        scale: float,
        *,
        per_dimension: bool = True,
        observation_key: NestedKey = "observation",
        generator: torch.Generator | int | None = None,
        reset_key: NestedKey | None = None,
    ):
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise ValueError(f"scale must be a finite number of at least 0, got {scale!r}.")
        self.scale, self.per_dimension, self.observation_key = float(scale), per_dimension, unravel_key(observation_key)
        *group, name = (observation_key,) if isinstance(observation_key, str) else observation_key
        key = (*group, f"{name}_offset")
        super().__init__(key, Bounded(-scale, scale, ()), generator=generator, reset_key=reset_key)
        self._purpose = ("offset", repr(self.key))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Draw an offset for each element of ``tensordict`` and add it to the observation, without an environment."""
        return self._add(tensordict.set(self.key, self._draw_for(tensordict)))

    def transform_output_spec(self, output_spec: Composite) -> Composite:
        """Declare the offset, and widen the observation's bounds."""
        output_spec = super().transform_output_spec(output_spec)
        spec, device = output_spec["full_observation_spec"], output_spec.device
        observation = self._observation_spec()
        if isinstance(observation, Bounded):
            low, high = observation.space.low - self.scale, observation.space.high + self.scale
            spec[self.observation_key] = Bounded(low, high, observation.shape, device, observation.dtype)
        return output_spec

    def _observation_spec(self) -> TensorSpec:
        specs = self.parent.full_observation_spec
        self._check(specs.keys(True, True))
        if self.observation_key in self.parent.full_state_spec.keys(True, True):
            raise ValueError(
                f"the environment computes its next state from {self.observation_key!r}: copy it to another key first "
                "(torchrl.envs.RenameTransform with create_copy=True), and change that."
            )
        spec = specs[self.observation_key]
        if not spec.dtype.is_floating_point:
            raise TypeError(f"{self.observation_key!r} must be floating point, got {spec.dtype}: convert it before.")
        return spec

    def _check(self, keys: Iterable[NestedKey]) -> None:
        if self.observation_key not in keys:
            raise KeyError(f"there is no {self.observation_key!r} to add an offset to, only {list(keys)}.")

    def _spec(self, shape: torch.Size, device: torch.device | None) -> Bounded:
        observation = self._observation_spec()
        return Bounded(-self.scale, self.scale, self._offset_shape(observation.shape, len(shape)), device, observation.dtype)

    def _offset_shape(self, shape: torch.Size, batch_dims: int) -> torch.Size:
        return shape if self.per_dimension else torch.Size([*shape[:batch_dims], *(1 for _ in shape[batch_dims:])])

    def _draw_for(self, tensordict_reset: TensorDictBase) -> Tensor:
        self._check(tensordict_reset.keys(True, True))
        observation = tensordict_reset.get(self.observation_key)
        group = tensordict_reset if isinstance(self.observation_key, str) else tensordict_reset.get(self.observation_key[:-1])
        shape, generator = self._offset_shape(observation.shape, group.ndim), self.generator
        uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=observation.dtype)
        return ((2 * uniform - 1) * self.scale).to(observation.device)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._add(super()._step(tensordict, next_tensordict))

    def _reset_func(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._add(super()._reset_func(tensordict, tensordict_reset))

    def _reset_on_native_autoreset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        # The first observation of the new episode came out of a step, with the offset of the old one.
        previous = tensordict.get(self.key)
        tensordict_reset = super()._reset_func(tensordict, tensordict_reset)
        return self._add(tensordict_reset, tensordict_reset.get(self.key) - previous)

    def _add(self, tensordict: TensorDictBase, offset: Tensor | None = None) -> TensorDictBase:
        # Not in place: the observation may be the environment's own tensor.
        offset = tensordict.get(self.key) if offset is None else offset
        return tensordict.set(self.observation_key, tensordict.get(self.observation_key) + offset)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale}, per_dimension={self.per_dimension}, key={self.key!r})"
