"""Checks that a configuration fits a model's routers, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.routers import Router


def check_fit(config: RoutingConfig, routers: Sequence[Router]) -> None:
    """Raise if the configuration does not fit.

    Raises
    ------
    ParameterError
        If it needs something that a router does not provide.
    ModelError
        If a router cannot be patched.
    """
    config.check_experts(routers[0].num_experts)
    for layer in config.select_layers(len(routers)):
        check_router(config.for_layer(layer, len(routers)), layer, routers[layer])


def check_router(config: RoutingConfig, layer: int, router: Router) -> None:
    """Raise if the configuration does not fit this router."""
    behaviour, name = router.behaviour, type(router.module).__name__
    method = config.method(config.settings(layer, router.num_experts, router.softmax))
    asked = behaviour.obeys and config.mode == "patch"
    if not behaviour.softmax:
        if config.temperature != 1.0:
            raise ParameterError(
                f"temperature={config.temperature} would replace the scores of {name}, which are "
                "no plain softmax: leave it at 1."
            )
        if config.of == "score" and method.statistic.weighs and not behaviour.scores:
            raise ParameterError(
                f"of=score is not available for {name}, whose scores could not be determined: use "
                "of=own, the weights that the router returns."
            )
        if not behaviour.obeys and method.asks(router.top_k) > router.top_k:
            raise ParameterError(
                f"rule={config.rule} with statistic={config.statistic} and max_k={config.max_k} "
                f"needs {method.asks(router.top_k)} experts, but {name} gives weights to only "
                f"{router.top_k}: use rule=min_w, or a test of the logits of a layer, with a max_k "
                f"of at most {router.top_k}."
            )
    if not (asked or behaviour.softmax) and config.max_k > router.top_k:
        raise ParameterError(
            f"max_k={config.max_k} is more than the {router.top_k} experts that {name} gives "
            f"weights to, and its scores are not a softmax: give a max_k of at most {router.top_k}."
        )
    takes_first = not method.fixed or (not asked and config.max_k < router.top_k)
    by_score = method.first_only and not method.follows_router and config.max_k >= router.top_k
    if behaviour.order is None and takes_first and not by_score:
        raise ParameterError(
            f"rule={config.rule} takes a token's first experts, and the order in which {name} "
            "ranks them could not be determined: use rule=topk with mode=patch."
        )
