"""Collectors with subnet sampling: who draws the index, where, in how many environments."""

import gc
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import Compose, DoubleToFloat, EnvBase, GymEnv, InitTracker, SerialEnv, TransformedEnv

from omnet_torchrl import SubnetPrimer, make_actor

COLLECTORS = {"Collector": Collector, "MultiSync": MultiSyncCollector, "MultiAsync": MultiAsyncCollector}


class ZeroWork(EnvBase):
    """An environment of Hopper's sizes that computes nothing: what is left is the collector."""

    def __init__(self):
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded((11,)))
        self.action_spec, self.reward_spec = Bounded(-1, 1, (3,)), Unbounded((1,))
        self._state = {"observation": torch.zeros(11), "done": torch.zeros(1, dtype=torch.bool)}

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        return TensorDict({**self._state, "terminated": self._state["done"].clone()})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return TensorDict({**self._state, "reward": torch.zeros(1), "terminated": self._state["done"].clone()})

    def _set_seed(self, seed: int | None) -> None:
        pass


class Make:
    """Makes ``num_envs`` environments with a primer outside, inside or nowhere; picklable, for workers."""

    def __init__(self, name: str, placement: str, num_envs: int):
        self.name, self.placement, self.num_envs = name, placement, num_envs

    def one(self) -> EnvBase:
        """One of them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the paper's -v4 tasks announce their successors
            env = ZeroWork() if self.name == "ZeroWork" else GymEnv(self.name)
        env = TransformedEnv(env, Compose(DoubleToFloat(), InitTracker()))
        return env.append_transform(SubnetPrimer(5)) if self.placement == "inside" else env

    def __call__(self) -> EnvBase:
        """The environments."""
        env = self.one() if self.num_envs == 1 else SerialEnv(self.num_envs, self.one)
        return TransformedEnv(env, SubnetPrimer(5), auto_unwrap=True) if self.placement == "outside" else env


class Collecting(Iterator[TensorDictBase]):
    """An endless stream of batches of a collector, which others may take turns with.

    Args:
        env (str): a gymnasium id or ``ZeroWork``.
        placement (str): of the primer: ``none``, ``outside``, ``inside``, or ``policy``, which the collector asks for it.

    Keyword Args:
        indexed (bool): act with all subnetworks, by the index, instead of with the dense ``extract(0)``, which ignores it: the
            same policy with and without a primer leaves the primer's own cost.
        collector (str): one of ``COLLECTORS``; those with workers have two, or one for one environment.
        num_envs (int): environments in all.
        frames_per_batch (int): frames of a batch, of all environments.
    """

    def __init__(
        self,
        env: str,
        placement: str,
        *,
        indexed: bool = False,
        collector: str = "Collector",
        num_envs: int = 1,
        frames_per_batch: int = 200,
    ):
        workers = 1 if collector == "Collector" else min(2, num_envs)
        make = Make(env, placement, num_envs // workers)
        proof = make.one()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # one policy everywhere: others have other episodes, and resets are a good part of the time
            actor = make_actor(proof.observation_spec, proof.action_spec)
        proof.close()
        policy = actor if indexed or placement == "policy" else actor.extract(0)
        self._collector = COLLECTORS[collector](
            make if collector == "Collector" else [make] * workers,
            policy,
            frames_per_batch=frames_per_batch,
            total_frames=-1,
            auto_register_policy_transforms=placement == "policy",
        )
        self._collector.set_seed(0)
        self._batches = iter(self._collector)

    def __next__(self) -> TensorDictBase:
        return next(self._batches)

    def rest(self) -> None:
        """Stop the workers, until :meth:`wake`; those that collect by themselves would never wait for long.

        A worker of a ``MultiAsyncCollector`` whose batch nobody fetches for a second drops it and collects another one.
        """
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let the workers go on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Shut the collector down."""
        self.wake()
        self._batches.close()
        self._collector.shutdown()
        # What sends weights to workers stops when it is collected; in the last moments of the process that waits for ever.
        del self._batches, self._collector
        gc.collect()

    def _signal(self, number: signal.Signals) -> None:
        for process in getattr(self._collector, "procs", ()):
            os.kill(process.pid, number)


def collect_block(
    env: str, placement: str, *, num_envs: int = 1, frames: int = 200, **kwargs: Any
) -> Callable[[], TensorDictBase]:
    """A batch of a collector, so many frames of each environment; the n-th is the same in every placement."""
    batches = Collecting(env, placement, num_envs=num_envs, frames_per_batch=frames * num_envs, **kwargs)
    seeds = itertools.count()

    def block() -> TensorDictBase:
        torch.manual_seed(next(seeds))
        return next(batches)

    block()
    return block
