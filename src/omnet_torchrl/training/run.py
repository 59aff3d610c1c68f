"""One run from its options to its summary. Calls go one way: the Run calls the Trainer, and both tell the Reporter.

The Run owns the folder with its lock and status, the checkpointer and the reporter, which it opens and closes.
Signals: before training, they end the process; within :meth:`Trainer.run`, they end the loop after the frame.
Resume: the Run reads and compares the options of the folder; the Trainer brings its own components back from the checkpoint.
Reports: the Trainer tells the Reporter what happens at each frame; the Run tells it the header, the outcome and the summary.
Whatever ends a run, the Run writes how in ``run.json`` and says how to go on.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from omnet_torchrl.envs import task_names
from omnet_torchrl.training.build import policy_options
from omnet_torchrl.training.command_line import argument, check_job, merge_overrides
from omnet_torchrl.training.loop.environments import check_env, env_options, instances
from omnet_torchrl.training.loop.stopping import RunError, exit_code, handled
from omnet_torchrl.training.loop.trainer import Trainer
from omnet_torchrl.training.options import TrainConfig, differences, load_config, resolve_device, save_config, to_config
from omnet_torchrl.training.options.checks import bound, changes, listed
from omnet_torchrl.training.options.memory import check_memory
from omnet_torchrl.training.policy import describe_policy
from omnet_torchrl.training.record.checkpoint import Checkpointer
from omnet_torchrl.training.record.files import WriteError, one_line
from omnet_torchrl.training.record.folder import RunFolder, now, peak_memory
from omnet_torchrl.training.record.metrics import read_metrics
from omnet_torchrl.training.record.reporter import Reporter
from omnet_torchrl.training.record.terminal import Terminal, duration, shares
from omnet_torchrl.training.record.trackers import check_logger, reason

# Errors whose message says what to do: where they were raised tells nobody anything.
PLAIN = (OSError, MemoryError, torch.OutOfMemoryError, RunError)


class Run:
    """A run: new, or going on in the folder that ``resume`` names. Options are checked before anything is made.

    A ``with`` statement around what makes networks and environments records their errors, too: whatever ends it, ``run.json``
    has the status, and the error, if there was one.

    Args:
        config (DictConfig, Mapping or TrainConfig): the options. Where ``resume`` is among them, the others are those of the
            run in that folder. ``resume="auto"`` goes on in ``folder`` where there is a run in it, and starts it elsewhere.
        overrides (sequence of str): ``name=value``, what a resumed run changes of its options; the others must be the same.

    Keyword Args:
        sweep (bool): this is one run of several, each of which gets a folder without the time of day. Defaults to ``False``.
        job (str): the name of the script; an example's takes only rows of its own loss. Defaults to ``""``, no example.

    Raises:
        ValueError: a wrong option, environment or folder to resume, one whose run still goes on, or whose checkpoints are gone.
    """

    def __init__(
        self,
        config: DictConfig | Mapping[str, Any] | TrainConfig,
        overrides: Sequence[str] = (),
        *,
        sweep: bool = False,
        job: str = "",
    ):
        gc.collect()  # an earlier run of this process: its networks and its buffer are parts of cycles
        resume = config.resume if isinstance(config, TrainConfig) else config.get("resume")
        auto = resume == "auto"
        if resume is None or auto:
            self.config = to_config(config, sweep=sweep)
            there = auto and os.path.lexists(Path(self.config.folder, "run.json").expanduser())
            resume = self.config.folder if there else None
        self.resumed = resume is not None
        if resume is not None:
            self.folder = RunFolder.open(resume)
            self.config = _resumed(self.folder, overrides, self.config if auto else None)
        self.config.resume = None
        check_job(self.config.algorithm, job)
        check_logger(self.config.logger, self.config.wandb.mode)
        notes = check_env(self.config.env, normalized=self.config.normalize_observations, **env_options(self.config))
        self.device = resolve_device(self.config.device)
        if not self.resumed:
            wanted = Path(self.config.folder).expanduser().resolve()
            self.folder = RunFolder.create(wanted, self._save_config, exist_ok=auto)
            if self.folder.path != wanted:
                notes.append(f"folder={_relative(wanted)} exists already: the results go to {_relative(self.folder.path)}")
        self.folder.lock()
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        logging.getLogger("torchrl").setLevel(logging.WARNING)
        self.status = "running"
        self.checkpointer = Checkpointer(self.folder.checkpoint_path, self.config.checkpoint.keep)
        self.terminal = Terminal(self.config.total_frames, enabled=self.config.progress)
        self.reporter = Reporter(self.folder, self.terminal)
        for note in [*notes, instances(self.config)]:
            self.reporter.say(note)
        self._signals, self._signal = contextlib.ExitStack(), 0
        self._script, self._sweep, self._begun = False, sweep, False

    def _save_config(self, folder: RunFolder) -> dict[str, Any]:
        """Write ``config.yaml``; what ``run.json`` gets of it, so that nobody edits it unseen."""
        self.config.folder = str(folder.path)
        save_config(self.config, folder.config_path)
        return {"options": bound(self.config)}

    @classmethod
    def start(cls, config: DictConfig) -> Run:
        """As the constructor, for a job of Hydra, which is to end with a line and an exit code instead of a traceback.

        The codes: 0 where the run has finished, 1 where it failed or diverged, 130 after Ctrl-C, and 75 where another signal
        stopped it: it is to be started again. A job of a sweep raises a :class:`RunError` in the place of 1, after it has said
        why: Hydra goes on with the next one.
        """
        hydra = HydraConfig.get()
        sweep = hydra.mode is RunMode.MULTIRUN
        try:
            run = cls(config, hydra.overrides.task, sweep=sweep, job=hydra.job.name)
        except (ValueError, OSError) as error:
            if not sweep:
                sys.exit(f"error: {error}")
            Terminal(0).line(f"error: {error}")
            raise RunError(str(error)) from None
        run._script = True
        return run

    def __enter__(self) -> Run:
        self._signals.enter_context(handled(self._interrupt))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.status == "running":
            self._end(error=error or RunError("it ended before it was trained"))
        self._signals.close()
        if not self._script or self.status == "finished":
            return
        if self.status == "interrupted":
            if callable(signal.getsignal(self._signal)) and self._signal != signal.SIGINT:
                signal.raise_signal(self._signal)  # to submitit, which hands the job in again
            sys.exit(exit_code(self._signal))
        if self._sweep:
            if self.status == "refused":
                self.reporter.say(str(error))
            raise RunError(f"the run in {_relative(self.folder.path)}: {self.status}") from None
        if self.status != "refused":  # which says why itself
            sys.exit(1)

    def _interrupt(self, number: int, _: object) -> None:
        """The answer to a signal before anything is trained, and to a second one while the trainer runs."""
        self._signal = number
        raise KeyboardInterrupt

    def train(self, trainer: Trainer, description: Mapping[str, object]) -> str:
        """Run ``trainer`` and say so; the status: ``finished``, ``interrupted`` or ``diverged``."""
        try:
            title = f"{self.config.env}, seed {self.config.seed}, on {_device_name(self.device)}"
            self.terminal.block({**description, "results": _relative(self.folder.path)}, title)
            self._begin(trainer)
            with handled(self._interrupt), self.reporter.warnings():
                status = self._run(trainer)
        except BaseException as error:
            self._end(trainer, error=error)
            raise
        finally:
            trainer.close()
        self._end(trainer, status)
        return self.status

    def _begin(self, trainer: Trainer) -> None:
        config, env = self.config, trainer.collector.env
        fields: dict[str, Any] = {"env": config.env, "seed": config.seed, "device": _device_name(self.device), "error": None}
        if self.resumed:
            try:
                with self.reporter.warnings(), warnings.catch_warnings():
                    warnings.simplefilter("always", UserWarning)  # whatever the user does with warnings, these are said
                    found = trainer.resume()
            except ValueError as error:
                sys.exit(f"error: {self.folder.path} can't be resumed: {one_line(error)}")
            kept = self.folder.info.get("options")
            fields |= self._save_config(self.folder)
            changed = changes(kept, config) if kept and not found else {}
            others = f", with other options than before: {listed(changed)}" if changed else ""
            begun = (
                f"goes on from frame {trainer.frames:,}" if found else f"no checkpoint yet: starts from the beginning{others}"
            )
            if found and trainer.finished:
                longer = f"a larger total_frames goes on, e.g. total_frames={2 * trainer.frames}"
                begun = f"already finished at {trainer.frames:,} frames: nothing is left to do; {longer}"
            self.reporter.say(begun)
        check_memory(config, self.device, env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1])
        policy = describe_policy(policy_options(config), env.observation_spec, env.action_spec)
        self.folder.begin_session(trainer.frames, **fields, **policy)
        self.reporter.begin(config.logger, asdict(config), trainer.frames, **asdict(config.wandb))
        self._begun = True

    def _run(self, trainer: Trainer) -> str:
        try:
            if not trainer.finished:
                if trainer.update.compiled:
                    self.reporter.say("compiling the update; this takes up to a minute ...")
                start = time.monotonic()
                trainer.prepare()
                if trainer.update.compiled:
                    self.reporter.say(f"compiled in {duration(time.monotonic() - start)}, which no time or rate below includes")
            return trainer.run()
        except KeyboardInterrupt:
            return "interrupted"
        except Exception as error:
            started = isinstance(error, RunError) and trainer.stopped_by  # Ctrl-C has ended workers that were not ready yet
            if self._signal or started:  # tensordict's contexts raise a RuntimeError in the place of a KeyboardInterrupt
                return "interrupted"
            if "InvalidCxxCompiler" not in f"{type(error).__name__}: {error}":
                raise
            advice = "install one (apt install g++), name yours in the environment variable CXX, or set compile=false"
            raise RunError(f"compiling needs a C++ compiler, and none works here: {advice}.") from error

    def _end(self, trainer: Trainer | None = None, status: str = "failed", error: BaseException | None = None) -> None:
        """Write how the run ended, say it, and let go of the folder."""
        if not self._begun and self.resumed and isinstance(error, SystemExit):  # refused to go on: the run stays as it was
            self.status = "refused"
            return self.folder.unlock()
        if self._signal or isinstance(error, KeyboardInterrupt):
            status, error = "interrupted", None
        elif error and self._script and isinstance(error, Exception) and not isinstance(error, PLAIN):
            self.terminal.line("".join(traceback.format_exception(error)).rstrip())
        if not self.reporter.close_csv():
            status, error = "failed", error or RunError("metrics.csv could not be closed")
        if status == "interrupted" and trainer:
            self._signal = self._signal or trainer.stopped_by or signal.SIGINT
        said = str(error) if isinstance(error, RunError) else reason(error) if error else None
        if isinstance(error, WriteError):
            said = f"{one_line(error).rstrip('.')}: make room or mend that, and go on from the newest checkpoint"
        self.status = self._write_end(status, said, trainer if self._begun else None)
        self.reporter.close()
        if trainer and self._begun:
            self._summarise(trainer)
        if said:
            self.reporter.say(f"failed: {said}")
        if self.status in ("interrupted", "failed") and self.config.collect.backend == "direct":
            script = shlex.join(["python", _relative(Path(sys.argv[0]).resolve())])
            self.reporter.say(f"to go on, in this directory: {script} {argument('resume', _relative(self.folder.path))}")
        self.folder.unlock()
        return None

    def _write_end(self, status: str, error: str | None, trainer: Trainer | None) -> str:
        """Write ``run.json``; the status, which is ``failed`` where that can't be done."""
        for last in (False, True):
            try:
                if trainer is None:
                    self.folder.write_info(status=status, error=error, ended=now())
                else:
                    fields = {"frames": trainer.frames, "updates": trainer.updates, "saved": trainer.saved}
                    self.folder.end_session(status, self.device, **fields, error=error)
                break
            except (OSError, ValueError) as problem:
                for half in self.folder.path.rglob("*.tmp"):  # which may be what has filled the disk
                    with contextlib.suppress(OSError):
                        half.unlink()
                if last:
                    self.reporter.say(f"warning: run.json could not be written: {reason(problem)}")
                    return "failed"
        return status

    def _summarise(self, trainer: Trainer) -> None:
        frames, updates, elapsed = trainer.frames, trainer.updates, trainer.elapsed
        fields = {"status": self.status, "frames": f"{frames:,}", "updates": f"{updates:,}"}
        fields["time"] = duration(elapsed) + " without compiling" * trainer.update.compiled
        fields["where it went"] = shares(trainer.times)
        if elapsed and frames:
            fields["rate"] = f"{frames / elapsed:.1f} frames/s, {updates / elapsed:.0f} updates/s"
        peaks = [f"{peak:,} MiB{' of the GPU' * ('gpu' in name)}" for name, peak in peak_memory(self.device).items()]
        if peaks:
            fields["memory at most"] = ", ".join(peaks)
        if "eval/return" in trainer.last:
            fields["evaluation return"] = f"{trainer.last['eval/return']:.1f}"
        self.terminal.block({**fields, "results": _relative(self.folder.path)})


