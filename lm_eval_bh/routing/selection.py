"""Which experts serve a token: router logits in, :class:`Selection` out. No per-token Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from lm_eval_bh.errors import ParameterError, RoutingError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.rules.registry import RULES, Evidence, Ordered
from lm_eval_bh.routing.selector import Selector

if TYPE_CHECKING:
    from lm_eval_bh.routing.nulls.null_model import NullModel


class Selection(NamedTuple):
    """The experts of a batch of tokens.

    Attributes
    ----------
    indices : Tensor
        int64 ``[tokens, max_k]``, experts by descending logit (contribution; by ascending p-value
        where each expert has its own null distribution); unused slots hold ``num_experts``.
    weights : Tensor
        float ``[tokens, max_k]``; unused slots hold 0.
    counts : Tensor
        int64 ``[tokens]``, how many slots are used.
    """

    indices: Tensor
    weights: Tensor
    counts: Tensor


def reject(p_values: Tensor, alpha: float, rule: str = "bh") -> Tensor:
    """Decide every hypothesis from its p-value: the direct form of the procedure.

    Parameters
    ----------
    p_values : Tensor
        float ``[tokens, N]`` in any order; compared in float64.
    alpha : float
        Level, in (0, 1).
    rule : str
        A multiple-testing rule of :data:`~lm_eval_bh.routing.rules.registry.RULES`.

    Returns
    -------
    Tensor
        bool ``[tokens, N]``, True where the null hypothesis is rejected.

    Raises
    ------
    ParameterError
        If the rule is not a test or alpha is not a level.
    """
    test = RULES[RoutingConfig(alpha=alpha, rule=rule).rule]
    if test.count is None or test.critical_values is None:
        raise ParameterError(
            f"rule={rule!r} tests nothing: choose a multiple-testing rule such as 'bh'."
        )
    critical = torch.from_numpy(test.critical_values(alpha, p_values.shape[-1]))
    ordered, order = p_values.double().sort(dim=-1)
    count = test.count(Evidence(alpha, Ordered(ordered), critical.to(p_values.device)))
    rank = torch.arange(p_values.shape[-1], device=p_values.device)
    decisions = rank < count.unsqueeze(-1)
    return torch.zeros_like(decisions).scatter(-1, order, decisions)


def keep(indices: Tensor, weights: Tensor, counts: Tensor, num_experts: int) -> Selection:
    """Empty the slots beyond each token's count of a selection ``[tokens, slots]``."""
    used = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    return Selection(
        torch.where(used, indices, num_experts), torch.where(used, weights, 0.0), counts
    )


def softmax_top(router_logits: Tensor, max_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the ``max_k`` largest experts and their softmax weights over all experts, in float32.

    The experts are taken by the very call that OLMoE's router makes, so that ties fall the same
    way.
    """
    probabilities = torch.softmax(
        router_logits, dim=-1, dtype=_at_least_float32(router_logits.dtype)
    )
    weights, indices = torch.topk(probabilities, max_k, dim=-1)
    if temperature != 1.0:
        weights = softmax_of(router_logits, indices, temperature)
    return indices, weights


def softmax_of(router_logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return the softmax weights, over all experts and in float32, of the experts ``indices``."""
    logits = router_logits.to(_at_least_float32(router_logits.dtype))
    return torch.softmax(logits / temperature, dim=-1).gather(-1, indices)


def select_experts(
    router_logits: Tensor,
    null: NullModel | None,
    layer: int = 0,
    alpha: float = 0.4,
    rule: str = "bh",
    min_k: int = 1,
    max_k: int = 8,
    temperature: float = 1.0,
    renormalize: bool | Literal["auto"] = False,
    seed: int = 0,
) -> Selection:
    """Select the experts of every token by a rule that looks at its router logits.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, experts]``.
    null : NullModel or None
        Null distribution of the layer's logits; the rules that test nothing do without. What the
        statistic is, and whether each expert has a distribution of its own, is the null model's.
    layer : int
        The layer of ``null`` that the logits come from.
    alpha : float
        The rule's parameter, in (0, 1); for a test its level. That bounds the expected share of
        false rejections if the logits of the null hypotheses follow F and are independent or
        positively dependent, which nobody has shown for the logits of one token.
    rule, min_k, max_k, temperature, seed
        See :class:`~lm_eval_bh.routing.config.RoutingConfig`.
    renormalize : bool or "auto"
        Whether the selected weights are rescaled to sum to one; "auto" is False here, as OLMoE's
        ``norm_topk_prob`` is.

    Returns
    -------
    Selection
        Indices, weights (softmax over *all* experts, float32 or better, differentiable), counts.

    Raises
    ------
    ParameterError
        If a parameter is out of range, or the null model is of other routers.
    RoutingError
        If a logit is NaN or infinite.

    References
    ----------
    Benjamini and Hochberg (1995), "Controlling the false discovery rate", J. R. Stat. Soc. B
    57:289.
    """
    tests = rule in RULES and RULES[rule].tests
    config = RoutingConfig(
        alpha=alpha,
        rule=rule,
        min_k=min_k,
        max_k=max_k,
        temperature=temperature,
        renormalize=renormalize,
        seed=seed,
        statistic="logit" if null is None else null.header.statistic,
        null="pooled" if null is None or not tests else null.header.null,
    )
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ParameterError(
            f"router_logits has shape {tuple(router_logits.shape)} and dtype "
            f"{router_logits.dtype}: give floating-point logits [tokens, experts]."
        )
    if not torch.isfinite(router_logits).all():
        raise RoutingError(
            f"The router logits of layer {layer} hold NaN or infinite values: "
            "check the model's weights."
        )
    num_experts = router_logits.shape[-1]
    config.check_experts(num_experts)
    if null is not None:
        null.cdf(layer)  # says so if there is no such layer
        if null.header.num_experts not in (None, num_experts):
            raise ParameterError(
                f"The null model is of {null.header.num_experts} experts a layer, and the router "
                f"logits are of {num_experts}: give the null model of this router."
            )
    counts, order = Selector(config, null, layer, num_experts)(router_logits)
    if order is None:
        indices, weights = softmax_top(router_logits, max_k, temperature)
    else:
        indices, weights = order, softmax_of(router_logits, order, temperature)
    selection = keep(indices, weights, counts, num_experts)
    if renormalize is True:
        return selection._replace(
            weights=selection.weights / selection.weights.sum(-1, keepdim=True)
        )
    return selection


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
