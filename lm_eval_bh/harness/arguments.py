"""Turns ``--model_args`` into a routing configuration, and names contradictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.declared import ALPHA, PARAMETERS, serves
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.parameters import ALIASES, canonical

DEFAULT_ALPHA = 0.4

# Every routing argument of hf-bh: the null model matters too, but is not a parameter.
ROUTING_ARGUMENTS = frozenset(PARAMETERS) | {"null_model"}
ROUTING_NAMES = ROUTING_ARGUMENTS | {
    alias for alias, name in ALIASES.items() if name in ROUTING_ARGUMENTS
}


def routing_config(arguments: Mapping[str, Any]) -> RoutingConfig:
    """Return the routing configuration for the arguments of ``hf-bh``.

    Parameters
    ----------
    arguments : mapping
        Parameters of :class:`~lm_eval_bh.routing.config.RoutingConfig` by name or alias, None if
        not given; and ``null_model``, of which only the presence matters.

    Raises
    ------
    ParameterError
        If a value is out of range, or contradicts another.
    """
    given = {name: value for name, value in canonical(arguments).items() if value is not None}
    for target in ("target_experts", "target_distinct"):
        if "alpha" in given and target in given:
            raise ParameterError(
                f"alpha={given['alpha']!r} contradicts {target}={given[target]!r}, "
                "for which alpha is solved: give one of them."
            )
    null_model = given.pop("null_model", None)
    method = METHODS.get(str(given.get("rule")))
    own = ALPHA if method is None else method.declared.get("alpha", ALPHA)
    usual = own.default == ALPHA.default  # otherwise the method has its own
    config = RoutingConfig.named(({"alpha": DEFAULT_ALPHA} if usual else {}) | given)
    meaningless = {}
    if not config.adaptive or config.method.recorded:
        meaningless["alpha"] = given.get("alpha")
    if not config.needs_null:
        meaningless["null_model"] = null_model
    for name, value in meaningless.items():
        if value is not None:
            raise ParameterError(
                f"{name}={value!r} has no meaning with rule={config.rule}, which is not a test: "
                "leave it out."
            )
    if not config.adaptive and given.get("min_k", config.max_k) != config.max_k:
        raise ParameterError(
            f"min_k={config.min_k} contradicts rule={config.rule}, "
            f"which always takes max_k={config.max_k}: leave it out."
        )
    return config


def arguments_of(rule: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a rule takes, among those given for several rules.

    A rule other than a test takes no null model, static top-k takes nothing else, and only a random
    rule takes a seed.

    Parameters
    ----------
    rule : str
        One of :data:`~lm_eval_bh.routing.methods.METHODS`.
    common : mapping
        ``--model_args``.
    """
    this = METHODS[rule]
    given = {name: value for name, value in canonical(common).items() if serves(name, rule)}
    foreign = {"min_k", "statistic"} if this.fixed_count else set()
    if (not this.tests and given.get("statistic", "logit") == "logit") or this.fixed_count:
        foreign.add("null_model")
    return {name: value for name, value in given.items() if name not in foreign}
