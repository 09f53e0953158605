"""Tells a model when lm-eval begins an evaluation.

lm-eval's evaluator calls nothing on a model before the first requests, and nothing on all processes
after the last, so a model cannot tell a second evaluation from further requests of an interrupted
one. Every evaluation on every process goes through lm-eval's ``evaluate``.
"""

from __future__ import annotations

import functools
from typing import Any

from lm_eval import evaluator


def announce_evaluations() -> None:
    """Make lm-eval's ``evaluate`` call ``begin_evaluation`` of models that have it.

    May be called any number of times. Code that imported ``evaluate`` by name earlier keeps the old
    function; ``simple_evaluate`` and the command always take the new one.
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
