"""Who steps the environments of training: this process, or workers, which go on while the networks are updated.

With workers, frames come in batches of ``collect.steps`` steps of every environment. When a batch has arrived, all workers get
the weights as they are then and begin the next one, while the updates of the batch that is there are made: its steps are given
to the loop one after the other, as those of a run without workers. So a policy lacks the updates of the batch before its own,
and of its own; which ones depends on frames alone, and a run of a seed repeats itself, however fast each worker is.
"""

from __future__ import annotations

import contextlib
import copy
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from omnet_torchrl.training.loop.environments import env_options, make_env, primers
from omnet_torchrl.training.loop.stopping import ENDING, NOTICE, RunError
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.record.files import one_line
from omnet_torchrl.transforms import SubnetPrimer

VERSION = ("next", "policy_version")  # TorchRL's count of the weights that a frame's action was chosen with
ENDLESS = 2**40  # batches
LOOK_S = 0.2  # how often the workers are looked at while one is waited for
REST_S = 10.0  # how long a worker may take to end what it does


def make_collector(
    config: TrainConfig, env: EnvBase, policy: TensorDictModuleBase, device: torch.device | str = "cpu"
) -> Collector | Workers:
    """What gives the frames of a run, one step of each environment at a time.

    Args:
        config (TrainConfig): the options, ``collect`` among them.
        env (EnvBase): of :func:`~omnet_torchrl.training.make_env`, with a :class:`~omnet_torchrl.SubnetPrimer`. With workers it
            is closed: each makes one of its own.
        policy (TensorDictModuleBase): acts on ``device``; in workers a copy does, on the CPU.
        device (torch.device or str): of the policy.
    """
    if config.collect.backend != "direct":
        return Workers(config, env, policy)
    return Collector(
        env,
        policy,
        frames_per_batch=env.batch_size.numel(),
        init_random_frames=config.init_random_frames,
        policy_device=device,
        env_device="cpu",
        storing_device="cpu",
        auto_register_policy_transforms=False,
        track_traj_ids=False,
        return_same_td=True,  # each frame is stored before the next one
    )


