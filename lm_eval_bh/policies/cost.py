"""What policies are compared at equal amounts of: experts a token, or distinct ones a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """A cost of policies.

    Attributes
    ----------
    measured : str
        Where a measured row, or a :class:`~lm_eval_bh.routing.solution.Solution`, has it.
    target : str
        The parameter of routing that a method's own is solved for it by.
    words : str
        What it is, in the plural.
    """

    measured: str
    target: str
    words: str

    def of(self, row: Any) -> float:
        """Return it of a row that was measured."""
        found = getattr(row, self.measured)
        assert found is not None
        return float(found)


EXPERTS = Cost("mean_experts", "target_experts", "experts")
DISTINCT = Cost("distinct_experts", "target_distinct", "distinct experts")
