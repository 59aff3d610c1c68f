"""Environment transforms: what is drawn for an episode, which subnetwork plays it and how far its observations are off.

Section 3.3 of https://arxiv.org/abs/2310.14009: "for each episode, we randomly select one subnetwork from the actor to make
decisions, and we maintain the use of the same subnetwork throughout each episode"; section 4.4: "for each episode, we sample
an observation noise", which "remains constant throughout an episode". Both are a key of the environment's TensorDict, drawn
at reset and carried through the steps.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
from collections.abc import Iterable

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.utils import expand_as_right
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec
from torchrl.envs.transforms import TensorDictPrimer


class EpisodePrimer(TensorDictPrimer):
    """A key that is drawn for each environment at each reset, and kept until the next; a subclass says what.

    It is a :class:`~torchrl.envs.TensorDictPrimer`: collectors that register a policy's transforms by themselves
    (``auto_register_policy_transforms=True``) see that it is there and add no second one.

    Args:
        key (NestedKey): where the draw is written.
        spec (TensorSpec): of a single draw.

    Keyword Args:
        generator (torch.Generator, int or None): where the draws come from.
            A generator is used as it is; primers that share one draw from one stream.
            An integer seeds a stream of this primer's own. (Several primers *in one process* built with the same integer
            repeat each other, as do any that load one ``state_dict``: inside a :class:`~torchrl.envs.SerialEnv` leave the
            seed out, share a generator, or better put one primer outside.)
            ``None`` (default) seeds a stream from torch's global generator at the first draw. (A spawned worker has a global
            generator of its own, which ``torch.manual_seed`` in the main process doesn't reach: give such workers an integer.)
            In a worker process all three only seed a stream, together with the worker's place among the processes that its
            parent started: workers differ, and a program that is run again repeats itself (but a run inside a pool's
            worker doesn't repeat one outside).
        reset_key (NestedKey or None): see :class:`~torchrl.envs.TensorDictPrimer`.

    Raises:
        TypeError: a generator of another type.
        KeyError: a step without the key.
    """

    # Tells the streams of different kinds of draws apart that have one seed.
    _purpose: tuple[str, ...] = ()

    def __init__(
        self,
        key: NestedKey,
        spec: TensorSpec,
        *,
        generator: torch.Generator | int | None = None,
        reset_key: NestedKey | None = None,
    ):
        super().__init__(Composite({key: spec}), random=True, expand_specs=True, reset_key=reset_key)
        self.key = unravel_key(key)
        if isinstance(generator, bool) or not isinstance(generator, int | torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator, an int or None, got {generator!r}.")
        self._source = generator
        self._streams: dict[int, torch.Generator] = {}

    @property
    def generator(self) -> torch.Generator:
        """The generator of this primer in this process."""
        worker = multiprocessing.current_process()._identity
        if isinstance(self._source, torch.Generator) and not worker:
            return self._source
        if os.getpid() not in self._streams:
            # Workers inherit one seed, generator or global state from their parent: who they are makes their streams differ.
            stream = repr((self._seed(), worker, *self._purpose))
            digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
            self._streams[os.getpid()] = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return self._streams[os.getpid()]

    def _seed(self) -> int:
        if isinstance(self._source, int):
            return self._source
        source = torch.default_generator if self._source is None else self._source
        return int(torch.randint(2**62, (), generator=source, device=source.device))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Declare the key: among the observations, and among the inputs, since each step reads it."""
        # Made anew for each environment: TensorDictPrimer's, once expanded, fits no environment of another batch size.
        shape, device = self._shape(observation_spec.shape), observation_spec.device
        if isinstance(self.key, tuple) and self.key[:-1] not in observation_spec.keys(True):
            observation_spec[self.key[:-1]] = Composite(shape=shape, device=device)
        observation_spec[self.key] = self._spec(shape, device)
        return observation_spec

    def _shape(self, batch_size: torch.Size) -> torch.Size:
        """``batch_size`` and, where the key is nested in a group of the observation, the group's own dimensions."""
        spec = self.parent.full_observation_spec
        if isinstance(self.key, str) or self.key[:-1] not in spec.keys(True):
            return batch_size
        return batch_size + spec[self.key[:-1]].shape[spec.ndim :]

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        # TensorDictPrimer keeps a ("next", key) that is there already, but only an earlier step can have left one.
        value = tensordict.get(self.key, None)
        if value is None:
            raise KeyError(
                f"the TensorDict has no {self.key!r}, which is drawn at reset and carried from step to step: step what "
                "env.reset() or env.step_mdp() returned."
            )
        return next_tensordict.set(self.key, value)

    def _reset_func(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        # Environments that are not reset keep what they have. All draw, so that a stream does not depend on who is reset.
        value = self._draw_for(tensordict_reset)
        previous = tensordict.get(self.key, None)
        reset = tensordict.get(self.reset_key, None)
        if reset is not None and previous is not None:
            if reset.ndim > value.ndim:
                reset = reset.flatten(value.ndim).any(-1)
            value = torch.where(expand_as_right(reset, value), value, previous)
        return tensordict_reset.set(self.key, value)

    def _spec(self, shape: torch.Size, device: torch.device | None) -> TensorSpec:
        """Of the draws of an environment whose batch, or whose group of observations, has this shape."""
        raise NotImplementedError

    def _draw_for(self, tensordict_reset: TensorDictBase) -> Tensor:
        """Draw for every environment of a reset."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """State of the generator, so that an environment's ``state_dict`` repeats the draws that follow."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from the state of another primer's generator."""
        self.generator.set_state(state.cpu())

    def __getstate__(self) -> dict:
        # A pickled or copied primer starts its stream anew in the process that receives it.
        return {**super().__getstate__(), "_streams": {}}


class SubnetPrimer(EpisodePrimer):
    """Draw a subnetwork for each environment at each reset, and keep it until the next.

    Uniform over ``[0, num_subnets)`` and independent between environments and episodes.

    Args:
        num_subnets (int): number of subnetworks of the actor, N.

    Keyword Args:
        key (NestedKey): where the index is written. Defaults to ``"subnet"``.
        fixed (int, Tensor or None): play this subnetwork in every episode instead of a random one, e.g. in evaluation; an int,
            or an int64 tensor with one index per environment. Can be set later (``primer.fixed = 3``). Defaults to ``None``.
        generator, reset_key: see :class:`EpisodePrimer`.

    Keys:
        Written at reset and carried at each step: ``key``, int64, of the environment's batch size, or of the group's where
        ``key`` is nested in one: ``("agents", "subnet")`` draws for each agent.

    Raises:
        ValueError, TypeError: ``num_subnets`` below 1; ``fixed`` outside ``[0, num_subnets)``, not int64 or, at reset, of
            another shape than the environment's; a generator of another type.
        KeyError: a step without the index.

    Examples:
        >>> from torchrl.envs import GymEnv, SerialEnv, TransformedEnv
        >>> env = TransformedEnv(SerialEnv(3, lambda: GymEnv("Pendulum-v1")), SubnetPrimer(5, generator=0))
        >>> env.reset()["subnet"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        num_subnets: int,
        *,
        key: NestedKey = "subnet",
        fixed: int | Tensor | None = None,
        generator: torch.Generator | int | None = None,
        reset_key: NestedKey | None = None,
    ):
        if isinstance(num_subnets, bool) or not isinstance(num_subnets, int) or num_subnets < 1:
            raise ValueError(f"num_subnets must be an int of at least 1, got {num_subnets!r}.")
        super().__init__(key, Categorical(num_subnets, shape=(), dtype=torch.int64), generator=generator, reset_key=reset_key)
        self.num_subnets = num_subnets
        self.fixed = fixed

    @property
    def fixed(self) -> Tensor | None:
        """The index every episode plays, ``()`` or one per environment; ``None`` where it is drawn."""
        return self._fixed

    @fixed.setter
    def fixed(self, value: int | Tensor | None) -> None:
        if value is not None:
            value = torch.as_tensor(value)
            if value.dtype != torch.int64:
                raise TypeError(f"fixed must be an int or an int64 tensor, got {value.dtype}.")
            if ((value < 0) | (value >= self.num_subnets)).any():
                raise ValueError(f"fixed must be in [0, num_subnets={self.num_subnets}), got {value.tolist()}.")
        self._fixed = value

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write a draw for each element of ``tensordict``, without an environment."""
        group = tensordict.get(self.key[:-1], None) if isinstance(self.key, tuple) else None
        shape = tensordict.batch_size if group is None else group.batch_size
        return tensordict.set(self.key, self._draw(shape, tensordict.device))

    def _spec(self, shape: torch.Size, device: torch.device | None) -> Categorical:
        return Categorical(self.num_subnets, shape, device, torch.int64)

    def _draw_for(self, tensordict_reset: TensorDictBase) -> Tensor:
        return self._draw(self._shape(tensordict_reset.batch_size), tensordict_reset.device)

    def _draw(self, shape: torch.Size, device: torch.device | None) -> Tensor:
        if self.fixed is None:
            generator = self.generator
            return torch.randint(self.num_subnets, shape, generator=generator, device=generator.device).to(device)
        try:
            return self.fixed.expand(shape).to(device, copy=True)
        except RuntimeError as error:
            raise ValueError(
                f"fixed must be one index or one per environment, of shape {tuple(shape)}, got shape {tuple(self.fixed.shape)}."
            ) from error

    def __repr__(self) -> str:
        fixed = None if self.fixed is None else self.fixed.tolist()
        return f"{type(self).__name__}(num_subnets={self.num_subnets}, key={self.key!r}, fixed={fixed})"


class ObservationOffset(EpisodePrimer):
    r"""Add a constant to an environment's observations that is drawn for each episode, in training and in evaluation.

    The noise of section 4.4 of the paper (figure 8), :math:`\sigma \sim \mathcal{U}[-\sigma_m, \sigma_m]`: a robot whose
    sensors are off by something else each day. Uniform, and independent between dimensions, environments and episodes.

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
        """Draw for each element of ``tensordict`` and add to its observation, without an environment."""
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
