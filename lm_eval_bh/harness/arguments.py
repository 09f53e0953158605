"""From ``--model_args`` to a routing configuration, contradictions named."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.rules.registry import RULES

DEFAULT_ALPHA = 0.4


def routing_config(
    *,
    alpha: float | None = None,
    max_k: int = 8,
    min_k: int | None = None,
    temperature: float = 1.0,
    rule: str = "bh",
    mode: str = "patch",
    renormalize: Any = "auto",
    layers: str | int = "all",
    statistic: str = "logit",
    null: str = "pooled",
    trim: int | None = None,
    seed: int | None = None,
    target_experts: float | None = None,
    budget: str | None = None,
    kde: str | None = None,
) -> RoutingConfig:
    """Return the configuration that the arguments of ``hf-bh`` ask for.

    Parameters
    ----------
    alpha, max_k, min_k, temperature, rule, mode, renormalize, layers, statistic, null, trim, seed,
    target_experts, budget
        See :class:`~lm_eval_bh.routing.config.RoutingConfig`; None for what was not given.
    kde : str or None
        Only looked at: whether a null model was given.

    Raises
    ------
    ParameterError
        If a value is out of range, or has no meaning beside another.
    """
    if target_experts is not None and alpha is not None:
        raise ParameterError(
            f"alpha={alpha!r} contradicts target_experts={target_experts!r}, for which alpha "
            "is solved: give one of them."
        )
    if rule in RULES:
        _check_contradictions(
            rule, alpha=alpha, min_k=min_k, max_k=max_k, kde=kde, statistic=statistic
        )
    return RoutingConfig(
        alpha=DEFAULT_ALPHA if alpha is None else alpha,
        rule=rule,
        min_k=1 if min_k is None else min_k,
        max_k=max_k,
        temperature=temperature,
        renormalize=renormalize,
        mode=mode,
        layers=str(layers),
        statistic=statistic,
        null=null,
        trim=trim,
        seed=0 if seed is None else seed,
        target_experts=target_experts,
        budget=budget or "model",
    )


NAMES = frozenset(inspect.signature(routing_config).parameters)


def arguments_of(rule: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a rule takes of arguments that several rules were given together.

    A rule without test takes no null model, static top-k stays plain, and only a rule that draws
    takes a seed.

    Parameters
    ----------
    rule : str
        One of :data:`~lm_eval_bh.routing.rules.registry.RULES`.
    common : mapping
        ``--model_args``.
    """
    this = RULES[rule]
    foreign = set() if this.random else {"seed"}
    if this.fixed_count:
        foreign |= {"min_k", "statistic", "null", "trim", "kde", "target_experts", "budget"}
    elif not this.tests:
        foreign |= {"null", "trim"}
        if common.get("statistic", "logit") == "logit":
            foreign.add("kde")
    return {name: value for name, value in common.items() if name not in foreign}


def _check_contradictions(
    rule: str, *, alpha: Any, min_k: Any, max_k: Any, kde: Any, statistic: str
) -> None:
    meaningless = {}
    if RULES[rule].fixed_count:
        meaningless["alpha"] = alpha
    if not RULES[rule].tests and statistic == "logit":
        meaningless["kde"] = kde
    for name, value in meaningless.items():
        if value is not None:
            raise ParameterError(
                f"{name}={value!r} has no meaning with rule={rule}, which tests nothing: "
                "leave it out."
            )
    if RULES[rule].fixed_count and min_k not in (None, max_k):
        raise ParameterError(
            f"min_k={min_k} contradicts rule={rule}, which always takes max_k={max_k}: "
            "leave it out."
        )
