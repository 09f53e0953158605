"""Steps up or down within bounds in one sort, one comparison and one search, for NumPy.

The bounds are put into the thresholds, so that a search always finds a rank, and what is found into
a table, so that nothing is left to be clamped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.routing.rules import stepwise
from lm_eval_bh.routing.rules.registry import Rule


class WithinBounds:
    """How many experts a rule takes of scores that no gradient is asked of.

    It decides what the rule decides, to the last bit, clamped to the bounds.

    Parameters
    ----------
    thresholds : ndarray
        float ``[experts]``, what ascending negated scores are compared with.
    min_k, max_k : int
        The bounds.
    down : bool
        Whether it steps down.
    """

    def __init__(self, thresholds: NDArray[Any], min_k: int, max_k: int, *, down: bool) -> None:
        bounds = thresholds.copy()
        ranks = np.arange(len(bounds))
        self._down = down
        if down:
            bounds[max_k:] = -np.inf  # the first of these fails, if none does before
            self._bounds, self._counts = bounds[None], ranks.clip(min_k)
        else:
            bounds[min_k - 1] = np.inf  # passes, if none does behind it
            self._bounds, self._counts = -bounds[None, ::-1], (len(bounds) - ranks).clip(max=max_k)

    @classmethod
    def of(
        cls, rule: Rule, thresholds: NDArray[Any], min_k: int, max_k: int
    ) -> WithinBounds | None:
        """Return that of a rule, or None if it steps another way.

        ``thresholds`` are float ``[rows, experts]``.
        """
        down = rule.count is stepwise.step_down and max_k < thresholds.shape[-1]
        if not down and rule.count is not stepwise.step_up:
            return None
        return cls(thresholds[0], min_k, max_k, down=down)

    def __call__(self, scores: NDArray[Any]) -> NDArray[np.int64]:
        """Return how many experts each token gets, int64 ``[tokens]``, of ``[tokens, experts]``."""
        if self._down:
            ascending = -scores
            ascending.sort(axis=-1)
            found = (ascending > self._bounds).argmax(-1)
        else:
            ascending = scores.copy()
            ascending.sort(axis=-1)
            found = (ascending >= self._bounds).argmax(-1)
        counts: NDArray[np.int64] = self._counts.take(found)
        return counts
