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
    rules: Iterable[str],
    alphas: Iterable[float],
    max_ks: Iterable[int],
    decode_batch: int | None = None,
    **others: Any,
) -> list[RoutingConfig]:
    """Return all combinations, each with the parameters that its rule takes.

    Rules without alpha take neither alpha nor ``others``; all take ``decode_batch``.

    Raises
    ------
    ParameterError
        If a value is out of range, or there is no combination.
    """
    alphas, max_ks, others = list(alphas), list(max_ks), canonical(others)
    configs = []
    for name in rules:
        one = {"rule": name, "decode_batch": decode_batch}
        plain = RoutingConfig(**one)
        if plain.adaptive:
            one |= {key: value for key, value in others.items() if serves(key, name)}
        levels = alphas if plain.method.alpha else [plain.alpha]
        for alpha, max_k in itertools.product(levels, max_ks):
            configs.append(RoutingConfig.named({**one, "alpha": alpha, "max_k": max_k}))
    if not configs:
        raise ParameterError("The grid is empty: give at least one rule, level and max_k.")
    return configs