def _resumed(folder: RunFolder, overrides: Sequence[str], given: TrainConfig | None = None) -> TrainConfig:
    """The options of a run in ``folder``, with what the user changes for its next part, or all of them, ``given`` anew."""
    stored = load_config(folder.config_path)
    changed = given or to_config(
        merge_overrides({**asdict(stored), "resume": str(folder.path)}, overrides, f"resume={folder.path}")
    )
    found = differences(stored, changed)
    if found:
        each = "; ".join(f"{name} is {before}, got {after}" for name, (before, after) in found.items())
        raise ValueError(f"resume={folder.path} goes on with the run's own options, and these differ: {each}.")
    changed.folder, changed.resume = str(folder.path), None
    _check_files(folder, stored)
    return changed


def _check_files(folder: RunFolder, stored: TrainConfig) -> None:
    """Raise if the options are not those of the checkpoints, or if a run without any would start anew, over its results."""
    checkpointer = Checkpointer(folder.checkpoint_path)
    if checkpointer.manifests():
        if not folder.metrics_path.exists():
            name = folder.metrics_path.name
            raise ValueError(f"{folder.path} can't be resumed: its {name} is missing, which it goes on with: put it back.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainer says what is passed over
            state, _ = checkpointer.load(replay=False) or ({}, [])
        _check_edited(folder, state.get("options", {}), stored, "the checkpoint was saved")
        return
    info, reached = folder.info, 0
    if info.get("options"):
        _check_edited(folder, info["options"], stored, "the run was started")
    with contextlib.suppress(ValueError):
        reached = max(max(frames) for frames, _ in read_metrics(folder.metrics_path).values())
    saved = info.get("saved") is not None or any(session["frames"] for session in info["sessions"])
    # The first checkpoint is of the first step at or beyond the interval, and comes after that step's records.
    interval, step = stored.checkpoint.interval, stored.environments * len(task_names(stored.env))
    if info["status"] in ("finished", "diverged") or saved or 0 < interval <= reached - step:
        raise ValueError(
            f"{folder.path} can't be resumed: its run (status: {info['status']}) has no checkpoint in it, and would start from "
            "frame 0: put its checkpoints back, or start another run."
        )


def _check_edited(folder: RunFolder, kept: Mapping[str, Any], stored: TrainConfig, what: str) -> None:
    edited = differences(kept, stored)
    if edited:
        advice = "put the file back, or these options in it"
        raise ValueError(f"{folder.config_path} is not what {what} with: {listed(edited)}: {advice}.")


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _device_name(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} thread{'s' * (threads > 1)}"
