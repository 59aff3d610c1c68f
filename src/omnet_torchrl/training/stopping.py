"""What Ctrl-C and SIGTERM do to a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

Handler = Callable[[int, Any], Any]


class AbandonedError(Exception):
    """A signal ended what the run that goes on makes anew."""


def check_stop() -> None:
    """Raise :class:`AbandonedError` within :meth:`Stop.abandonable` where a signal was seen: for loops without an end."""
    stop = _abandonable.get()
    if stop is not None and stop.wanted:
        raise AbandonedError


class Stop:
    """Remembers that the run is to be stopped.

    Args:
        say (callable): gets a line for a person.
    """

    def __init__(self, say: Callable[[str], None]):
        self.wanted, self._say = False, say

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within, the first Ctrl-C or SIGTERM sets ``wanted``; the second one is as ever."""
        before: dict[int, Any] = {}

        def stop(number: int, frame: Any) -> None:
            self.wanted = True
            for each, handler in before.items():
                signal.signal(each, handler)
            with contextlib.suppress(RuntimeError):  # Python's files refuse a print that interrupts another
                self._say("stopping: the run is saved first")

        with handled(stop, before):
            yield

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Within, :func:`check_stop` looks at ``wanted``."""
        token = _abandonable.set(self)
        try:
            yield
        finally:
            _abandonable.reset(token)


_abandonable: ContextVar[Stop | None] = ContextVar("abandonable", default=None)


@contextlib.contextmanager
def handled(handler: Handler, before: dict[int, Any]) -> Iterator[None]:
    """Within, ``handler`` gets both signals. ``before`` gets who had them; outside of the main thread they keep them."""
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: whoever has it decides
                before[number] = signal.getsignal(number)
                signal.signal(number, handler)
                stack.callback(signal.signal, number, before[number])
        yield
