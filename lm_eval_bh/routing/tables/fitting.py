"""Fits null distributions to the scores of tokens: one per layer, per expert, or for all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import NullModelError, ParameterError
from lm_eval_bh.routing.tables import kde

Array = NDArray[np.float64]
Table = tuple[Array, Array]

EXPERT_POINTS = 512


def points_of(null_scope: str, points: int | None) -> int:
    """Return how many grid points a distribution has.

    Distributions of single experts have 512, whose error of 2e-5 is far below the sampling error of
    one expert's scores.
    """
    if points is not None:
        return points
    return EXPERT_POINTS if null_scope == "expert" else kde.POINTS


def fit_tables(
    scores: Sequence[torch.Tensor],
    null_scope: str,
    trim: int,
    kernel: str,
    bandwidth: str | float,
    points: int,
) -> tuple[list[Table], list[float]]:
    """Fit every layer's distribution.

    Parameters
    ----------
    scores : sequence of Tensor, one per layer
        float ``[tokens, experts]``; -inf for experts left out.
    null_scope, trim, kernel, bandwidth, points
        See :meth:`lm_eval_bh.routing.tables.null_model.NullModel.fit`.

    Returns
    -------
    (tables, bandwidths)
        For every layer x and cdf, float64 ``[points]``, or ``[experts, points]`` with a scope of
        "expert"; and its bandwidth, there the mean over experts.

    Raises
    ------
    NullModelError, ParameterError
        If scores are not finite, too few or all equal, or a parameter is out of range.
    """
    samples = [_untrimmed(layer, values, trim) for layer, values in enumerate(scores)]
    if null_scope == "model":
        everything = np.concatenate([_finite(layer) for layer in samples])
        width, table = _fit(everything, kernel, bandwidth, points, "all layers")
        return [table] * len(samples), [width] * len(samples)
    tables, widths = [], []
    for layer, values in enumerate(samples):
        if null_scope == "expert":
            own = [
                _fit(_finite(column), kernel, bandwidth, points, f"layer {layer}, expert {expert}")
                for expert, column in enumerate(values.T)
            ]
            widths.append(float(np.mean([width for width, _ in own])))
            tables.append((np.stack([x for _, (x, _) in own]), np.stack([F for _, (_, F) in own])))
        else:
            width, table = _fit(_finite(values), kernel, bandwidth, points, f"layer {layer}")
            widths.append(width)
            tables.append(table)
    return tables, widths


def unselected(
    router_logits: torch.Tensor,
    scores: torch.Tensor,
    top_k: int | None,
    ranked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the scores ``[tokens, experts]``, -inf for the ``top_k`` experts that are selected.

    Those experts are the first of ``ranked``, int64 ``[tokens, slots]``, or have the largest logits
    if the router ranked fewer.

    Raises
    ------
    ParameterError
        If no expert or every expert is selected.
    """
    if top_k is None:
        return scores
    experts = scores.shape[-1]
    if not 0 < top_k < experts:
        raise ParameterError(
            f"top_k must be an integer from 1 to {experts - 1} with {experts} experts: "
            f"found {top_k!r}."
        )
    if ranked is None or ranked.shape[-1] < top_k:
        ranked = router_logits.topk(top_k, dim=-1).indices
    return scores.scatter(-1, ranked[:, :top_k], -torch.inf)


def check_trim(trim: int, experts: int) -> None:
    """Raise a :class:`ParameterError` unless ``trim`` scores can be left out at either end."""
    if isinstance(trim, bool) or not isinstance(trim, int) or not 0 <= 2 * trim < experts:
        raise ParameterError(
            f"trim must be an integer from 0 to {(experts - 1) // 2} with {experts} experts: "
            f"found {trim!r}."
        )


def _fit(
    samples: Array, kernel: str, bandwidth: str | float, points: int, where: str
) -> tuple[float, Table]:
    try:
        width = kde.bandwidth_of(samples, bandwidth)
        return width, kde.fit_cdf(samples, kernel, width, points)
    except NullModelError as error:
        raise NullModelError(f"The router logits of {where} cannot be fitted: {error}") from error


def _finite(values: Array) -> Array:
    """Return the values that are not left out, flattened."""
    left_out = np.isnan(values)
    return values[~left_out] if left_out.any() else values.ravel()


def _untrimmed(layer: int, scores: torch.Tensor, trim: int) -> Array:
    """Return a layer's float64 scores, NaN for each token's ``trim`` largest and smallest.

    Scores of -inf, already left out, become NaN too; ``trim`` counts the others.
    """
    values = scores.detach().cpu().double().numpy()
    if values.ndim != 2:
        raise ParameterError(
            f"The logits of layer {layer} have shape {values.shape}; give [tokens, experts]."
        )
    experts = values.shape[1]
    check_trim(trim, experts)
    left_out = np.isneginf(values)
    if not (np.isfinite(values) | left_out).all():  # NaN remains an error
        bad = int((~np.isfinite(values) & ~left_out).sum())
        raise NullModelError(
            f"The router logits of layer {layer} cannot be fitted: "
            f"{bad} of {values.size} samples are NaN or infinite; "
            "look for the fault in the model."
        )
    values = np.where(left_out, np.nan, values)
    if trim:
        order = np.argsort(values, axis=1)  # NaN last
        present = (~left_out).sum(axis=1, keepdims=True)
        rank = np.argsort(order, axis=1)
        values[(rank < trim) | (rank >= present - trim)] = np.nan
    return values
