"""Says once a minute what a sweep waits for, and whether that makes progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 60.0  # seconds between two lines
LITTLE = 0.05  # of a processor: a process that computes has more, even among many

Say = Callable[[str], None]


class Progress:
    """How long something has been under way, and how much of a processor it has had lately."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._used = 0.0

    def line(self, name: str, used: float | None) -> str:
        """Return what to say of it.

        Parameters
        ----------
        name : str
            Of the experiment.
        used : float or None
            Seconds of a processor that its process has had; None if it does not answer.
        """
        now = time.monotonic()
        text = f"{name}, {now - self._start:.0f} s"
        if used is None:
            return f"{text}, whose worker does not answer (is it still starting?)"
        share = max(used - self._used, 0.0) / max(now - self._last, 1e-9)
        self._last, self._used = now, used
        if share >= LITTLE:
            return text
        return (
            f"{text}, which makes hardly any progress: its process had {share:.0%} of a processor "
            "lately; perhaps other programs take them all, or something is being downloaded"
        )


@contextmanager
def saying(name: str, say: Say) -> Iterator[None]:
    """Say of an experiment of this process, while the block lasts, that it is still running."""
    progress, ended = Progress(), threading.Event()
    progress.line(name, time.process_time())

    def speak() -> None:
        while not ended.wait(EVERY):
            say(f"Waiting for {progress.line(name, time.process_time())}.")

    thread = threading.Thread(target=speak, name="saying what is waited for", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