class Workers:
    """TorchRL's synchronous collector of processes or of Ray, one batch ahead of the updates.

    Each worker has seeds of its own, which follow from the run's: of its environments, of the subnetworks of its episodes, and
    of its exploration. No worker is there before the first frame is asked for. Arguments are those of :func:`make_collector`.
    """

    def __init__(self, config: TrainConfig, env: EnvBase, policy: TensorDictModuleBase):
        self.config, self.env, self.policy = config, env, policy
        self.frames_per_batch = config.environments  # that the loop gets at a time
        self.policy_age = 0  # frames between the weights that chose the newest actions, and those that these were stored with
        self._primer = next(each for each in primers(env) if isinstance(each, SubnetPrimer))
        self._frames, self._sent = 0, [0]  # that were given to the loop; of these, those before each version of the weights
        self._collector: Any = None
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._busy = False  # whether an answer is due
        env.close()

    def __iter__(self) -> Iterator[TensorDictBase]:
        self._start()
        batches = iter(self._collector)
        self._send_weights()
        self._begin(partial(next, batches))
        while True:
            batch = self._answer()
            self._send_weights()
            self._begin(partial(next, batches))
            # (workers, steps), with num_envs environments between the two: the time comes first.
            for step in batch.reshape(self.config.collect.num_workers, -1, self.config.collect.steps).permute(2, 0, 1):
                self._frames += step.numel()
                self.policy_age = self._frames - self._sent[int(step.get(VERSION).min())]
                yield step.reshape(-1)

    def _start(self) -> None:
        collect, threads = self.config.collect, torch.get_num_threads()
        given = self.env.batch_size, self._primer.num_subnets, self._primer.key
        make = [partial(make_worker_env, self.config, *given, worker) for worker in range(collect.num_workers)]
        each: dict[str, Any] = {"auto_register_policy_transforms": False, "track_policy_version": True}
        if collect.backend == "process":
            # Without "num_threads", TorchRL would leave this process fewer of them.
            options = {**each, "num_threads": threads, "init_fn": ignore_signals, "cat_results": "stack"}
        else:
            cluster = "RAY_ADDRESS" in os.environ  # which has processors of its own
            local: dict[str, Any] = {} if cluster else {"num_cpus": collect.num_workers}
            local |= {"include_dashboard": False, "logging_level": "error"}
            options = {"collector_kwargs": each, "ray_init_config": local, "remote_configs": {"num_cpus": 1}}
        frames = self.config.environments * collect.steps
        devices = dict.fromkeys(("policy_device", "env_device", "storing_device"), "cpu")
        try:
            self._collector = Collector(
                make,
                copy.deepcopy(self.policy).to("cpu"),  # the updates of this one's weights are not seen before they are sent
                backend=collect.backend,
                sync=True,
                frames_per_batch=frames,
                total_frames=frames * ENDLESS,
                init_random_frames=self.config.init_random_frames,
                backend_options=options,
                **devices,
            )
        except Exception as error:
            why = one_line(error).split(" Worker traceback:")[0]
            raise RunError(f"the workers of collect.backend={collect.backend} could not be started: {why}") from error

    def _send_weights(self) -> None:
        weights = TensorDict.from_module(self.policy).data.to("cpu")
        self._sent.append(self._frames)
        self._begin(lambda: self._collector.update_policy_weights_(weights))
        self._answer()

    def _begin(self, work: Callable[[], Any]) -> None:
        """Have a thread do what waits for workers: one that never answers does not keep this process from its end."""

        def answer() -> None:
            try:
                self._answers.put((work(), None))
            except Exception as error:
                self._answers.put((None, error))

        self._busy = True
        threading.Thread(target=answer, daemon=True).start()

    def _answer(self) -> Any:
        """What the thread has got; a :class:`RunError` where a worker is not there any more."""
        while True:
            error, dead = None, self._dead()
            try:
                answer, error = self._answers.get(timeout=LOOK_S)
                self._busy = False
                if error is None:
                    return answer
            except queue.Empty:
                if not dead:
                    continue
            why = ", ".join(dead or self._dead()) or one_line(getattr(error, "cause", None) or error or RuntimeError())
            raise RunError(f"collecting with collect.backend={self.config.collect.backend} has failed: {why}") from error

    def _dead(self) -> list[str]:
        """The processes that have ended, and how; an error of an environment is on the terminal."""
        codes = {}
        for number, process in enumerate(getattr(self._collector, "procs", ())):
            with contextlib.suppress(ValueError):  # one that TorchRL has closed says nothing any more
                codes[number] = process.exitcode
        return [f"worker {number} has ended with exit code {code}" for number, code in codes.items() if code is not None]

    def shutdown(self) -> None:
        """End the workers: those that don't end by themselves are killed."""
        if self._collector is None:
            return
        collector, self._collector = self._collector, None
        threads = torch.get_num_threads()
        if self._busy:
            with contextlib.suppress(queue.Empty):
                self._answers.get(timeout=REST_S)
        collector.shutdown(timeout=REST_S)
        torch.set_num_threads(threads)


def make_worker_env(config: TrainConfig, batch_size: torch.Size, num_subnets: int, key: Any, worker: int) -> EnvBase:
    """The environments of a worker, within it: they, what their transforms draw and its exploration have seeds of its own."""
    seed = derived_seed(config.seed, "environments", worker)
    num_envs = batch_size.numel() if batch_size else None
    options = {"observation_offset": config.observation_offset, **env_options(config)}
    env = make_env(config.env, SubnetPrimer(num_subnets, key=key), num_envs=num_envs, seed=seed, **options)
    for primer in primers(env):  # by themselves, they would draw by how many processes there have been
        primer.generator.manual_seed(derived_seed(config.seed, type(primer).__name__, worker))
    torch.manual_seed(derived_seed(config.seed, "exploration", worker))
    return env


def ignore_signals() -> None:
    """In a worker: what ends a run comes to all processes of a terminal or a job, and the run ends its workers itself."""
    for number in (*ENDING, *NOTICE):
        signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited by a simulator that an environment starts and ends
