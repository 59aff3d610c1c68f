"""TensorBoard and wandb, which show the values of a run while it goes on; ``metrics.csv`` has all of them in any case.

They get the values through a bounded queue and are started, written and closed in a thread: whatever the network and the disk
do, they can't stop or slow the run. (Their own queues are not enough: TensorBoard's blocks the caller when it is full, and both
may hang while they start.)
"""

from __future__ import annotations

import difflib
import json
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue, SimpleQueue
from typing import Any, NamedTuple

from omnet_torchrl.training.record.folder import RunFolder

KINDS = ("csv", "tensorboard", "wandb")
MODES = ("offline", "online", "disabled")
VARIABLES = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "group": "WANDB_RUN_GROUP"}
CONNECT_SECONDS, FINISH_SECONDS, CLOSE_SECONDS = 14.0, 8.0, 20.0
Say = Callable[[str], None]


class Tracker(NamedTuple):
    """Shows the values of a run; ``place`` says to a person how to look at them."""

    place: str
    write: Callable[[int, float, Mapping[str, float]], None]  # frames, seconds and what was logged at once
    close: Callable[[], None]  # finishes what is under way


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class BackgroundLogger:
    """Starts a tracker, and writes to it, in a thread, so that nothing it does stops or slows the run.

    An exception of the tracker is told once, and the logger is off from then on. Where the queue is full, values are dropped,
    counted, and told at the end.

    Args:
        name (str): of the tracker.
        start (callable or None): returns the tracker; gets a function for its own messages. ``None`` logs nothing.
        warn (callable): gets each message for the user, in the thread of the run. Defaults to :func:`warnings.warn`.
        size (int): calls of :meth:`log` that can wait. Defaults to 4096.
    """

    def __init__(self, name: str = "", start: Callable[[Say], Tracker] | None = None, *, warn: Say = _warn, size: int = 4096):
        self.name, self.place = name, ""
        self._warn, self._dropped, self._off = warn, 0, start is None
        self._messages: SimpleQueue[str] = SimpleQueue()
        self._queue: Queue[tuple[int, float, dict[str, float]] | None] = Queue(size)
        if start is not None:
            self._thread = threading.Thread(target=self._work, args=(start,), name="logger", daemon=True)
            self._thread.start()

    def log(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Queue the values, and return at once."""
        self._tell()
        if self._off:
            return
        try:
            self._queue.put_nowait((frames, seconds, {name: float(value) for name, value in metrics.items()}))
        except Full:
            self._dropped += len(metrics)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Wait, ``timeout`` seconds at most, until everything is written; say what is not."""
        deadline = time.monotonic() + timeout
        if not self._off:
            with suppress(Full):
                self._queue.put(None, timeout=timeout)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        self._tell()
        if self._off:
            return
        self._off = True
        if self._thread.is_alive():
            self._warn(f"{self.name}: not done within {timeout:.0f} s, the last values may be missing; metrics.csv has all.")
        if self._dropped:
            self._warn(f"{self.name}: too slow, {self._dropped} values were left out; metrics.csv has all.")

    def _tell(self) -> None:
        while not self._messages.empty():
            self._warn(self._messages.get())

    def _work(self, start: Callable[[Say], Tracker]) -> None:
        tracker = None
        try:
            tracker = start(self._messages.put)
            self.place = tracker.place
            for values in iter(self._queue.get, None):
                tracker.write(*values)
            tracker.close()
        except Exception as error:
            what = "failed, and is off from now on" if tracker else "could not be started, and is off"
            self._messages.put(f"{self.name}: {what} ({reason(error)}); metrics.csv has all.")
            self._off = True
            with suppress(Exception):
                if tracker:
                    tracker.close()


def start_tensorboard(folder: RunFolder, config: Mapping[str, Any], frames: int = 0) -> Tracker:
    """Event files in the folder ``tensorboard`` of the run; a resumed run (``frames`` above 0) goes on in it."""
    from torch.utils.tensorboard import SummaryWriter

    path = folder.path / "tensorboard"
    # What the run logged after the checkpoint that it goes on from is hidden.
    writer = SummaryWriter(str(path), purge_step=frames + 1 if frames else None)
    if not frames:
        text = json.dumps(config, indent=4, default=str)
        writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def write(frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, frames)

    return Tracker(f"tensorboard --logdir {path}", write, writer.close)


def start_wandb(
    folder: RunFolder, config: Mapping[str, Any], run_id: str, mode: str, warn: Say, options: Mapping[str, Any]
) -> Tracker:
    """A run of wandb, in the folder ``wandb`` of the run; offline, with a warning, if the server can't be reached.

    It gets options and values: no code, no packages, no output of the terminal.
    """
    import wandb

    private: dict[str, Any] = {"disable_code": True, "disable_git": True, "save_code": False, "x_save_requirements": False}
    quiet: dict[str, Any] = {"silent": True, "console": "off", "reinit": "create_new"}
    settings = wandb.Settings(init_timeout=CONNECT_SECONDS, finish_timeout=FINISH_SECONDS, **private, **quiet)
    place = os.environ.get("WANDB_DIR", str(folder.path))
    where: dict[str, Any] = {"id": run_id, "dir": place, "mode": mode, "resume": "allow"}
    try:
        # Without a key wandb.init would ask for one on the terminal, and where it fails it blocks the run's id: check first.
        if mode == "online" and not wandb.login(prompt=False, verify=True):
            raise ConnectionError("there is no key: run `wandb login`, or set WANDB_API_KEY")
        run = wandb.init(config=dict(config), settings=settings, **where, **options)
    except Exception as error:
        if mode != "online":
            raise
        warn(f"wandb can't be reached, and is offline in this run ({reason(error)}).")
        wandb.teardown()  # ends what is left of the attempt, which may hold the run's id
        return start_wandb(folder, config, run_id, "offline", warn, options)
    # Frames, not calls, are the axis: a resumed run goes back to its checkpoint.
    run.define_metric("frames")
    run.define_metric("*", step_metric="frames")

    def write(frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        run.log({"frames": frames, "seconds": seconds, **metrics})

    return Tracker(str(run.url) if mode == "online" else f"wandb sync {Path(run.dir).parent}", write, run.finish)


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def wandb_mode() -> str:
    """What ``WANDB_MODE`` asks for; offline where it is not set. A ``ValueError`` if it is none of ours."""
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode not in MODES:
        raise ValueError(f"WANDB_MODE must be one of {', '.join(MODES)}, got {mode!r}: change it, or set wandb.mode.")
    return mode


def check_logger(kind: str, mode: str | None = None) -> None:
    """Raise a ``ValueError`` if ``kind`` is no logger, or one whose package is not installed. Cheap: for before any work."""
    if kind == "wandb" and mode is None:
        wandb_mode()
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise ValueError(f"logger must be one of {', '.join(KINDS)}, got {kind!r}{f'; {close[0]}?' if close else ''}.")
    spec = find_spec(kind)
    # A folder named wandb, which wandb leaves behind, is a package without an origin.
    if kind != "csv" and (spec is None or spec.origin is None):
        raise ValueError(f"logger={kind} needs the package {kind}: pip install {kind}, or choose logger=csv.")


def make_logger(
    kind: str,
    folder: RunFolder,
    config: Mapping[str, Any] | None = None,
    *,
    frames: int = 0,
    mode: str | None = None,
    warn: Say = _warn,
    **options: Any,
) -> BackgroundLogger:
    """The logger that follows along beside ``metrics.csv``. It is made at once, and starts in the background.

    Args:
        kind (str): ``"csv"`` for none, ``"tensorboard"`` or ``"wandb"``.
        folder (RunFolder): where it writes; a resumed run goes on in the same place, and in the same run of wandb.
        config (Mapping or None): the nested options, shown beside the values.
        frames (int): what a resumed run starts from. Defaults to 0.
        mode (str or None): of wandb: ``"offline"``, ``"online"`` or ``"disabled"``. ``None`` (default): ``WANDB_MODE``, or
            offline.
        warn (callable): see :class:`BackgroundLogger`.
        options: of :func:`wandb.init`: ``project``, ``entity``, ``group``, ... Where one is ``None``, the environment variable
            of wandb holds; the project is then omnet_torchrl.
    """
    check_logger(kind, mode)
    mode = mode or (wandb_mode() if kind == "wandb" else "disabled")  # only wandb asks what its environment variables say
    if kind == "csv" or (kind == "wandb" and mode == "disabled"):
        return BackgroundLogger()
    for name, variable in VARIABLES.items():  # which wandb reads once in a process
        options[name] = options.get(name) or os.environ.get(variable)
    options["project"] = options["project"] or "omnet_torchrl"
    if kind == "tensorboard":
        return BackgroundLogger(kind, lambda say: start_tensorboard(folder, config or {}, frames), warn=warn)
    run_id = folder.info.get("wandb_id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    folder.write_info(wandb_id=run_id)
    return BackgroundLogger(kind, lambda say: start_wandb(folder, config or {}, run_id, mode, say, options), warn=warn)
