"""Finds the parameter of a method at which a mean meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable

from lm_eval_bh.routing.methods import Method

LOG_ODDS = 20.0  # alpha is sought between 2e-9 and 1 - 2e-9
HALVINGS = 24

Mean = Callable[[float], float]


def bisect(mean: Mean, target: float, method: type[Method]) -> float:
    """Return the parameter of a method whose mean is nearest to the target.

    The mean rises with the level of a test and falls with that of ``min_p`` and ``min_w``.
    """
    low, high = -LOG_ODDS, LOG_ODDS
    ends = mean(parameter_at(low, method)), mean(parameter_at(high, method))
    rising = ends[1] >= ends[0]
    nearest = min((abs(ends[0] - target), low), (abs(ends[1] - target), high))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value = mean(parameter_at(middle, method))
        nearest = min(nearest, (abs(value - target), middle))
        low, high = (middle, high) if (value < target) == rising else (low, middle)
    return parameter_at(nearest[1], method)


def parameter_at(position: float, method: type[Method]) -> float:
    """Return the parameter at a position: log odds, or the log where it has no upper bound."""
    return math.exp(position) if _unbounded(method) else 1 / (1 + math.exp(-position))


def _unbounded(method: type[Method]) -> bool:
    """Return whether the parameter may exceed 1."""
    try:
        method.declared["alpha"].checked("alpha", 2.0)
    except ValueError:
        return False
    return True
