"""Reads results of the first release, which did not describe rules and scope.

That release had eleven rules, and results only name the one used. This table is frozen: later
releases describe the rule in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import RuleInfo, RunInfo

# Name -> label, whether every token gets max_k experts, whether it is a multiple-testing procedure.
_RULES = {
    "bh": ("BH", False, True),
    "by": ("BY", False, True),
    "holm": ("Holm", False, True),
    "hochberg": ("Hochberg", False, True),
    "bonferroni": ("Bonferroni", False, True),
    "fdr_tsbh": ("fdr_tsbh", False, True),
    "storey": ("storey", False, True),
    "topk": ("top-k", True, False),
    "top_p": ("top-p", False, False),
    "min_p": ("min-p", False, False),
    "random_k": ("random-k", True, False),
}
_SCOPES = {"pooled": "layer"}
# Parameters that it lacked, and their values when unused.
LATER = {"null_from": "all", "family": "token", "k_per_layer": None, "mass": None}


def upgraded(info: RunInfo, name: str) -> RunInfo:
    """Return a run's description in this release's form.

    Raises
    ------
    DataError
        If neither the file nor this module describes the rule.
    """
    config = dict(info["config"])
    if "null" in config:
        null = config.pop("null")
        config.setdefault("null_scope", _SCOPES.get(null, null))
    return cast(RunInfo, info | {"config": config, "rule": info.get("rule") or _rule(config, name)})


def since_first_release(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a configuration that the first release lacked."""
    return {
        name: config[name] for name, unused in LATER.items() if config.get(name, unused) != unused
    }


def _rule(config: dict[str, object], name: str) -> RuleInfo:
    rule = str(config["rule"])
    if rule not in _RULES:
        raise DataError(f"{name} does not describe its rule {rule!r}: run the evaluation again.")
    label, fixed_count, tests = _RULES[rule]
    return {
        "name": rule,
        "label": label,
        "source": "",
        "fixed_count": fixed_count,
        "tests": tests,
        "random": rule == "random_k",
        "alpha": "",
    }
