"""Environment transforms: what is drawn for an episode, and which subnetwork plays it.

Section 3.3 of https://arxiv.org/abs/2310.14009: "for each episode, we randomly select one subnetwork from the actor to make
decisions, and we maintain the use of the same subnetwork throughout each episode". A draw is a key of the environment's
TensorDict, written at reset and carried through the steps.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import weakref
from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.utils import expand_as_right
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.transforms import TensorDictPrimer


class EpisodePrimer(TensorDictPrimer):
    """A key that is drawn for each environment at each reset, and kept until the next; a subclass says what.

    It is a :class:`~torchrl.envs.TensorDictPrimer`: collectors that register a policy's transforms by themselves
    (``auto_register_policy_transforms=True``) see that it is there and add no second one.

    Args:
        key (NestedKey): where the draw is written.
        spec (TensorSpec): of a single draw.

    Keyword Args:
        generator (torch.Generator, int or None): where the draws come from. A generator is used as it is, and primers that
            share one draw from one stream. An integer seeds a stream of this primer's own; primers *of one process* with one
            integer, or with one ``state_dict``, repeat each other (inside a :class:`~torchrl.envs.SerialEnv`, share a generator
            or leave the seed out). ``None`` (default) seeds a stream from torch's global generator at the first draw; a spawned
            worker has a global generator of its own, which ``torch.manual_seed`` in the main process does not reach.
            In a worker process all three only seed a stream, together with the worker's place among its parent's processes:
            workers differ, and a program that is run again repeats itself.
        reset_key (NestedKey or None): see :class:`~torchrl.envs.TensorDictPrimer`.

    Raises:
        TypeError: a generator of another type.
        KeyError: a step without the key.
        ValueError: the environment resets only a group of entries, to which the key does not belong.

    .. note:: ``env.set_seed`` reaches no transform in TorchRL: seed a primer with :meth:`set_seed`.
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
        self.set_seed(generator)

    @property
    def generator(self) -> torch.Generator:
        """The generator from which this primer draws in this process."""
        self._decide()
        worker = multiprocessing.current_process()._identity
        if isinstance(self._source, torch.Generator) and not worker and not self._number:
            return self._source
        if os.getpid() not in self._streams:
            # Workers inherit one seed, generator or global state from their parent: who they are makes their streams differ.
            clone = (self.key, self._number) if self._number else ()
            stream = repr((self._seed(), worker, *self._purpose, *clone))
            digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
            self._streams[os.getpid()] = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return self._streams[os.getpid()]

    def _seed(self) -> int:
        if isinstance(self._source, int):
            return self._source
        source = torch.default_generator if self._source is None else self._source
        if self._number:  # a clone takes no number out of another's stream
            return source.initial_seed()
        return int(torch.randint(2**62, (), generator=source, device=source.device))

    def set_seed(self, seed: torch.Generator | int | None) -> None:
        """Draw from now on what a primer built with ``generator=seed`` draws; copies in worker processes go on as before."""
        if isinstance(seed, bool) or not isinstance(seed, int | torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator, an int or None, got {seed!r}.")
        self._source = seed
        self._streams: dict[int, torch.Generator] = {}
        # Clones of one primer count those among them that have a stream of their own. The number of all others is 0.
        self._clones, self._number = [0], 0
        # Gives the environment where a clone was made, until it is decided which stream the clone draws from.
        self._home: Callable[[], EnvBase | None] | None = None

    def clone(self) -> EpisodePrimer:
        """Return a copy without an environment, which draws from a stream of its own once it is in another environment.

        The stream follows from the seed, and from how many clones have drawn; the original goes on as if there were no clone.
        In the original's environment, where TorchRL puts clones when it inserts transforms, the clone continues its stream.
        """
        clone, home = super().clone(), self._base_env()
        clone._home = (lambda: None) if home is None else weakref.ref(home)
        return clone

    def _decide(self) -> None:
        """Begin a stream of its own, where this is a clone in another environment than its original's."""
        if self._home is not None:
            home, self._home = self._home(), None
            if home is None or home is not self._base_env():
                self._clones[0] += 1
                self._number, self._streams = self._clones[0], {}

    def _base_env(self) -> EnvBase | None:
        try:
            return getattr(self.container, "base_env", None)
        except ValueError:  # in a Compose that is in no environment
            return None

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Declare the key among the observations, and among the inputs, since each step reads it."""
        *group, _ = (self.reset_key,) if isinstance(self.reset_key, str) else self.reset_key
        path = (self.key,) if isinstance(self.key, str) else self.key
        if path[: len(group)] != tuple(group):
            raise ValueError(
                f"{self.key!r} would be drawn once and never again: TorchRL resets by {self.reset_key!r} only what is "
                f"within {tuple(group)}. Use key={(*group, path[-1])!r}."
            )
        # Made anew for each environment: TensorDictPrimer's, once expanded, fits no environment of another batch size.
        shape, device = self._shape(observation_spec.shape), observation_spec.device
        if isinstance(self.key, tuple) and self.key[:-1] not in observation_spec.keys(True):
            observation_spec[self.key[:-1]] = Composite(shape=shape, device=device)
        observation_spec[self.key] = self._spec(shape, device)
        return observation_spec

    def _shape(self, batch_size: torch.Size) -> torch.Size:
        """Return ``batch_size`` and, where the key is nested in a group of the observation, the group's own dimensions."""
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
        """Return the spec of the draws where the environment's batch, or the group of observations, has this shape."""
        raise NotImplementedError

    def _draw_for(self, tensordict_reset: TensorDictBase) -> Tensor:
        """Draw for every environment of a reset."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """Return the generator's state, so that an environment's ``state_dict`` repeats the draws that follow."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from the state of another primer's generator."""
        self.generator.set_state(state.cpu())

    def __getstate__(self) -> dict:
        # A pickled or copied primer starts its stream anew in the process that receives it.
        self._decide()
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
            another shape than the environment's; see also :class:`EpisodePrimer`.

    Examples:
        >>> from torchrl.envs import GymEnv, SerialEnv, TransformedEnv
        >>> env = TransformedEnv(SerialEnv(3, lambda: GymEnv("Pendulum-v1")), SubnetPrimer(5, generator=0))
        >>> env.reset()["subnet"].shape
        torch.Size([3])
        >>> env.transform.set_seed(1)  # env.set_seed(1) does not seed it
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
