"""TensorBoard and wandb, behind one interface.

Starting one takes a bounded time, whatever the network and the disk do. After that a tracker may raise and hang:
:class:`~omnet_torchrl.training.logging.BackgroundLogger` writes to it from a thread.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, Protocol

from omnet_torchrl.training.run_folder import RunFolder

START_SECONDS, CONNECT_SECONDS, FINISH_SECONDS = 20.0, 14.0, 8.0


class Tracker(Protocol):
    """Shows the values of a run; ``place`` says to a person how to look at them."""

    name: str
    place: str

    def write(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Write what was logged at once."""

    def close(self) -> None:
        """Finish what is under way."""


class TensorBoardTracker:
    """Event files in the folder ``tensorboard`` of the run; a resumed run (``frames`` above 0) goes on in it."""

    name = "tensorboard"

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], frames: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        path = folder.path / "tensorboard"
        self.place = f"tensorboard --logdir {path}"
        # What the run logged after the checkpoint that it goes on from is hidden.
        self._writer = SummaryWriter(str(path), purge_step=frames + 1 if frames else None)
        if not frames:
            text = json.dumps(config, indent=4, default=str)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def write(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """A scalar per value, at ``frames``."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, frames)

    def close(self) -> None:
        """Write what is still buffered."""
        self._writer.close()


class WandbTracker:
    """A run of wandb, in the folder ``wandb`` of the run. Configuration and values are all that it is given: no code, no
    packages, no terminal output.
    """

    name = "wandb"

    def __init__(self, folder: RunFolder, config: Mapping[str, Any], run_id: str, mode: str, options: Mapping[str, Any]):
        import wandb

        deadline = time.monotonic() + CONNECT_SECONDS
        # Without a key wandb.init would ask for one on the terminal, and where it fails it blocks the run's id: check first.
        if mode == "online" and not wandb.login(prompt=False, verify=True):
            raise ConnectionError("there is no key: run `wandb login`, or set WANDB_API_KEY")
        settings = wandb.Settings(
            init_timeout=max(1.0, deadline - time.monotonic() - 1),
            finish_timeout=FINISH_SECONDS,
            reinit="create_new",
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_save_requirements=False,
        )
        where: dict[str, Any] = {"id": run_id, "dir": str(folder.path), "mode": mode, "resume": "allow"}
        self._run = wandb.init(config=dict(config), settings=settings, **where, **options)
        # Frames, not calls, are the axis: a resumed run goes back to its checkpoint.
        self._run.define_metric("frames")
        self._run.define_metric("*", step_metric="frames")
        self.place = str(self._run.url) if mode == "online" else f"wandb sync {Path(self._run.dir).parent}"

    def write(self, frames: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """A row of the history."""
        self._run.log({"frames": frames, "seconds": seconds, **metrics})

    def close(self) -> None:
        """End the run; what could not be sent by then stays on the disk."""
        self._run.finish()


def start_tensorboard(folder: RunFolder, config: Mapping[str, Any], frames: int = 0) -> Tracker:
    """A :class:`TensorBoardTracker`, or an exception within 20 s."""
    return _within(START_SECONDS, lambda: TensorBoardTracker(folder, config, frames))


def start_wandb(
    folder: RunFolder, config: Mapping[str, Any], mode: str, warn: Callable[[str], None], options: Mapping[str, Any]
) -> Tracker:
    """A :class:`WandbTracker`, or an exception within 20 s; offline, with a warning, if the server can't be reached."""
    run_id = folder.info.get("wandb_id") or secrets.token_hex(4)
    folder.write_info(wandb_id=run_id)
    deadline = time.monotonic() + START_SECONDS
    if mode == "online":
        try:
            return _within(CONNECT_SECONDS, lambda: WandbTracker(folder, config, run_id, "online", options))
        except Exception as error:
            warn(f"wandb can't be reached, and is offline in this run ({reason(error)}).")

    def offline() -> Tracker:
        if mode == "online":
            import wandb

            wandb.teardown()  # ends what is left of the attempt, which may hold the run's id
        return WandbTracker(folder, config, run_id, "offline", options)

    return _within(deadline - time.monotonic(), offline)


def _within(seconds: float, make: Callable[[], Tracker]) -> Tracker:
    """What ``make`` returns or raises within some seconds; a tracker that comes later is closed."""
    made: Future[Tracker] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    def discard(late: Future[Tracker]) -> None:
        if late.exception() is None:
            late.result().close()

    threading.Thread(target=work, name="start of a logger", daemon=True).start()
    try:
        return made.result(seconds)
    except FutureTimeout:
        made.add_done_callback(discard)
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
