"""Signals that end a load test: one exception, after which all processes are stopped in order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal that asks this program to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class _Inbox:
    """The signal that has come, and whether it has to wait."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.holds = 0
        self.raised = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        # A second signal must not interrupt the cleaning up, which is bounded in time.
        if self.number is None:
            self.number = number
            self.deliver()

    def deliver(self) -> None:
        if self.number is not None and self.holds == 0 and not self.raised:
            self.raised = True
            raise Interrupted(self.number)


_inbox = _Inbox()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` in the main thread at the first signal, and ignore others.

    Mutates: handlers of ``SIGNALS``, restored at the end.
    """
    _inbox.__init__()  # type: ignore[misc]
    before = {number: signal.signal(number, _inbox.receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until the end of the block: a process is being started or stopped."""
    _inbox.holds += 1
    try:
        yield
    finally:
        _inbox.holds -= 1
        _inbox.deliver()
