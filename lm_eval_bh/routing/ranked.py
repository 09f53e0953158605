"""Ranked scores, from which counts at many levels follow with one pass."""

from __future__ import annotations

from torch import Tensor

from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.methods.step_up import StepUp
from lm_eval_bh.routing.tables.null_model import NullModel


def ranked_scores(
    method: Method, null_model: NullModel | None, layer: int, router: RouterOutput
) -> tuple[Tensor, Tensor]:
    """Return the first argument of ``method.count``, and the experts in that order.

    For tests these are negated p-values, to compare with negated critical values: cheaper than the
    thresholds of many levels, and with the same decisions.

    Parameters
    ----------
    method : Method
        The method, fitted to the layer at any level.
    null_model : NullModel or None
        The source of p-values.
    layer : int
        The layer.
    router : RouterOutput
        The output of its router.

    Returns
    -------
    Tensor, Tensor
        float and int64 ``[tokens, candidates]``, the best first.
    """
    scores = method.score(router)
    experts = router.indices[:, : method.max_k]
    if method.first_only:
        scores = scores.gather(-1, experts)
    if isinstance(method, StepUp) and not method.by_p_value:
        assert null_model is not None
        scores = -null_model.p_values_of(layer, scores)
    ranked, order = method.rank(scores)
    return ranked, experts.gather(-1, order) if method.first_only else order
