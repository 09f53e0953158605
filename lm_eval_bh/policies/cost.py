"""Costs at which policies are compared: experts per token, or distinct experts per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """A cost at which policies are compared.

    Attributes
    ----------
    measured : str
        Its field in a measured row or :class:`~lm_eval_bh.routing.solution.Solution`.
    target : str
        The routing parameter with its target, for which a method's own parameter is solved.
    words : str
        Its name, in the plural.
    """

    measured: str
    target: str
    words: str

    def of(self, row: Any) -> float:
        """Return the cost of a measured row."""
        found = getattr(row, self.measured)
        assert found is not None
        return float(found)


EXPERTS = Cost("mean_experts", "target_experts", "experts")
DISTINCT = Cost("distinct_experts", "target_distinct", "distinct experts")
