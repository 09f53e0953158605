"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes
    ----------
    subject, found : str
        What was looked at, and what it is like.
    state : str
        "ok", "note" (works, and is good to know) or "problem" (something will not work).
    remedy : str
        What to do; empty where nothing is to be done.
    """

    subject: str
    found: str
    state: str = OK
    remedy: str = ""
