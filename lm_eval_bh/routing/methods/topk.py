"""Static top-k, the control of every other method."""

from __future__ import annotations

from .base import SCORED, Method
from .declare import Parameter, counts, or_none


class TopK(Method):
    """Take the ``max_k`` experts that the router, or the statistic, ranks first."""

    name, label, source = "topk", "top-k", "static top-k: always max_k experts"
    fixed_count = True
    declared = SCORED | {
        "k_per_layer": Parameter(
            None,
            "for `topk`, as many experts in each routed layer: `5-3-3-5`",
            *or_none((counts, "numbers of experts joined by '-', such as 5-3-3-5")),
        )
    }
