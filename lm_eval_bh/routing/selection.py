"""Which experts serve a token: router logits in, :class:`Selection` out. No per-token Python.

The router hooks and :func:`select_experts` both call :func:`select`; there is no other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_bh.errors import ParameterError, RoutingError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.host import bits_of, on_host, tensor_of
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.parameters import accepts
from lm_eval_bh.routing.rich_display import selection_html
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.rules.sorted_scores import Array, SortedScores
from lm_eval_bh.routing.selector import Selector
from lm_eval_bh.routing.tensors import numbers_of


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

    def _repr_html_(self) -> str:
        return selection_html(*self)


def select(
    router_logits: Tensor,
    selector: Selector,
    own: tuple[Tensor, Tensor] | None = None,
    *,
    softmax: bool = True,
    normalizes: bool = False,
    rank: Callable[[Tensor], Tensor] | None = None,
    hidden_states: Tensor | None = None,
    native_k: int | None = None,
) -> Selection:
    """Select the experts of every token.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, experts]``, finite.
    selector : Selector
        The layer's rule.
    own : (weights, indices) or None
        What the router selected itself, both ``[tokens, slots]``. Its weights are kept wherever it
        has given any, bit for bit, and its dtype; without, weights are float32 or better.
    softmax : bool
        Whether weights are a softmax over all experts of the logits. Where they are not, only
        experts that the router selected itself can be kept.
    normalizes : bool
        Whether the router rescales the weights of the experts it selects to a fixed sum.
    rank : callable or None
        From router logits to what the router ranks its experts by, ``[tokens, experts]``; None
        where its slots are in that order.
    hidden_states : Tensor, optional
        float ``[tokens, hidden]``, what the router was given; for the statistic "predicted".
    native_k : int, optional
        How many experts the model itself takes, of those that the router has given now.
    """
    config = selector.config
    counts = ranked = None
    fused = selector.fused
    if fused is not None and not fused.serves(router_logits):
        fused = None
    if fused is None and not selector.alone:
        counts, ranked = selector(router_logits, hidden_states)
    rescales = config.mass is None and (
        config.renormalize is True or (config.renormalize == "auto" and normalizes)
    )
    if own is None or (softmax and not _serves(own[1], ranked, config)):
        weights, indices = _softmax_top(router_logits, ranked, config.max_k, config.temperature)
        if normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        if own is not None:
            weights = weights.to(own[0].dtype)
    else:
        weights, indices = own
        all_serve = config.fixed_count and indices.shape[-1] == config.max_k
        if (
            counts is not None
            and all_serve
            and config.mass is None
            and (normalizes or not rescales)
        ):
            return Selection(indices, weights, _counts(counts))
        if rank is not None and not all_serve:
            order = rank(router_logits).gather(-1, indices)
            order = order.argsort(dim=-1, descending=True, stable=True)
            weights, indices = weights.gather(-1, order), indices.gather(-1, order)
    native = weights
    if indices.shape[-1] > config.max_k:
        first = slice(config.max_k)
        weights, indices = weights[:, first], indices[:, first]
    if fused is not None:
        selection = Selection(*fused(router_logits, indices, weights))
    else:
        if counts is None:
            counts, slots = selector.among(router_logits, indices, hidden_states)
            if slots is not None:
                weights, indices = weights.gather(-1, slots), indices.gather(-1, slots)
        selection = keep(indices, weights, counts, selector.num_experts)
    if config.mass is not None:
        top = slice(native_k)
        if not softmax or own is None:
            weights, whole = selection.weights, native[:, top]
        elif config.temperature == 1.0 and not normalizes:
            weights, whole = selection.weights, own[0][:, top]
        else:
            weights, whole = _plain_weights(
                router_logits, selection, own[1][:, top], config.temperature
            )
            if normalizes:
                weights = weights / whole.sum(-1, keepdim=True)
                whole = whole / whole.sum(-1, keepdim=True)
        return selection._replace(weights=_compensated(weights, whole, config.mass))
    if not rescales:
        return selection
    return selection._replace(weights=_rescaled(selection.weights, native if normalizes else None))


def _serves(indices: Tensor, ranked: Tensor | None, config: RoutingConfig) -> bool:
    """Whether what the router selected itself is what the rule has to choose from."""
    return ranked is None and indices.shape[-1] == config.max_k and config.temperature == 1.0


def keep(indices: Tensor, weights: Tensor, counts: Array, num_experts: int) -> Selection:
    """Empty the slots beyond each token's count of a selection ``[tokens, slots]``."""
    slots = indices.shape[-1]
    if on_host(weights):
        found = counts.numpy() if isinstance(counts, Tensor) else counts
        if len(found) == 1:
            factor, filling = _of_one(slots, num_experts, weights.dtype)[found.item()]
            return Selection(torch.maximum(indices, filling), weights * factor, _counts(counts))
        bits = bits_of(weights)
        factors, fillings = _of_counts(slots, num_experts, bits.dtype)
        return Selection(
            torch.from_numpy(np.maximum(indices.numpy(), fillings.take(found, axis=0))),
            tensor_of(bits * factors.take(found, axis=0), weights.dtype),
            _counts(counts),
        )
    counts = _counts(counts)
    used = torch.arange(slots, device=indices.device) < counts.unsqueeze(-1)
    return Selection(
        torch.where(used, indices, num_experts), torch.where(used, weights, 0.0), counts
    )


