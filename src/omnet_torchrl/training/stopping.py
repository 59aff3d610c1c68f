"""What Ctrl-C and SIGTERM do to a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

Handler = Callable[[int, Any], Any]


class Abandoned(KeyboardInterrupt):
    """A signal ended what is made anew by the run that goes on."""


class Stop:
    """Remembers that the run is to be stopped.

    Args:
        say (callable): gets a line for a person.
    """

    def __init__(self, say: Callable[[str], None]):
        self.wanted = False
        self._say, self._abandonable = say, False

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
            if self._abandonable:
                raise Abandoned

        with handled(stop, before):
            yield

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Within, that signal raises :class:`Abandoned` at once: what may last for ever."""
        self._abandonable = True
        try:
            yield
        finally:
            self._abandonable = False


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
