"""Reports once a minute what a sweep waits for, and whether it makes progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 60.0  # seconds between two lines
LITTLE = 0.05  # of a CPU: a computing process has more, even among many

Say = Callable[[str], None]


class Progress:
    """The time that something has been running, and its recent CPU use."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._used = 0.0

    def line(self, name: str, used: float | None) -> str:
        """Return a line about its progress.

        Parameters
        ----------
        name : str
            Name of the experiment.
        used : float or None
            CPU seconds of its process; None if it does not answer.
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
            f"{text}, which makes hardly any progress: its process used {share:.0%} of a CPU "
            "lately; perhaps other programs use all CPUs, or something is being downloaded"
        )


@contextmanager
def saying(name: str, say: Say) -> Iterator[None]:
    """Report within the block that an experiment of this process is still running."""
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
