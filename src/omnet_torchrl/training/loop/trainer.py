"""The loop: collect, store, update, log, evaluate, save; until the end, or until it is told to stop.

What happens at a frame depends on the frame's number and the seeds alone, so that a run that was stopped and goes on equals one
that was not. Each purpose has a random stream of its own: environments, the index of an episode, exploration, replay, the draws
of an update.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import PrioritizedSampler, ReplayBuffer

from omnet_torchrl.metrics import subnet_disagreement
from omnet_torchrl.training.loop.backends import Workers
from omnet_torchrl.training.loop.exploration import Exploring, normalizations
from omnet_torchrl.training.loop.mask_changes import MaskChanges
from omnet_torchrl.training.loop.resumption import collection_state, compare, load_collection, setting
from omnet_torchrl.training.loop.stopping import AbandonedError, DivergenceError, Stop, check_finite, close_all
from omnet_torchrl.training.loop.streams import GlobalStream, Streams, derived_seed
from omnet_torchrl.training.loop.tasks import episodes, named, sampled, stored, task_labels
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.record.checkpoint import Checkpointer, check_shapes, load_replay
from omnet_torchrl.training.record.files import CheckpointError, one_line
from omnet_torchrl.training.record.reporter import Reporter
from omnet_torchrl.updates import CompiledPolicy, MaskSchedule, Update


class Trainer:
    """Runs a training job over components that it is given.

    Args:
        collector (Collector or Workers): gives one step of each environment at a time (``frames_per_batch`` equal to the number
            of environments), which are of :func:`~omnet_torchrl.training.make_env`; see
            :func:`~omnet_torchrl.training.make_collector`.
        buffer (ReplayBuffer): gets a generator of its own here. A :class:`~omnet_torchrl.GatherStorage` is fast on a CPU.
        update (Update): the update.
        evaluate (callable): takes the number of frames, returns metrics; an :class:`~omnet_torchrl.training.Evaluation`.
        checkpointer (Checkpointer): where the state is kept.
        reporter (Reporter): gets metrics, progress and messages; knows where its log stands, for a checkpoint.
        config (TrainConfig): the run's options, of which the schedule is read: how many frames and updates, when to log, to
            evaluate, to save and to reset (SR-SAC, "Sample-Efficient Reinforcement Learning by Breaking the Replay Ratio
            Barrier", D'Oro et al., 2023), and the seed.
        topology (MaskSchedule or None): changes masks before the updates of a frame, if the options have a ``topology.method``.
            ``None`` (default): masks stay.
    """

    def __init__(
        self,
        collector: Any,
        buffer: ReplayBuffer,
        update: Update,
        evaluate: Callable[[int], Mapping[str, float]],
        checkpointer: Checkpointer,
        reporter: Reporter,
        config: TrainConfig,
        topology: MaskSchedule | None = None,
    ):
        if isinstance(buffer.sampler, PrioritizedSampler):
            raise ValueError("buffer must not have a PrioritizedSampler: the trainer updates no priorities.")
        self.collector, self.buffer, self.update, self.evaluate = collector, buffer, update, evaluate
        self.workers = collector if isinstance(collector, Workers) else None
        self.checkpointer, self.reporter, self.config = checkpointer, reporter, config
        self.masks = MaskChanges(topology, buffer, config)
        self.tasks = task_labels(config.env)
        self.frames = 0
        self.elapsed = 0.0  # seconds, those before a resume included
        self.times = dict.fromkeys(("collect", "sample", "update", "log", "evaluate", "save"), 0.0)  # where they went
        self.last: dict[str, float] = {}  # the newest value of each metric
        self.saved: int | None = None  # the frame of the newest checkpoint
        self._stop = Stop(lambda text: self.reporter.say(text))
        self._diverged = self._evaluation_due = False
        self._metrics: dict[str, Tensor] = {}  # the newest of the update
        self._keys: list[NestedKey] = []  # of what is stored of a frame
        self._log_due = False  # the interval of the log has passed, and no update since
        self._random = Streams(config.seed, update.device, buffer.storage.device)
        buffer.set_rng(self._random.replay)
        self._normalizations = normalizations(collector.policy, config)
        self._batch = TensorDict()  # the newest that an update read

    def resume(self) -> bool:
        """Go on from the newest checkpoint that is whole, if there is one. A warning tells whatever is not as it was.

        Versions and flags are compared, and the environments play their episodes in progress again or, between two episodes,
        the last one. What an environment keeps over more than that is not known.

        Raises:
            ValueError: no checkpoint is whole, or it is of another run.
        """
        loaded = self.checkpointer.load()
        if loaded is None:
            return False
        try:
            self._restore(*loaded)
        except (ValueError, Warning):
            raise
        except Exception as error:  # files that fit their hashes, and are not what a trainer writes
            what = f"{type(error).__name__}: {one_line(error)}"
            raise CheckpointError(f"the newest checkpoint is not one of this run ({what}).") from error
        return True

    def _restore(self, state: dict[str, Any], files: list[Path]) -> None:
        wrong = [name for name, value in self._state().items() if type(state.get(name)) is not type(value)]
        if wrong:
            raise CheckpointError(f"the checkpoint must hold {', '.join(wrong)} as a run saves them.")
        compare(state, self.config, self.update, self.reporter.say)
        transforms = self.collector.state_dict()["env_state_dict"].keys()
        if transforms != state["transforms"].keys():
            kept = f"{sorted(transforms)}, the checkpoint has {sorted(state['transforms'])}"
            raise ValueError(f"the environment's transforms keep {kept}.")
        check_shapes(
            {"observation": state["carrier"]["observation"], **state["update"]["loss"]},
            {"observation": self.collector._carrier["observation"], **self.update.loss.state_dict()},
        )
        load_replay(self.buffer, files, state["writer"], dims=self.update.loss.batch_dims)
        self.update.load_state_dict(state["update"])
        load_collection(self.collector, state)
        self.masks.load_state_dict(state)
        self._random.load_state_dict(state["random"], state["frames"])
        self.frames, self.update.updates, self.last = state["frames"], state["updates"], state["last"]
        self._metrics, self._log_due = dict(state["metrics"]), state["log_due"]
        self._evaluation_due = state["evaluation_due"]
        self.elapsed, self.times, self.saved = state["elapsed"], state["times"], self.frames
        self.reporter.restore(state["log"])
        self.checkpointer.discard_after(self.frames)

    def prepare(self) -> None:
        """Compile the update and the policy, on made-up data; so does ``evaluate``, where it has a ``prepare``."""
        made_up = self.collector.env.fake_tensordict()
        for module in self.collector.policy.modules():
            if isinstance(module, CompiledPolicy) and self.workers is None:
                module.prepare(made_up)
        if hasattr(self.evaluate, "prepare"):
            self.evaluate.prepare()
        rows, size = max(1, len(self.tasks)), self.config.optim.batch_size
        batch = made_up.select(*self._kept(made_up)).reshape(-1)[:rows, None].expand(rows, size // rows)
        self.update.prepare(batch if self.tasks else batch[0])

    def save(self) -> None:
        """Write a checkpoint, unless this frame has one or the run has diverged, which is found out here at the latest."""
        if self.frames == self.saved or self._diverged:
            return
        if not self.update.is_finite():
            self._diverge(f"the networks are not finite at frame {self.frames}, update {self.updates}.")
            return
        buffer = self.buffer if self.workers is None else None  # no run goes on from it: the networks are what is kept
        self.checkpointer.save(self.frames, {**self._state(), "log": self.reporter.position()}, buffer)
        self.saved = self.frames

    def _state(self) -> dict[str, Any]:
        return {
            "frames": self.frames,
            "updates": self.updates,
            "elapsed": self.elapsed,
            "times": self.times,
            "last": self.last,
            "metrics": {name: value.cpu() for name, value in self._metrics.items()},
            "log_due": self._log_due,
            "evaluation_due": self._evaluation_due,
            "update": {name: part for name, part in self.update.state_dict().items() if name != "updates"},  # it is above
            "writer": dict(self.buffer.writer.state_dict()),
            "random": self._random.state_dict(),
            **self.masks.state_dict(),
            **collection_state(self.collector),
            **setting(self.config, self.update),
        }

    def run(self) -> str:
        """Train to the end; the status: ``"finished"``, ``"interrupted"`` or ``"diverged"``."""
        start = time.perf_counter() - self.elapsed
        with self._stop.signals():
            try:
                self._evaluate()  # if the run was stopped in an evaluation
                collected = iter(self.collector)
                while self.frames < self.config.total_frames and not self._stop.wanted:
                    before = self.frames
                    self._reset_networks()
                    batch = self._collect(collected)
                    with self._timed("update"):
                        self._log(self.masks.step(self.frames, self.last.get("eval/return")))
                    metrics = self._train(before)
                    self.elapsed = time.perf_counter() - start
                    self._report(before, batch, metrics)
                if self.finished:
                    self.masks.say_if_never_frozen(self.last, self.reporter.say)
                with self._timed("save"):
                    self.save()
            except DivergenceError as error:
                self.reporter.say(f"diverged: {error}")
                return "diverged"
        if self._stop.wanted:
            return "interrupted"
        return "diverged" if self._diverged else "finished"

    def close(self) -> None:
        """Close the environments of training and evaluation; an error of theirs is said."""
        close_all(self.collector.shutdown, getattr(self.evaluate, "close", None), say=self.reporter.say)

    def _reset_networks(self) -> None:
        # The newest frame is evaluated and saved before: a run that goes on from its checkpoint resets as this one does.
        interval = self.config.reset_interval
        if interval and self.frames and _crosses(interval, self.frames - self.collector.frames_per_batch, self.frames):
            with GlobalStream(derived_seed(self.config.seed, "networks", self.frames), self.update.device):
                self.update.reset()
            self._log({"train/reset": 1.0})

    def _collect(self, collected: Iterator[TensorDictBase]) -> TensorDictBase:
        if self.update.device.type == "cuda":  # which has only begun the updates: the rest of them is no collecting
            with self._timed("update"):
                torch.cuda.synchronize(self.update.device)
        with self._timed("collect"), self._random.exploration:
            if self.workers is None:
                check_finite("observation", self.collector._carrier.get("observation"), f"at frame {self.frames}")
            if isinstance(self.collector.policy, Exploring):
                self.collector.policy.set_frames(self.frames)
            with self._blamed():
                data = next(collected)
            for key in ("action", ("next", "observation"), ("next", "reward")):
                check_finite(key, data.get(key), f"at frame {self.frames + data.numel()}")
            for each in self._normalizations:
                each.update(data.get("observation"))
            self._keys = self._keys or self._kept(data)
            self.buffer.extend(stored(data.select(*self._keys), self.tasks))
            self.frames += data.numel()
        return data

    def _kept(self, data: TensorDictBase) -> list[NestedKey]:
        """What the loss reads of a frame."""
        keys, loss = set(data.keys(True, True)), self.update.loss
        return [*loss.in_keys, *(key for key in loss.optional_in_keys if key in keys)]

    def _due(self, frames: int) -> int:
        """Updates that are due by now."""
        return math.floor(max(0, frames - self.config.init_random_frames) * self.config.utd_ratio)

    def _train(self, before: int) -> dict[str, Tensor]:
        count = self._due(self.frames) - self._due(before)
        if not count:
            return {}
        size = self.config.optim.batch_size
        with self._timed("sample"):
            batches = sampled(self.buffer, count, size, self.tasks).to(self.update.device)
        with self._timed("update"):
            metrics = self.update(batches, generator=self._random.draws)
        self._batch = batches[-1]
        return dict(metrics.items())

    @property
    def finished(self) -> bool:
        """Whether nothing is left for :meth:`run` to do."""
        return self.frames >= self.config.total_frames and not self._evaluation_due

    @property
    def stopped_by(self) -> int | None:
        """The signal that told :meth:`run` to stop, if one did."""
        return self._stop.number

    @property
    def updates(self) -> int:
        """Critic updates made so far."""
        return self.update.updates

    def _report(self, before: int, data: TensorDictBase, metrics: dict[str, Tensor]) -> None:
        frames = self.frames
        with self._timed("log"):
            self._log_training(before, data, metrics)
        self._evaluation_due = _crosses(self.config.eval.interval, before, frames) or frames >= self.config.total_frames
        self._evaluate()
        if self.config.checkpoint.interval and _crosses(self.config.checkpoint.interval, before, frames):
            with self._timed("save"):
                self.save()
        self.reporter.progress(frames, self.updates, self.last)

    def _evaluate(self) -> None:
        """Evaluate, where it is due. An evaluation that a signal ends stays due, for the run that goes on."""
        if not self._evaluation_due or self._stop.wanted:
            return
        metrics: Mapping[str, float] = {}
        try:
            with self._timed("evaluate"), self._stop.abandonable(), self._blamed():
                metrics = dict(self.evaluate(self.frames))
        except AbandonedError:
            return
        except DivergenceError as error:
            self._diverge(f"at the evaluation of frame {self.frames}, {error}")
        self._evaluation_due = False
        if self.saved == self.frames:  # without this evaluation
            self.saved = None
        self._log(metrics)

    def _log_training(self, before: int, data: TensorDictBase, metrics: dict[str, Tensor]) -> None:
        for ended in episodes(data, self.tasks):
            self._log(ended)
        self._metrics |= metrics
        self._log_due |= self.updates > 0 and _crosses(self.config.log_interval, before, self.frames)
        if metrics and self._log_due:
            self._log_due = False
            values = {f"train/{name}": value for name, value in named(self._metrics, self.tasks).items()}
            if not self.tasks:  # whose subnetworks are to disagree
                values |= {name: value.item() for name, value in subnet_disagreement(self.update.loss, self._batch).items()}
            values |= {} if self.workers is None else {"collect/policy_age": float(self.workers.policy_age)}
            rates = {"frames": self.frames / self.elapsed, "updates": self.updates / self.elapsed}
            self._log({**values, **{f"time/{name}_per_second": rate for name, rate in rates.items()}})
            wrong = [name for name, value in values.items() if not math.isfinite(value)]
            if wrong:
                self._diverge(f"{', '.join(wrong)} not finite at frame {self.frames}, update {self.updates}.")

    def _log(self, metrics: Mapping[str, float]) -> None:
        if not metrics:
            return
        self.last.update(metrics)
        self.reporter.log(self.frames, self.elapsed, metrics)

    def _diverge(self, what: str) -> None:
        if self.config.stop_when_diverged:
            raise DivergenceError(what)
        if not self._diverged:
            self.reporter.say(f"diverged, and goes on without further checkpoints: {what}")
        self._diverged = True

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """A policy that is not finite may raise before its action is seen."""
        try:
            yield
        except (AbandonedError, DivergenceError):
            raise
        except Exception as error:
            if not self.update.is_finite():
                raise DivergenceError(f"the networks are not finite at frame {self.frames} ({error}).") from error
            raise

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[name] += time.perf_counter() - start


def _crosses(interval: int, before: int, after: int) -> bool:
    return after // interval > before // interval
