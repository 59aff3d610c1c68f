"""What ends a run before its time: signals, errors, and numbers that are not finite.

A process that a signal stopped after the run was saved ends with one of two codes. ``STOPPED`` asks whoever started it to start
it again, as a scheduler does with a job that had to make room; 130 says that a person pressed Ctrl-C.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

from tensordict import NestedKey
from torch import Tensor

Handler = Callable[[int, Any], Any]
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, try again
ENDING = (signal.SIGINT, signal.SIGTERM)
# Schedulers give notice by these (Slurm's --signal, submitit), before they end the job; a terminal that closes sends SIGHUP.
NOTICE = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name))


class RunError(RuntimeError):
    """Why a run ended, for a person: its message says everything."""


def exit_code(number: int) -> int:
    """The exit code of a process that signal ``number`` stopped."""
    return 130 if number == signal.SIGINT else STOPPED


class AbandonedError(Exception):
    """A signal ended an evaluation, which the run that goes on makes anew."""


class Stop:
    """Remembers that the run is to be stopped.

    Args:
        say (callable): gets a line for a person.
    """

    _abandonable: Stop | None = None  # whose signals :func:`check_stop` looks for

    def __init__(self, say: Callable[[str], None]):
        self.number: int | None = None  # the first signal
        self._say = say

    @property
    def wanted(self) -> bool:
        """Whether the run is to be stopped."""
        return self.number is not None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within, a signal stops the run; after Ctrl-C or SIGTERM, another of these two does what it did before."""

        def stop(number: int, _: object) -> None:
            if number in ENDING:  # what ends the job a while after it gave notice leaves time to save
                restore()
            if self.number is not None:
                return
            self.number = number
            with contextlib.suppress(RuntimeError):  # Python's files refuse a print that interrupts another
                self._say("stopping: the run is saved first")

        with handled(stop) as restore:
            yield

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Within, :func:`check_stop` raises as soon as the run is to be stopped."""
        Stop._abandonable = self
        try:
            yield
        finally:
            Stop._abandonable = None


def check_stop() -> None:
    """Raise :class:`AbandonedError` within :meth:`Stop.abandonable` where a signal was seen: for loops that may not end."""
    if Stop._abandonable is not None and Stop._abandonable.wanted:
        raise AbandonedError


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[Callable[[], None]]:
    """Within, ``handler`` gets the signals that end a run; the function that is given here lets go of Ctrl-C and SIGTERM.

    Outside of the main thread, which alone may change that, nothing happens. A SIGHUP that is ignored (nohup) stays so.
    """
    with contextlib.ExitStack() as noticed, contextlib.ExitStack() as ended:
        for stack, numbers in ((noticed, NOTICE), (ended, ENDING)):
            for number in numbers:
                if stack is noticed and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                with contextlib.suppress(ValueError):  # not in the main thread
                    stack.callback(signal.signal, number, signal.signal(number, handler))
        yield ended.close


def close_all(*closes: Callable[[], object] | None, say: Callable[[str], object]) -> None:
    """Call each that there is: none keeps the others from being closed, and an error is said."""
    for close in closes:
        try:
            if close is not None:
                close()
        except Exception as error:
            say(f"warning: an environment could not be closed: {error}")


class DivergenceError(RuntimeError):
    """A number that a run computes or is given is not finite."""


def check_finite(key: NestedKey, value: Tensor, when: str) -> None:
    """Raise a :class:`DivergenceError` that names the environments where ``value (*batch, F)`` is not finite."""
    # One number, the sum, tells. A sum of finite numbers may overflow: then each of them is looked at.
    if not math.isfinite(value.sum().item()) and not bool(value.isfinite().all()):
        each = value.reshape(-1, value.shape[-1])
        wrong = (~each.isfinite().all(1)).nonzero().flatten().tolist()
        name, where = key if isinstance(key, str) else key[-1], ", ".join(map(str, wrong))
        raise DivergenceError(f"{name} of environment {where} is not finite {when}: {each[wrong[0]].tolist()}.")
