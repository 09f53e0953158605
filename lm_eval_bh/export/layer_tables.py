"""What a policy is in plain numbers: a layer's settings and tables, which need no null model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_eval_bh.errors import PolicyError
from lm_eval_bh.export.portable.adaptive_selection import as_bits
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.rules import adaptive_levels, controls, stepwise
from lm_eval_bh.routing.rules.thresholds import round_down, thresholds_of
from lm_eval_bh.routing.scores.statistic import STATISTICS

# How AdaptiveSelection calls what counts a rule's experts.
COUNTS: dict[Any, str] = {
    None: "fixed",
    stepwise.step_up: "step_up",
    stepwise.step_down: "step_down",
    stepwise.count_all: "each",
    adaptive_levels.two_stage: "two_stage",
    adaptive_levels.storey: "storey",
    controls.top_p: "top_p",
    controls.min_p: "min_p",
}


@dataclass(frozen=True)
class LayerTables:
    """One layer of a policy.

    Attributes
    ----------
    settings : dict
        What :class:`~lm_eval_bh.export.portable.adaptive_selection.AdaptiveSelection` takes: plain
        values for JSON.
    tables : dict of str to Tensor
        Its buffers, floats as the bits of integers.
    """

    settings: dict[str, Any]
    tables: dict[str, Tensor]


def layer_tables(policy: Policy, *, normalizes: bool) -> list[LayerTables]:
    """Return a policy's layers, those that it leaves to the model's own top-k too.

    Parameters
    ----------
    policy : Policy
        Any.
    normalizes : bool
        Whether the model's routers rescale the weights of the selected experts to one.

    Raises
    ------
    PolicyError
        If an engine cannot do what it decides.
    """
    config = policy.config
    _refuse_inexpressible(config)
    routed = config.select_layers(policy.num_layers)
    native = RoutingConfig(rule="topk", max_k=policy.native_top_k)
    return [
        _layer(
            config.for_layer(layer, policy.num_layers) if layer in routed else native,
            policy,
            layer,
            normalizes,
        )
        for layer in range(policy.num_layers)
    ]


def _refuse_inexpressible(config: RoutingConfig) -> None:
    rule = config.at_work
    if config.mode != "patch":
        raise PolicyError(
            f"A policy with mode={config.mode} only counts and routes nothing: make one with "
            "mode=patch."
        )
    if rule.random:
        raise PolicyError(
            f"rule={rule.name} draws experts anew and has no thresholds that an engine could "
            "compare with: the nearest that can be exported is rule=topk with the same max_k."
        )
    if rule.count not in COUNTS:
        raise PolicyError(
            f"rule={rule.name} counts experts in a way that no engine has code for: export one of "
            "the rules that compare scores with thresholds, such as bh or min_w."
        )


def _layer(config: RoutingConfig, policy: Policy, layer: int, normalizes: bool) -> LayerTables:
    rule = config.at_work
    null = policy.null_model
    statistic = STATISTICS[config.scored_by]
    by_p_value = config.tests and config.null_scope == "expert"
    alpha = config.alpha if policy.solution is None else policy.solution.alphas.get(layer, 0.0)
    fixed = config.fixed_count
    tables: dict[str, Tensor] = {}
    if by_p_value:
        assert null is not None
        x, cdf = null.cdf(layer)
        tables["null_x"], tables["null_cdf"] = torch.tensor(x), torch.tensor(cdf)
    if not fixed:
        [thresholds] = thresholds_of([(rule, alpha)], null, layer, policy.num_experts)
        if thresholds is not None and by_p_value:
            tables["critical_values"] = thresholds
        elif thresholds is not None:
            tables["thresholds"] = round_down(thresholds, torch.float32)
    factors = ""
    if not (fixed and config.ranks_by_logit) and statistic.factors:
        assert null is not None
        assert null.factors is not None
        measured = torch.tensor(null.factors[layer])
        factors = "predicted" if statistic.predicts else "measured"
        name = "predictor" if statistic.predicts else "log_factors"
        tables[name] = (measured if statistic.predicts else measured.log()).float()
    settings = {
        "rule": "fixed" if fixed else COUNTS[rule.count],
        "alpha": alpha,
        "min_k": config.min_k,
        "max_k": config.max_k,
        "first_only": rule.alone,
        "by_p_value": by_p_value,
        "ranks_by_logit": config.ranks_by_logit,
        "scores": "weight" if statistic.weighs else "logit",
        "factors": factors,
        "temperature": config.temperature,
        "normalizes": normalizes,
        "rescales": config.renormalize is True or (config.renormalize == "auto" and normalizes),
        "mass": config.mass,
        "native_k": policy.native_top_k,
        "tables": {name: list(table.shape) for name, table in tables.items()},
    }
    least = config.max_k if fixed else config.min_k
    return LayerTables(
        settings,
        {"bounds": torch.tensor([least, config.max_k])}
        | {name: as_bits(table.contiguous()) for name, table in tables.items()},
    )
