"""Fits a configuration's method to a layer, with the layer's calibrated tables."""

from __future__ import annotations

from functools import partial

from torch import nn

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.patching.experts import slot_outputs
from lm_eval_bh.routing.tables.null_model import NullModel


def fitted_method(
    config: RoutingConfig,
    null_model: NullModel | None,
    layer: int,
    num_experts: int,
    alpha: float | None = None,
    *,
    softmax: bool = True,
    parent: nn.Module | None = None,
) -> Method:
    """Return a configuration's method, fitted to a layer.

    Parameters
    ----------
    config : RoutingConfig
        The method and its parameters in this layer.
    null_model : NullModel or None
        Everything that was calibrated.
    layer, num_experts : int
        The layer and its number of experts.
    alpha : float, optional
        The method's parameter in this layer, in place of the configuration's.
    softmax : bool
        Whether the weights of the router are a softmax of its logits.
    parent : nn.Module, optional
        The module with the layer's experts, for a method that runs them.

    Raises
    ------
    ParameterError
        If the method needs a null model, or experts to run, and has none.
    """
    method = config.method(config.settings(layer, num_experts, softmax))
    chooses = method.folds or not (method.fixed and method.follows_router)
    if null_model is None and chooses and config.method.needs(method.settings):
        raise ParameterError(
            f"rule={config.rule!r} needs a null model: give null_model=, or use rule='topk'."
        )
    if method.runs_experts:
        experts = getattr(parent, "experts", None)
        if not hasattr(experts, "down_proj"):
            raise ParameterError(
                f"rule={config.rule} runs experts before it decides, but here experts cannot be "
                "run one by one: use it with hf-bh, on a model whose layers hold their experts."
            )
        method.run_experts = partial(slot_outputs, experts)
    tables = None if null_model is None else null_model.layer(layer)
    method.fit(tables, config.alpha if alpha is None else alpha)
    return method
