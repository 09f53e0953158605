"""Which experts serve a token: router logits in, :class:`Selection` out. No per-token Python.

For one layer and one token with router logits z and null distribution F, the p-value of expert i is
``1 - F(z_i)``. F does not decrease, so comparing the k-th smallest p-value with the k-th critical
value is comparing the k-th largest *logit* with a threshold that depends only on the layer. The
thresholds are computed once, in float64; what remains for a batch is one sort and one comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lm_eval_bh.errors import ParameterError, RoutingError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.rules import RULES, Rule

if TYPE_CHECKING:
    from lm_eval_bh.routing.null import NullModel


class Selection(NamedTuple):
    """The experts of a batch of tokens.

    Attributes
    ----------
    indices : Tensor
        int64 ``[tokens, max_k]``, experts by descending logit; unused slots hold ``num_experts``.
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
        A multiple-testing rule of :data:`~lm_eval_bh.routing.rules.RULES`.

    Returns
    -------
    Tensor
        bool ``[tokens, N]``, True where the null hypothesis is rejected.

    Raises
    ------
    ParameterError
        If the rule is not a test or alpha is not a level.
    """
    critical = _testing_rule(RoutingConfig(alpha=alpha, rule=rule).rule)
    values = critical.critical_values(alpha, p_values.shape[-1])  # type: ignore[misc]
    ordered, order = p_values.double().sort(dim=-1)
    met = ordered <= torch.as_tensor(values, device=p_values.device)
    rank = torch.arange(p_values.shape[-1], device=p_values.device)
    decisions = rank < critical.count(met).unsqueeze(-1)
    return torch.zeros_like(met).scatter(-1, order, decisions)


def rejection_thresholds(
    null: NullModel | None, layer: int, config: RoutingConfig, num_experts: int
) -> Tensor | None:
    """Return the thresholds that sorted logits are compared with, or None for a rule without test.

    Returns
    -------
    Tensor or None
        float64 ``[num_experts]`` on the CPU; entry k - 1 is the smallest z with
        ``1 - F(z) <= critical value k``.

    Raises
    ------
    ParameterError
        If a test is asked for without a null model.
    """
    rule = RULES[config.rule]
    if rule.critical_values is None:
        return None
    if null is None:
        raise ParameterError(
            f"rule={config.rule!r} needs a null model: give one as kde=, or use rule='topk'."
        )
    return torch.from_numpy(null.thresholds(layer, rule.critical_values(config.alpha, num_experts)))


def thresholds_for(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 thresholds up to what a comparison in ``dtype`` needs; float32 at the least.

    Every float32 (bfloat16, float16) logit z satisfies ``z >= t`` exactly if it satisfies
    ``z >= t rounded up to float32``, so no decision is lost by comparing in float32.
    """
    if dtype == torch.float64:
        return thresholds
    rounded = thresholds.float()
    return torch.where(
        rounded.double() < thresholds, torch.nextafter(rounded, torch.tensor(torch.inf)), rounded
    )


def count_experts(
    router_logits: Tensor, thresholds: Tensor | None, rule: Rule, min_k: int, max_k: int
) -> Tensor:
    """Return how many experts each token needs, int64 ``[tokens]``, from ``min_k`` to ``max_k``.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, experts]``, finite.
    thresholds : Tensor or None
        From :func:`thresholds_for`, on the logits' device; None for a rule without test.
    """
    if thresholds is None or min_k == max_k:
        return torch.full(
            router_logits.shape[:-1], max_k, dtype=torch.int64, device=router_logits.device
        )
    logits = router_logits.detach().to(thresholds.dtype)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        # Rows of 64 in a 50th of the time that torch.sort takes. It knows ascending order only.
        met = torch.from_numpy(np.sort(-logits.numpy(), axis=-1) <= -thresholds.numpy())
    else:
        met = logits.sort(dim=-1, descending=True).values >= thresholds
    return rule.count(met).clamp_(min_k, max_k)


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
        tempered = torch.softmax(router_logits.to(probabilities.dtype) / temperature, dim=-1)
        weights = tempered.gather(-1, indices)
    return indices, weights


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
) -> Selection:
    """Select the experts of every token by a multiple-testing procedure on its router logits.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, experts]``.
    null : NullModel or None
        Null distribution of the layer's logits; only ``rule="topk"`` does without.
    layer : int
        The layer of ``null`` that the logits come from.
    alpha : float
        Level of the procedure, in (0, 1). It bounds the expected share of false rejections if the
        logits of the null hypotheses follow F and are independent or positively dependent, which
        nobody has shown for the logits of one token.
    rule, min_k, max_k, temperature
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
        If a parameter is out of range.
    RoutingError
        If a logit is NaN or infinite.

    References
    ----------
    Benjamini and Hochberg (1995), "Controlling the false discovery rate", J. R. Stat. Soc. B
    57:289.
    """
    config = RoutingConfig(
        alpha=alpha,
        rule=rule,
        min_k=min_k,
        max_k=max_k,
        temperature=temperature,
        renormalize=renormalize,
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
    thresholds = rejection_thresholds(null, layer, config, num_experts)
    if thresholds is not None:
        thresholds = thresholds_for(thresholds, router_logits.dtype).to(router_logits.device)
    counts = count_experts(router_logits, thresholds, RULES[rule], min_k, max_k)
    indices, weights = softmax_top(router_logits, max_k, temperature)
    selection = keep(indices, weights, counts, num_experts)
    if renormalize is True:
        return selection._replace(
            weights=selection.weights / selection.weights.sum(-1, keepdim=True)
        )
    return selection


def _testing_rule(name: str) -> Rule:
    if RULES[name].critical_values is None:
        raise ParameterError(
            f"rule={name!r} tests nothing: choose a multiple-testing rule such as 'bh'."
        )
    return RULES[name]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
