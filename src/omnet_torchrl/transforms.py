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
from tensordict import NestedKey, TensorDictBase
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
        fixed (int, Tensor or None): play this subnetwork in every episode instead of a random one, e.g. in evaluation; an int, or
            an int64 tensor with one index per environment. Can be set later (``primer.fixed = 3``). Defaults to ``None``.
        generator (torch.Generator, int or None): where the draws come from.
            A generator is used as it is; primers that share one draw from one stream.
            An integer seeds a stream of this primer's own; worker processes derive different streams from the same seed. (Several
            primers *in one process* built with the same integer repeat each other: inside a :class:`~torchrl.envs.SerialEnv` leave
            the seed out, share a generator, or better put one primer outside.)
            ``None`` (default) seeds a stream from torch's global generator at the first draw, and from the process it runs in, so
            that forked workers, which inherit one global state, differ.
        reset_key (NestedKey or None): see :class:`~torchrl.envs.TensorDictPrimer`.

    Keys:
        Written at reset and carried at each step: ``key``, int64, of the environment's batch size.

    Raises:
        ValueError, TypeError: ``num_subnets`` below 1; ``fixed`` outside ``[0, num_subnets)`` or not int64.

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
        self.num_subnets, self.key = num_subnets, key
        self.fixed = fixed
        self._seed = generator if isinstance(generator, int) else None
        self._shared = generator if isinstance(generator, torch.Generator) else None
        self._own: tuple[int, torch.Generator] | None = None

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
        if self._shared is not None:
            return self._shared
        if self._own is None or self._own[0] != os.getpid():
            seed = self._seed if self._seed is not None else int(torch.randint(2**62, ()))
            # A worker inherits the seed or the global state of its parent: who it is makes its stream its own.
            stream = repr((seed, multiprocessing.current_process()._identity))
            digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
            self._own = os.getpid(), torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return self._own[1]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write a draw for each element of ``tensordict``, without an environment."""
        return tensordict.set(self.key, self._draw(tensordict.batch_size, tensordict.device))

    def _reset_func(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        # Environments that are not reset keep their subnetwork. All draw, so that a stream does not depend on who is reset.
        value = self._draw(tensordict_reset.batch_size, tensordict_reset.device)
        previous = tensordict.get(self.key, None)
        reset = tensordict.get(self.reset_key, None)
        if reset is not None and previous is not None:
            value = torch.where(expand_as_right(reset.reshape(value.shape), value), value, previous)
        return tensordict_reset.set(self.key, value)

    def _draw(self, shape: torch.Size, device: torch.device | None) -> Tensor:
        if self.fixed is not None:
            return self.fixed.expand(shape).to(device, copy=True)
        generator = self.generator
        return torch.randint(self.num_subnets, shape, generator=generator, device=generator.device).to(device)

    def get_extra_state(self) -> Tensor:
        """State of the generator, so that an environment's ``state_dict`` repeats the draws that follow."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def __getstate__(self) -> dict:
        # A pickled or copied primer starts a stream of its own in the process that receives it.
        return {**self.__dict__, "_own": None}

    def __repr__(self) -> str:
        fixed = None if self.fixed is None else self.fixed.tolist()
        return f"{type(self).__name__}(num_subnets={self.num_subnets}, key={self.key!r}, fixed={fixed})"
