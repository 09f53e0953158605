"""A finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One examined subject and its state.

    Attributes
    ----------
    subject, found : str
        The subject, and what was found.
    state : str
        "ok", "note" (works, but worth knowing) or "problem" (something will not work).
    remedy : str
        What to do; empty if nothing.
    """

    subject: str
    found: str
    state: str = OK
    remedy: str = ""
