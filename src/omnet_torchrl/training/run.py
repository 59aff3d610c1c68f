"""One run from its options to its summary. Calls go one way: the Run calls the Trainer, and both tell the Reporter.

The Run owns the folder with its lock and status, the checkpointer and the reporter, which it opens and closes.
Signals: before training, Ctrl-C and SIGTERM end the process; within :meth:`Trainer.run`, they end the loop after the frame.
Resume: the Run reads and compares the options of the folder; the Trainer brings its own components back from the checkpoint.
Reports: the Trainer tells the Reporter what happens at each frame; the Run tells it the header, the outcome and the summary.
Whatever ends the training, the Run writes how in ``run.json`` and says how to go on.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from omnet_torchrl.training.command_line import argument, merge_overrides
from omnet_torchrl.training.loop.environments import check_env
from omnet_torchrl.training.loop.stopping import handled
from omnet_torchrl.training.loop.trainer import Trainer
from omnet_torchrl.training.options import TrainConfig, differences, load_config, resolve_device, save_config, to_config
from omnet_torchrl.training.options.checks import listed
from omnet_torchrl.training.policy import spaces
from omnet_torchrl.training.record.checkpoint import Checkpointer
from omnet_torchrl.training.record.files import WriteError, one_line
from omnet_torchrl.training.record.folder import RunFolder, now, peak_memory
from omnet_torchrl.training.record.metrics import read_metrics
from omnet_torchrl.training.record.reporter import Reporter
from omnet_torchrl.training.record.terminal import Terminal, duration, shares
from omnet_torchrl.training.record.trackers import check_logger


class Run:
    """A run: new, or going on in the folder that ``resume`` names. Options are checked before anything is made.

    Args:
        config (DictConfig, Mapping or TrainConfig): the options. Where ``resume`` is among them, the others are those of the
            run in that folder.
        overrides (sequence of str): ``name=value``, what a resumed run changes of its options; the others must be the same.

    Raises:
        ValueError: a wrong option, environment or folder to resume, one whose run still goes on, or whose checkpoints are gone.
    """

    def __init__(self, config: DictConfig | Mapping[str, Any] | TrainConfig, overrides: Sequence[str] = ()):
        resume = config.resume if isinstance(config, TrainConfig) else config.get("resume")
        self.resumed = resume is not None
        if resume is not None:
            self.folder = RunFolder.open(resume)
            self.config = _resumed(self.folder, overrides)
        else:
            self.config = to_config(config)
        check_logger(self.config.logger)
        check_env(self.config.env)
        self.device = resolve_device(self.config.device)
        if not self.resumed:
            self.folder = RunFolder.create(self.config.folder, self._save_config)
        self.folder.lock()
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        logging.getLogger("torchrl").setLevel(logging.WARNING)
        self.checkpointer = Checkpointer(self.folder.checkpoint_path, self.config.checkpoint.keep)
        self.terminal = Terminal(self.config.total_frames, enabled=self.config.progress)
        self.reporter = Reporter(self.folder, self.terminal)
        self._signals, self._interrupted = contextlib.ExitStack(), False

    def _save_config(self, folder: RunFolder) -> None:
        self.config.folder = str(folder.path)
        save_config(self.config, folder.config_path)

    @classmethod
    def start(cls, config: DictConfig | Mapping[str, Any] | TrainConfig, overrides: Sequence[str] = ()) -> Run:
        """As the constructor, for a script: a wrong option ends it with a line instead of a traceback.

        From here on, Ctrl-C and SIGTERM leave the status ``interrupted`` and say how to go on.
        """
        try:
            run = cls(config, overrides)
        except (ValueError, WriteError) as error:
            sys.exit(f"error: {error}")
        run._signals.enter_context(handled(run._give_up))
        return run

    def _give_up(self, *_: object) -> None:
        """The answer to a signal before anything is trained."""
        if self.folder.info["status"] == "running":
            self.folder.write_info(status="interrupted", ended=now())
        self._say_how_to_go_on()
        self._signals.close()
        sys.exit(130)

    def _interrupt(self, *_: object) -> None:
        """The answer to a signal while the trainer compiles, and to a second one while it runs."""
        self._interrupted = True
        raise KeyboardInterrupt

    def train(self, trainer: Trainer, description: Mapping[str, object]) -> str:
        """Run ``trainer`` and say so; the status: ``finished``, ``interrupted`` or ``diverged``."""
        status = "failed"
        try:
            title = f"{self.config.env}, seed {self.config.seed}, on {_device_name(self.device)}"
            self.terminal.block({**description, "results": _relative(self.folder.path)}, title)
            self._begin(trainer)
            self._signals.enter_context(handled(self._interrupt))
            try:
                with self.reporter.warnings():
                    status = self._run(trainer)
            finally:
                self._close(status, trainer)
        except WriteError as error:
            sys.exit(f"error: {str(error).rstrip('.')}: make room or mend that, and go on from the newest checkpoint.")
        finally:
            self._signals.close()
            self.folder.unlock()
        return status

    def _begin(self, trainer: Trainer) -> None:
        config, env = self.config, trainer.collector.env
        if self.resumed:
            try:
                with self.reporter.warnings(), warnings.catch_warnings():
                    warnings.simplefilter("always", UserWarning)  # whatever the user does with warnings, these are said
                    found = trainer.resume()
            except ValueError as error:
                sys.exit(f"error: {self.folder.path} can't be resumed: {one_line(error)}")
            self._save_config(self.folder)
            self.reporter.say(
                f"goes on from frame {trainer.frames:,}" if found else "no checkpoint yet: starts from the beginning"
            )
        fields = {"env": config.env, "seed": config.seed, "device": _device_name(self.device)}
        self.folder.begin_session(trainer.frames, **fields, spaces=spaces(env.observation_spec, env.action_spec))
        self.reporter.begin(config.logger, asdict(config), trainer.frames, **asdict(config.wandb))

    def _run(self, trainer: Trainer) -> str:
        try:
            if trainer.update.compiled:
                self.reporter.say("compiling the update; this takes up to a minute ...")
            trainer.prepare()
            return trainer.run()
        except KeyboardInterrupt:
            return "interrupted"
        except Exception as error:
            if self._interrupted:  # tensordict's contexts raise a RuntimeError in the place of a KeyboardInterrupt
                return "interrupted"
            if "InvalidCxxCompiler" not in f"{type(error).__name__}: {error}":
                raise
            advice = "install one (apt install g++), name yours in the environment variable CXX, or set compile=false"
            sys.exit(f"error: compiling needs a C++ compiler, and none works here: {advice}.")

    def _close(self, status: str, trainer: Trainer) -> None:
        status = status if self.reporter.close_csv() else "failed"
        frames, updates, elapsed = trainer.frames, trainer.updates, trainer.elapsed
        try:
            self.folder.end_session(status, self.device, frames=frames, updates=updates, saved=trainer.saved)
        except (ValueError, WriteError) as error:  # a full disk, where the run has failed before
            self.reporter.say(f"warning: how the run has ended could not be noted: {error}")
        self.reporter.close()
        fields = {"status": status, "frames": f"{frames:,}", "updates": f"{updates:,}", "time": duration(elapsed)}
        fields["where it went"] = shares(trainer.times)
        if elapsed and frames:
            fields["rate"] = f"{frames / elapsed:.1f} frames/s, {updates / elapsed:.0f} updates/s"
        peaks = [f"{peak:,} MiB{' of the GPU' * ('gpu' in name)}" for name, peak in peak_memory(self.device).items()]
        if peaks:
            fields["memory at most"] = ", ".join(peaks)
        if "eval/return" in trainer.last:
            fields["evaluation return"] = f"{trainer.last['eval/return']:.1f}"
        self.terminal.block({**fields, "results": _relative(self.folder.path)})
        if status in ("interrupted", "failed"):
            self._say_how_to_go_on()

    def _say_how_to_go_on(self) -> None:
        script = shlex.join(["python", _relative(Path(sys.argv[0]).resolve())])
        self.reporter.say(f"to go on: {script} {argument('resume', _relative(self.folder.path))}")


def _resumed(folder: RunFolder, overrides: Sequence[str]) -> TrainConfig:
    """The options of a run in ``folder``, with what the user changes for its next part."""
    stored = load_config(folder.config_path)
    changed = to_config(merge_overrides(asdict(stored), overrides, f"resume={folder.path}"))
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
        edited = differences(state.get("options", {}), stored)
        if edited:
            advice = "put the file back, or these options in it"
            raise ValueError(f"{folder.config_path} is not what the checkpoint was saved with: {listed(edited)}: {advice}.")
        return
    info, reached = folder.info, 0
    with contextlib.suppress(ValueError):
        reached = max(max(frames) for frames, _ in read_metrics(folder.metrics_path).values())
    saved = info.get("saved") is not None or any(session["frames"] for session in info["sessions"])
    if info["status"] in ("finished", "diverged") or saved or 0 < stored.checkpoint.interval < reached:
        raise ValueError(
            f"{folder.path} can't be resumed: its run (status: {info['status']}) has no checkpoint in it, and would start from "
            "frame 0: put its checkpoints back, or start another run."
        )


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
