"""Does a configuration fit the routers of a model? Asked before anything is changed."""

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
        If it asks for what a router does not do.
    ModelError
        If a router is none that can be patched.
    """
    config.check_experts(routers[0].num_experts)
    for layer in config.select_layers(len(routers)):
        check_router(config, routers[layer])


def check_router(config: RoutingConfig, router: Router) -> None:
    """Raise if the configuration does not fit this router."""
    behaviour, name = router.behaviour, type(router.module).__name__
    if not behaviour.softmax:
        if config.needs_softmax:
            raise ParameterError(
                f"rule={config.rule}, statistic={config.statistic}, "
                f"null_scope={config.null_scope} needs weights that are a softmax of the "
                f"logits, which those of {name} are not: "
                "use a test of the logits of a layer."
            )
        if config.temperature != 1.0:
            raise ParameterError(
                f"temperature={config.temperature} would replace the scores of {name}, which are "
                "no plain softmax: leave it at 1."
            )
    asked = behaviour.obeys and config.mode == "patch"
    if not (asked or behaviour.softmax) and config.max_k > router.top_k:
        raise ParameterError(
            f"max_k={config.max_k} is more than the {router.top_k} experts that {name} gives "
            f"weights to, and its scores are its own: give a max_k of at most {router.top_k}."
        )
    takes_first = not config.fixed_count or (not asked and config.max_k < router.top_k)
    if behaviour.order is None and takes_first:
        raise ParameterError(
            f"rule={config.rule} takes the first of a token's experts, and in what order {name} "
            "ranks them could not be found out: use rule=topk with mode=patch."
        )
