"""All combinations of some parameters, each with those that its rule takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.declared import serves
from lm_eval_bh.routing.parameters import canonical


def grid_of(
    rules: Iterable[str], alphas: Iterable[float], max_ks: Iterable[int], **others: Any
) -> list[RoutingConfig]:
    """Return all combinations, each with the parameters that its rule takes.

    Rules without alpha take neither alpha nor ``others``.

    Raises
    ------
    ParameterError
        If a value is out of range, or there is no combination.
    """
    alphas, max_ks, others = list(alphas), list(max_ks), canonical(others)
    configs = []
    for name in rules:
        if not RoutingConfig(rule=name).adaptive:
            configs += [RoutingConfig(rule=name, max_k=max_k) for max_k in max_ks]
            continue
        fitting = {key: value for key, value in others.items() if serves(key, name)}
        for alpha, max_k in itertools.product(alphas, max_ks):
            configs.append(
                RoutingConfig.named({"alpha": alpha, "rule": name, "max_k": max_k, **fitting})
            )
    if not configs:
        raise ParameterError("The grid is empty: give at least one rule, level and max_k.")
    return configs
