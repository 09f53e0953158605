"""Names of routing configurations, for tables and legends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lm_eval_bh.schema import RuleInfo, configuration_name

# Parameters of methods of a step, and their usual values.
OF_STEPS = {
    "step_budget": "budget",
    "k0": "k0",
    "power": "power",
    "combine": "by",
    "fallback": "else",
    "phase": "in",
    "decode_batch": "batch",
    "batch_seed": "batch seed",
}
USUAL = {("power", 2), ("fallback", "loaded"), ("combine", "simes"), ("phase", "all"), ("k0", 0)}


def strategy_label(config: Mapping[str, Any], rule: RuleInfo) -> str:
    """Return a short name of a routing configuration.

    Parameters
    ----------
    config : mapping
        The complete routing configuration.
    rule : RuleInfo
        Its rule. The ``k`` of a label like "top-k" is replaced by the number of experts.

    Examples
    --------
    >>> bh = {"label": "BH", "fixed_count": False}
    >>> strategy_label({"rule": "bh", "alpha": 0.4, "min_k": 1, "max_k": 8}, bh)
    'BH a=0.40, max 8'
    >>> strategy_label({"rule": "topk", "max_k": 8}, {"label": "top-k", "fixed_count": True})
    'top-8'
    >>> per_layer = {"rule": "topk", "max_k": 5, "k_per_layer": "5-3-3-5"}
    >>> strategy_label(per_layer, {"label": "top-k", "fixed_count": True})
    'top-5-3-3-5'
    """
    label, max_k = rule["label"], config["max_k"]
    if rule["fixed_count"]:
        k = config.get("k_per_layer") or max_k
        name = f"{label[:-1]}{k}" if label.endswith("-k") else f"{label} {k}"
        return name + _further(config, rule)
    alpha, target = config["alpha"], _asked(config)
    if alpha is None or _lacks_level(rule):  # for example in an imported trace
        return f"{label}, max {max_k}{_further(config, rule)}"
    level = f"a={alpha:.2f}" if round(alpha, 2) == alpha else f"a={alpha:.6g}"
    if target is not None:
        level = f"{_target(config)} {target:g}"
    return f"{label} {level}, max {max_k}{_further(config, rule)}"


def variant_label(config: Mapping[str, Any], rule: RuleInfo) -> str:
    """Return the common name of configurations that differ only in level and ``max_k``.

    Examples
    --------
    >>> bh = {"label": "BH", "fixed_count": False}
    >>> variant_label({"alpha": 0.4, "max_k": 8, "statistic": "contribution"}, bh)
    'BH, contribution'
    """
    solved = "" if _asked(config) is None else f", {_target(config)}"
    return f"{rule['label']}{solved}{_further(config, rule)}"


def config_name(config: Mapping[str, Any], rule: RuleInfo, engine: str = "") -> str:
    """Return the earlier prototype's name of a configuration, with newer settings appended.

    Examples
    --------
    >>> bh = {"name": "bh", "label": "BH", "fixed_count": False}
    >>> config_name({"alpha": 0.4, "max_k": 8}, bh)
    '8experts_bh_a040'
    >>> solved = {"alpha": 0.37, "target_experts": 4.0, "budget": "model", "max_k": 8, "mass": 0.2}
    >>> config_name(solved, bh)
    '8experts_bh_target_4_mass_02'
    """
    max_k = config["max_k"]
    further = _further(config, rule) + engine
    if rule["fixed_count"]:
        name = configuration_name(rule["name"], max_k, None)
        further = (config.get("k_per_layer") or "") + further
    elif _lacks_level(rule):
        name = f"{max_k}experts_{rule['name']}"
    elif (target := _asked(config)) is None:
        name = configuration_name(rule["name"], max_k, config["alpha"])
    else:
        name = f"{max_k}experts_{rule['name']}"
        further = f"{_target(config)} {target:g}{further}"
    return "_".join([name, *re.findall(r"[a-z0-9]+", further.lower().replace(".", ""))])


def _lacks_level(rule: RuleInfo) -> bool:
    """Return whether a method has no alpha; unknown for the first release's rules."""
    return bool(rule.get("source")) and not rule.get("alpha")


def _asked(config: Mapping[str, Any]) -> float | None:
    """Return the target for which alpha was solved."""
    distinct: float | None = config.get("target_distinct")
    return config.get("target_experts") if distinct is None else distinct


def _target(config: Mapping[str, Any]) -> str:
    if config.get("target_distinct") is not None:
        return "distinct"
    return "layer target" if config["budget"] == "layer" else "target"


def _further(config: Mapping[str, Any], rule: RuleInfo) -> str:
    """Return a configuration's non-default settings, besides rule, level and ``max_k``."""
    label = ""
    if not rule["fixed_count"] and config.get("min_k", 1) != 1:
        label += f", min {config['min_k']}"
    if config.get("statistic", "logit") not in ("logit", None):
        label += f", {config['statistic']}"
    if (scope := config.get("null_scope", "layer")) not in ("layer", None):
        label += f", null of {'the' if scope == 'model' else 'each'} {scope}"
    if config.get("null_from", "all") == "unselected":
        label += ", unselected"
    if config.get("family", "token") == "all":
        label += ", one family"
    if config.get("mass") is not None:
        label += f", mass {config['mass']:g}"
    if config.get("trim"):
        label += f", trim {config['trim']}"
    if config.get("temperature", 1.0) != 1.0:
        label += f", T={config['temperature']:g}"
    if config.get("renormalize", "auto") != "auto":
        label += f", renormalize={str(config['renormalize']).lower()}"
    if config.get("layers", "all") != "all":
        label += f", layers {config['layers']}"
    for name, title in OF_STEPS.items():
        if (value := config.get(name)) is not None and (name, value) not in USUAL:
            label += f", {title} {value}"
    return label + (", analyze only" if config.get("mode") == "analyze" else "")
