"""What a search tries: families of policies, each with one member for every mean number of experts.

Not tried: ``p_value`` and ``family=all``. Like ``min_w`` they have one fixed threshold a layer, and
with one null model for all layers they select the same experts at the same mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.tables.null_kind import NullKind

MASSES = (0.2, 0.5)  # shares of the native sum, as powers, that kept weights are rescaled by
WINNER = "min_w benefit mass 0.2"  # what won on tiny-olmoe at every mean that was tried

Allocate = Callable[[int], RoutingConfig]


@dataclass(frozen=True)
class Family:
    """Policies that differ in their mean number of experts alone.

    Attributes
    ----------
    name : str
        For tables.
    options : dict
        Parameters of the RoutingConfig.
    """

    name: str
    options: dict[str, Any]

    @property
    def adaptive(self) -> bool:
        """Whether the number of experts depends on the token."""
        return RoutingConfig(**self.options).adaptive

    @property
    def null_kind(self) -> NullKind | None:
        """What null model serves the whole search: the test's, which has all factors too."""
        statistic = RoutingConfig(**self.options).scored_by
        if not RoutingConfig(**self.options).needs_null:
            return None
        return NullKind(statistic, "model", 0, "unselected")

    def at(self, mean: float, native: int) -> RoutingConfig:
        """Return the member with a mean number of experts; a static one takes the nearest."""
        if not self.adaptive:
            return RoutingConfig(**self.options, max_k=max(1, round(mean)))
        return RoutingConfig(**self.options, target_experts=mean, max_k=native)


def static(mass: float | None = None) -> Family:
    """Return static top-k, without or with compensation."""
    if mass is None:
        return Family("topk", {"rule": "topk"})
    return Family(f"topk mass {mass:g}", {"rule": "topk", "mass": mass})


def adaptive_families() -> list[Family]:
    """Return the families whose number of experts depends on the token."""
    factored = [name for name, row in STATISTICS.items() if row.table]
    test = {"rule": "bh", "null_scope": "model", "null_from": "unselected"}
    return [
        *(
            Family(f"min_w {name}", {"rule": "min_w", "statistic": name})
            for name in ("weight", *factored)
        ),
        *(
            Family(
                f"min_w {name} mass {MASSES[0]:g}",
                {"rule": "min_w", "statistic": name, "mass": MASSES[0]},
            )
            for name in factored
        ),
        *(Family(f"bh {name}", test | {"statistic": name}) for name in ("weight", *factored)),
        Family("top_p", {"rule": "top_p"}),
        Family("min_p", {"rule": "min_p"}),
    ]


def winner() -> Family:
    """Return the recipe that a search may be skipped for."""
    return next(family for family in adaptive_families() if family.name == WINNER)
