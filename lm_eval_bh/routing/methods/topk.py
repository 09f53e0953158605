"""Static top-k, the control of every other method."""

from __future__ import annotations

import operator
import re
from typing import Any

from .base import SCORED, Method
from .declare import Parameter, or_none


def _counts(value: Any) -> str:
    """Return numbers joined by '-'; a list of integers is joined."""
    if isinstance(value, (list, tuple)):
        value = "-".join(str(operator.index(k)) for k in value)
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,8}(-[1-9]\d{0,8})*", str(value)):
        raise ValueError
    return str(value)


class TopK(Method):
    """Take the ``max_k`` experts that the router ranks first, or that the statistic does."""

    name, label, source = "topk", "top-k", "static top-k: always max_k experts"
    fixed_count = True
    declared = SCORED | {
        "k_per_layer": Parameter(
            None,
            "for `topk`, as many experts in each routed layer: `5-3-3-5`",
            *or_none((_counts, "numbers of experts joined by '-', such as 5-3-3-5")),
        )
    }
