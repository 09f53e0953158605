"""What Ctrl-C ends with: one line that says what is kept and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code of shells for a program that SIGINT has ended
NOTHING_HALF_WRITTEN = "no file is half-written; run the same command again to start over"
EXPERIMENTS_KEPT = "finished experiments are kept; run the same command again to continue"


class StoppedByUserError(Exception):
    """The user has stopped the command; the message says what is kept."""


@contextmanager
def on_interrupt(kept: str) -> Iterator[None]:
    """Turn Ctrl-C inside the block into :class:`StoppedByUserError` with this message."""
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedByUserError(kept) from None
