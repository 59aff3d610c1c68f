"""What ends a run before its time: Ctrl-C and SIGTERM, and numbers that are not finite."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

from tensordict import NestedKey
from torch import Tensor

Handler = Callable[[int, Any], Any]


class AbandonedError(Exception):
    """A signal ended an evaluation, which the run that goes on makes anew."""


class Stop:
    """Remembers that the run is to be stopped.

    Args:
        say (callable): gets a line for a person.
    """

    _abandonable: Stop | None = None  # whose signals :func:`check_stop` looks for

    def __init__(self, say: Callable[[str], None]):
        self.wanted, self._say = False, say

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within, the first Ctrl-C or SIGTERM sets ``wanted``; a second one does what it did before."""

        def stop(*_: object) -> None:
            self.wanted = True
            restore()
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
    """Within, ``handler`` gets both signals, until the function that is given here is called.

    Outside of the main thread, which alone may change that, nothing happens.
    """
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield stack.close


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