def _counts(counts: Array) -> Tensor:
    return counts if isinstance(counts, Tensor) else torch.from_numpy(counts)


@cache
def _of_counts(
    slots: int, num_experts: int, kind: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return, for counts 0, 1, ..., what empties the other slots: ``[slots + 1, slots]`` each.

    Weights are multiplied by the first, of their dtype; indices are at least the second. That takes
    half the time of choosing by a mask.
    """
    used = np.arange(slots) < np.arange(slots + 1)[:, None]
    return used.astype(kind), np.where(used, 0, num_experts)


@cache
def _of_one(slots: int, num_experts: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of :func:`_of_counts` as tensors: one row takes torch less than NumPy."""
    factors, fillings = _of_counts(slots, num_experts, np.dtype(np.float64))
    with torch.inference_mode(False):  # they outlive the pass
        return list(
            zip(
                torch.tensor(factors, dtype=dtype).split(1),
                torch.tensor(fillings).split(1),
                strict=True,
            )
        )


def _softmax_top(
    router_logits: Tensor, ranked: Tensor | None, max_k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return softmax weights over all experts, float32 or better, of the ``max_k`` first experts.

    These are ``ranked``, or else those with the largest logits, taken by the very call that OLMoE's
    router makes, so that ties fall the same way.
    """
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    if ranked is None:
        plain = torch.softmax(router_logits, dim=-1, dtype=dtype)
        weights, ranked = torch.topk(plain, max_k, dim=-1)
        if temperature == 1.0:
            return weights, ranked
    logits = router_logits.to(dtype)
    return torch.softmax(logits / temperature, dim=-1).gather(-1, ranked), ranked


def _plain_weights(
    router_logits: Tensor, selection: Selection, native: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the softmax weights, never rescaled, of a selection and of the native top-k."""
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    plain = torch.softmax(router_logits.to(dtype) / temperature, dim=-1)
    unused = selection.indices == plain.shape[-1]
    kept = plain.gather(-1, selection.indices.masked_fill(unused, 0)).masked_fill(unused, 0.0)
    return kept.to(selection.weights.dtype), plain.gather(-1, native).to(selection.weights.dtype)


def _compensated(kept: Tensor, native: Tensor, mass: float) -> Tensor:
    """Multiply the weights kept by (native sum / kept sum) to the power ``mass``."""
    exact = kept.to(torch.promote_types(kept.dtype, torch.float32))
    share = native.to(exact.dtype).sum(-1, keepdim=True) / exact.sum(-1, keepdim=True)
    return (exact * share**mass).to(kept.dtype)


def _rescaled(kept: Tensor, before: Tensor | None) -> Tensor:
    """Rescale the weights kept to the sum that the router gave them, or to one."""
    exact = kept.to(torch.promote_types(kept.dtype, torch.float32))
    wanted: Tensor | float = 1.0
    if before is not None:
        wanted = before.to(exact.dtype).sum(-1, keepdim=True)
    return (exact * (wanted / exact.sum(-1, keepdim=True))).to(kept.dtype)


@accepts({"null": "null_model"})
def select_experts(
    router_logits: Tensor | NDArray[Any] | Sequence[Sequence[float]],
    null_model: NullModel | str | Path | None = None,
    layer: int = 0,
    alpha: float = 0.4,
    rule: str = "bh",
    min_k: int = 1,
    max_k: int = 8,
    temperature: float = 1.0,
    renormalize: bool | Literal["auto"] = False,
    seed: int = 0,
    mass: float | None = None,
    hidden_states: Tensor | None = None,
) -> Selection:
    """Select the experts of every token by a rule that looks at its router logits.

    Parameters
    ----------
    router_logits : Tensor or array
        float ``[tokens, experts]``.
    null_model : NullModel, path or None
        Null distribution of the layer's logits; rules that test nothing do without. What the
        score is, and whether each expert has a distribution of its own, is the null model's.
        ``null=`` is its earlier name.
    layer : int
        The layer of ``null_model`` that the logits come from.
    alpha : float
        The rule's parameter, in (0, 1); for a test its level. That bounds the expected share of
        false rejections if the logits of the null hypotheses follow F and are independent or
        positively dependent, which nobody has shown for the logits of one token.
    rule, min_k, max_k, temperature, seed, mass
        See :class:`~lm_eval_bh.routing.config.RoutingConfig`.
    renormalize : bool or "auto"
        Whether the selected weights are rescaled to sum to one; "auto" is False here, as OLMoE's
        ``norm_topk_prob`` is.
    hidden_states : Tensor, optional
        float ``[tokens, hidden]``, what the router was given; for a null model of the statistic
        "predicted".

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
    if not isinstance(null_model, (NullModel, type(None))):
        null_model = NullModel.load(null_model)
    router_logits = numbers_of(router_logits, "router_logits")
    tests = rule in RULES and RULES[rule].tests
    config = RoutingConfig(
        alpha=alpha,
        rule=rule,
        min_k=min_k,
        max_k=max_k,
        temperature=temperature,
        renormalize=renormalize,
        seed=seed,
        statistic="logit" if null_model is None else null_model.header.statistic,
        null_scope="layer" if null_model is None or not tests else null_model.header.null_scope,
        mass=mass,
    )
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ParameterError(
            "router_logits must be floating-point [tokens, experts]: found shape "
            f"{tuple(router_logits.shape)} and dtype {router_logits.dtype}; give a layer's logits."
        )
    if not torch.isfinite(router_logits).all():
        raise RoutingError(
            f"The router logits of layer {layer} hold NaN or infinite values: "
            "check the model's weights."
        )
    num_experts = router_logits.shape[-1]
    config.check_experts(num_experts)
    if null_model is not None:
        null_model.cdf(layer)  # raises if there is no such layer
        if null_model.header.num_experts not in (None, num_experts):
            raise ParameterError(
                f"The null model is of {null_model.header.num_experts} experts a layer, and the "
                f"router logits are of {num_experts}: give the null model of this router."
            )
    selector = Selector(config, null_model, layer, num_experts)
    return select(router_logits, selector, hidden_states=hidden_states)


def reject(
    p_values: Tensor | NDArray[Any] | Sequence[Sequence[float]], alpha: float, rule: str = "bh"
) -> Tensor:
    """Decide every hypothesis from its p-value: the direct form of the procedure.

    Parameters
    ----------
    p_values : Tensor
        float ``[tokens, N]``, a tensor, array or lists, in any order; compared in float64.
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
        If the rule is not a test, alpha is not a level, or a p-value is none.
    """
    test = RULES[RoutingConfig(alpha=alpha, rule=rule).rule]
    p_values = numbers_of(p_values, "p_values")
    if p_values.ndim < 1 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise ParameterError("p_values must be numbers from 0 to 1: some are not.")
    if test.count is None or test.critical_values is None:
        raise ParameterError(
            f"rule={rule!r} is not a test: use a multiple-testing rule such as 'bh'."
        )
    critical = torch.from_numpy(test.critical_values(alpha, p_values.shape[-1]))
    ascending, order = p_values.double().sort(dim=-1)
    count = test.counts(SortedScores(ascending), alpha, critical)
    rank = torch.arange(p_values.shape[-1], device=p_values.device)
    decisions = rank < count.unsqueeze(-1)
    return torch.zeros_like(decisions).scatter(-1, order, decisions)
