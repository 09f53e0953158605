"""Lets lm-eval tell a model that an evaluation begins.

lm-eval's evaluator calls nothing on a model before the first requests, and nothing on all processes
after the last, so a model cannot tell a second evaluation from more requests of a first one that
was interrupted. Its ``evaluate`` is the one place that every evaluation goes through on every
process.
"""

from __future__ import annotations

import functools
from typing import Any

from lm_eval import evaluator


def announce_evaluations() -> None:
    """Make lm-eval's ``evaluate`` first call ``begin_evaluation`` of a model that has it.

    May be called any number of times. Who has imported ``evaluate`` by name before the first call
    keeps one that announces nothing; ``simple_evaluate`` and the command always take the new one.
    """
    evaluate = evaluator.evaluate
    if getattr(evaluate, "announces_evaluations", False):
        return

    @functools.wraps(evaluate)
    def announcing(*args: Any, **kwargs: Any) -> Any:
        begin = getattr(kwargs.get("lm", args[0] if args else None), "begin_evaluation", None)
        if begin is not None:
            begin()
        return evaluate(*args, **kwargs)

    announcing.announces_evaluations = True  # type: ignore[attr-defined]
    evaluator.evaluate = announcing
