"""Environment transforms: which subnetwork plays an episode.

Section 3.3 of https://arxiv.org/abs/2310.14009: "for each episode, we randomly select one subnetwork from the actor to make
decisions, and we maintain the use of the same subnetwork throughout each episode". The draw is a key of the environment's
TensorDict, made at reset and carried through the steps; the actor only reads it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.utils import expand_as_right
from torch import Tensor
from torchrl.data import Categorical, Composite
from torchrl.envs.transforms import TensorDictPrimer


class SubnetPrimer(TensorDictPrimer):
    """Draw a subnetwork for each environment at each reset, and keep it until the next.

    Uniform over ``[0, num_subnets)`` and independent between environments and episodes. It is a
    :class:`~torchrl.envs.TensorDictPrimer`: collectors that register a policy's transforms by themselves
    (``auto_register_policy_transforms=True``) see that it is there and add no second one.

    Args:
        num_subnets (int): number of subnetworks of the actor, N.

    Keyword Args:
        key (NestedKey): where the index is written. Defaults to ``"subnet"``.
        fixed (int, Tensor or None): play this subnetwork in every episode instead of a random one, e.g. in evaluation; an int,
            or an int64 tensor with one index per environment. Can be set later (``primer.fixed = 3``). Defaults to ``None``.
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
        spec = Composite({key: Categorical(num_subnets, shape=(), dtype=torch.int64)})
        super().__init__(spec, random=True, expand_specs=True, reset_key=reset_key)
        self.num_subnets, self.key = num_subnets, unravel_key(key)
        self.fixed = fixed
        if isinstance(generator, bool) or not isinstance(generator, int | torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator, an int or None, got {generator!r}.")
        self._source = generator
        self._streams: dict[int, torch.Generator] = {}

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

    @property
    def generator(self) -> torch.Generator:
        """The generator of this primer in this process."""
        worker = multiprocessing.current_process()._identity
        if isinstance(self._source, torch.Generator) and not worker:
            return self._source
        if os.getpid() not in self._streams:
            # Workers inherit one seed, generator or global state from their parent: who they are makes their streams differ.
            stream = repr((self._seed(), worker))
            digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
            self._streams[os.getpid()] = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return self._streams[os.getpid()]

    def _seed(self) -> int:
        if isinstance(self._source, int):
            return self._source
        source = torch.default_generator if self._source is None else self._source
        return int(torch.randint(2**62, (), generator=source, device=source.device))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write a draw for each element of ``tensordict``, without an environment."""
        group = tensordict.get(self.key[:-1], None) if isinstance(self.key, tuple) else None
        shape = tensordict.batch_size if group is None else group.batch_size
        return tensordict.set(self.key, self._draw(shape, tensordict.device))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Declare the index: among the observations, and among the inputs, since each step reads it."""
        # Made anew for each environment: TensorDictPrimer's, once expanded, fits no environment of another batch size.
        shape, device = self._shape(observation_spec.shape), observation_spec.device
        if isinstance(self.key, tuple) and self.key[:-1] not in observation_spec.keys(True):
            observation_spec[self.key[:-1]] = Composite(shape=shape, device=device)
        observation_spec[self.key] = Categorical(self.num_subnets, shape, device, torch.int64)
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
        # Environments that are not reset keep their subnetwork. All draw, so that a stream does not depend on who is reset.
        value = self._draw(self._shape(tensordict_reset.batch_size), tensordict_reset.device)
        previous = tensordict.get(self.key, None)
        reset = tensordict.get(self.reset_key, None)
        if reset is not None and previous is not None:
            if reset.ndim > value.ndim:
                reset = reset.flatten(value.ndim).any(-1)
            value = torch.where(expand_as_right(reset, value), value, previous)
        return tensordict_reset.set(self.key, value)

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

    def get_extra_state(self) -> Tensor:
        """State of the generator, so that an environment's ``state_dict`` repeats the draws that follow."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from the state of another primer's generator."""
        self.generator.set_state(state.cpu())

    def __getstate__(self) -> dict:
        # A pickled or copied primer starts its stream anew in the process that receives it.
        return {**super().__getstate__(), "_streams": {}}

    def __repr__(self) -> str:
        fixed = None if self.fixed is None else self.fixed.tolist()
        return f"{type(self).__name__}(num_subnets={self.num_subnets}, key={self.key!r}, fixed={fixed})"
