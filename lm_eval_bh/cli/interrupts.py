"""What Ctrl-C and SIGTERM end with: one line that says what is kept and how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit code of shells for a program that SIGINT has ended
TERMINATED = 143  # and for SIGTERM, which schedulers send before they kill
NOTHING_HALF_WRITTEN = "no file is half-written; run the same command again to start over"
EXPERIMENTS_KEPT = "finished experiments are kept; run the same command again to continue"


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come; whatever cleans up after Ctrl-C does so here."""


class StoppedByUserError(Exception):
    """The user has stopped the command; the message says what is kept."""

    def __init__(self, kept: str, code: int) -> None:
        super().__init__(kept)
        self.code = code


def code_of(stop: BaseException) -> int:
    """Return the exit code for what has stopped the command."""
    return TERMINATED if isinstance(stop, TerminatedError) else INTERRUPTED


@contextmanager
def on_interrupt(kept: str) -> Iterator[None]:
    """Turn Ctrl-C inside the block into :class:`StoppedByUserError` with this message."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise StoppedByUserError(kept, code_of(stop)) from None


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM inside the block do what Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():  # others cannot be told
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    _under_way.append(True)
    try:
        yield
    finally:
        _under_way.pop()
        signal.signal(signal.SIGTERM, before)


_under_way: list[bool] = []  # not empty while a command runs in this process


def _end_quietly() -> None:
    """Let a forked helper, such as those of lm-eval's bootstrap, end with its parent, wordless.

    Ctrl-C reaches all processes of a terminal, and a parent that was killed leaves broken pipes.
    """
    if _under_way:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its helpers itself
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_quietly)
