"""Remember that a command line has our flags: its errors are then printed as one line."""

import contextlib
from collections.abc import Iterator

_requested = False


def note_request() -> None:
    """Note that the arguments of this process request thin blocks."""
    global _requested
    _requested = True


def ends_in_one_line() -> bool:
    """Whether an error ends the program in one line, in place of a traceback."""
    return _requested


@contextlib.contextmanager
def errors_raised() -> Iterator[None]:
    """Let errors be exceptions for a while, although flags came from a command line."""
    global _requested
    before, _requested = _requested, False
    try:
        yield
    finally:
        _requested = before
