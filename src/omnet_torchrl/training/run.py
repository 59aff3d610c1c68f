"""One run from its options to its summary: the folder, what a person sees, and what is kept."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf

from omnet_torchrl.metrics import sac_flops
from omnet_torchrl.modules import SubnetActor, SubnetQValueOperator
from omnet_torchrl.training.algorithms import row, training_flops
from omnet_torchrl.training.checkpoint import MANIFESTS, Checkpointer
from omnet_torchrl.training.command_line import argument, parse
from omnet_torchrl.training.config import differences, load_config, resolve_device, save_config, to_config
from omnet_torchrl.training.environments import check_env
from omnet_torchrl.training.logging import BackgroundLogger, CSVLogger, check_logger, make_logger, read_metrics
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.plots import learning_curve
from omnet_torchrl.training.run_folder import RunFolder, now, peak_memory
from omnet_torchrl.training.stopping import handled
from omnet_torchrl.training.terminal import Terminal, duration, shares
from omnet_torchrl.training.trainer import Trainer


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
        if self.resumed:
            self.folder.lock()
        else:
            self.folder = RunFolder.create(self.config.folder, self._save_config)
            self.folder.lock()
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        logging.getLogger("torchrl").setLevel(logging.WARNING)
        self.checkpointer = Checkpointer(self.folder.checkpoint_path, self.config.checkpoint.keep)
        self.terminal = Terminal(self.config.total_frames, enabled=self.config.progress)
        self._csv: CSVLogger | None = None
        self._logger = BackgroundLogger()
        self._signals, self._interrupted = contextlib.ExitStack(), False

    def _save_config(self, folder: RunFolder) -> None:
        self.config.folder = str(folder.path)
        save_config(self.config, folder.config_path)

    @classmethod
    def start(cls, config: DictConfig | Mapping[str, Any] | TrainConfig, overrides: Sequence[str] = ()) -> Run:
        """As the constructor, for a script: a wrong option ends it with a line instead of a traceback.

        From here to the end of :meth:`train`, Ctrl-C and SIGTERM leave the status ``interrupted`` and say how to go on.
        """
        try:
            run = cls(config, overrides)
        except ValueError as error:
            sys.exit(f"error: {error}")
        run._signals.enter_context(handled(run._give_up, {}))
        return run

    def _give_up(self, *_: object) -> None:
        """Before anything is trained."""
        if self.folder.info["status"] == "running":
            self.folder.write_info(status="interrupted", ended=now())
        self._say_how_to_go_on()
        self._signals.close()
        sys.exit(130)

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def train(self, trainer: Trainer, description: Mapping[str, object]) -> str:
        """Run ``trainer`` and say so; the status: ``finished``, ``interrupted`` or ``diverged``."""
        try:
            return self._train(trainer, description)
        finally:
            self._signals.close()
            self.folder.unlock()

    def _train(self, trainer: Trainer, description: Mapping[str, object]) -> str:
        title = f"{self.config.env}, seed {self.config.seed}, on {_device_name(self.device)}"
        self.terminal.header({**description, "results": _relative(self.folder.path)}, title)
        self._begin(trainer)
        self._signals.enter_context(handled(self._interrupt, {}))
        warn, warnings.showwarning = warnings.showwarning, self._show_warning
        status = "failed"
        try:
            if trainer.update.compiled:
                self.say("compiling the update; this takes up to a minute ...")
            _prepare(trainer)
            status = trainer.run()
        except KeyboardInterrupt:
            status = "interrupted"
        except Exception:  # which tensordict's contexts raise in the place of a KeyboardInterrupt
            if not self._interrupted:
                raise
            status = "interrupted"
        finally:
            warnings.showwarning = warn
            self._close(status, trainer)
        return status

    def _begin(self, trainer: Trainer) -> None:
        if self.resumed:
            try:
                found = trainer.resume()
            except ValueError as error:
                sys.exit(f"error: {self.folder.path} can't be resumed: {error}")
            self._save_config(self.folder)
            self.say(f"goes on from frame {trainer.frames:,}" if found else "no checkpoint yet: starts from the beginning")
        if self._csv is None:
            self._keep_aside(self.folder.metrics_path)
            self._csv = CSVLogger(self.folder.metrics_path)
        config = self.config
        self.folder.begin_session(trainer.frames, env=config.env, seed=config.seed, device=_device_name(self.device))
        options = {"frames": trainer.frames, "warn": self.say, **asdict(config.wandb)}
        self._logger = make_logger(config.logger, self.folder, asdict(config), **options)
        if self._logger.place:
            self.say(f"{self._logger.name}: {self._logger.place}")

    def log(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Write metrics to ``metrics.csv`` and the logger."""
        assert self._csv is not None
        self._csv.log(frames, seconds, metrics)
        self._logger.log(frames, seconds, metrics)
        if "eval/return" in metrics:
            self.terminal.evaluation(frames, metrics, seconds)
            self._draw()

    def progress(self, frames: int, updates: int, metrics: Mapping[str, float]) -> None:
        """Move the progress bar."""
        self.terminal.update(frames, updates, metrics.get("train/episode_return"), metrics.get("eval/return"))

    def say(self, text: str) -> None:
        """A line on the terminal."""
        self.terminal.line(text)

    def position(self) -> int:
        """Bytes of ``metrics.csv``, on the disk."""
        assert self._csv is not None
        self._csv.sync()
        return self._csv.position

    def restore(self, position: int) -> None:
        """Go on with ``metrics.csv`` from ``position``."""
        self._csv = CSVLogger(self.folder.metrics_path, position)

    def _keep_aside(self, path: Path) -> None:
        if path.exists():
            names = (path.with_name(f"{path.name}.old{number or ''}") for number in itertools.count())
            kept = path.rename(next(name for name in names if not name.exists()))
            self.say(f"what {path.name} had is in {kept.name}")

    def _show_warning(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.terminal.line(f"warning: {message}")

    def _draw(self) -> None:
        try:
            learning_curve(self.folder.path)
        except Exception as error:  # a picture never ends a run
            self.say(f"warning: {self.folder.curve_path.name} could not be drawn: {error}")

    def _close(self, status: str, trainer: Trainer) -> None:
        try:
            if self._csv is not None:
                self._csv.close()
        except OSError as error:  # a full disk
            status = "failed"
            self.say(f"warning: {self.folder.metrics_path.name} could not be closed: {error}")
        counts = {"frames": trainer.frames, "updates": trainer.updates, "saved": trainer.saved}
        self.folder.end_session(status, self.device, **counts)
        self._logger.close()
        elapsed = trainer.elapsed
        rows: dict[str, object] = {
            "status": status,
            "frames": f"{trainer.frames:,}",
            "updates": f"{trainer.updates:,}",
            "time": duration(elapsed),
            "where it went": shares(trainer.times),
        }
        if elapsed and trainer.frames:
            rows["rate"] = f"{trainer.frames / elapsed:.1f} frames/s, {trainer.updates / elapsed:.0f} updates/s"
        peaks = [f"{peak:,} MiB{' of the GPU' * ('gpu' in name)}" for name, peak in peak_memory(self.device).items()]
        if peaks:
            rows["memory at most"] = ", ".join(peaks)
        if "eval/return" in trainer.last:
            rows["evaluation return"] = f"{trainer.last['eval/return']:.1f}"
        self.terminal.summary({**rows, "results": _relative(self.folder.path)}, "")
        if status in ("interrupted", "failed"):
            self._say_how_to_go_on()
        self.terminal.close()

    def _say_how_to_go_on(self) -> None:
        script = shlex.join(["python", _relative(Path(sys.argv[0]).resolve())])
        self.say(f"to go on: {script} {argument('resume', _relative(self.folder.path))}")


def _prepare(trainer: Trainer) -> None:
    try:
        trainer.prepare()
    except RuntimeError as error:
        if "InvalidCxxCompiler" not in f"{type(error).__name__}: {error}":
            raise
        advice = "install one (apt install g++), name yours in the environment variable CXX, or set compile=false"
        sys.exit(f"error: compiling needs a C++ compiler, and none works here: {advice}.")


def schedule(config: TrainConfig) -> dict[str, Any]:
    """The keyword arguments of :class:`~omnet_torchrl.training.trainer.Trainer`."""
    names = ("total_frames", "init_random_frames", "utd_ratio", "policy_update_delay", "seed", "log_interval", "reset_interval")
    return {
        **{name: getattr(config, name) for name in (*names, "stop_when_diverged")},
        "batch_size": config.optim.batch_size,
        "eval_interval": config.eval.interval,
        "checkpoint_interval": config.checkpoint.interval,
    }


def describe(config: TrainConfig, actor: SubnetActor, qvalue: SubnetQValueOperator) -> dict[str, str]:
    """What is about to run, for a person."""
    network, sizes = config.network, {}
    for name, module in (("actor", actor), ("critic", qvalue)):
        weights = list(module.parameters())
        shape = [weights[0].shape[-1], *network.num_cells, weights[-1].shape[-1]]
        total = sum(weight.numel() for weight in weights)
        sizes[name] = f"{' - '.join(map(str, shape))}, {total:,} parameters"
    action_dim = actor.spec[actor.action_key].shape[-1]
    observation_dim = next(actor.parameters()).shape[-1]
    flops = training_flops(config, observation_dim, action_dim)
    redq = sac_flops(
        observation_dim,
        action_dim,
        network.num_cells,
        num_online=10,
        num_value=10,
        policy_update_delay=config.policy_update_delay,
        batch_size=config.optim.batch_size,
    )
    kept = ""
    if network.masks == "unit":
        kept = f", {' - '.join(map(str, qvalue.module.extract(0).num_cells))} hidden units"
    if network.critic == "masked":
        number = "2^31, drawn at each call" if network.masks == "redrawn" else str(network.num_subnets)
        subnets = f"{number}, {network.masks} masks of sparsity {network.sparsity}{kept}, in the critic"
        subnets += " and the actor" if network.actor == "masked" else "; a dense actor"
    else:
        subnets = f"{network.num_subnets} separate critics, one actor"
    return {
        "algorithm": row(config.algorithm).label,
        **sizes,
        "subnets": subnets,
        "frames": f"{config.total_frames:,}, of them {config.init_random_frames:,} random; {config.num_envs} environment(s)",
        "updates": f"{config.utd_ratio:g} per frame, actor every {config.policy_update_delay}, batch {config.optim.batch_size}",
        "training FLOPs": f"{flops / 1e6:.1f} M per update, {flops / redq:.0%} of REDQ's with 10 critics (dense count)",
    }


def _resumed(folder: RunFolder, overrides: Sequence[str]) -> TrainConfig:
    """The config of a run in ``folder``, with what the user changes for its next part."""
    stored = load_config(folder.config_path)
    merged = OmegaConf.create(asdict(stored))
    for override in map(parse, overrides):
        if override.type is OverrideType.DEL:
            raise ValueError(
                f"resume={folder.path} goes on with the run's own options, got {override.input_line!r}: leave it out."
            )
        OmegaConf.update(merged, override.key_or_group, override.value(), force_add=True)
    changed = to_config(merged)
    found = differences(stored, changed)
    if found:
        listed = "; ".join(f"{name} is {before}, got {after}" for name, (before, after) in found.items())
        raise ValueError(f"resume={folder.path} goes on with the run's own options, and these differ: {listed}.")
    changed.folder, changed.resume = str(folder.path), None
    _check_files(folder, stored.checkpoint.interval)
    return changed


def _check_files(folder: RunFolder, interval: int) -> None:
    """Raise if a run without checkpoints has ended, or has had one: it would start anew, over its results."""
    if any(folder.checkpoint_path.glob(MANIFESTS)):
        if not folder.metrics_path.exists():
            name = folder.metrics_path.name
            raise ValueError(f"{folder.path} can't be resumed: its {name} is missing, which it goes on with: put it back.")
        return
    info, reached = folder.info, 0
    with contextlib.suppress(OSError, ValueError):
        reached = max(max(frames) for frames, _ in read_metrics(folder.metrics_path).values())
    saved = info.get("saved") is not None or any(session["frames"] for session in info["sessions"])
    if info["status"] in ("finished", "diverged") or saved or 0 < interval < reached:
        raise ValueError(
            f"{folder.path} can't be resumed: its run (status: {info['status']}) has no checkpoint in it, and would start from "
            "frame 0: put its checkpoints back, or start another run."
        )


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
