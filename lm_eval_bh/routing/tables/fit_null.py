"""Fits null distributions to router logits or scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import NullModelError, ParameterError
from lm_eval_bh.routing.methods.scores import STATISTICS, log_predicted_norms
from lm_eval_bh.routing.tables.fitting import Table, fit_tables, points_of, unselected
from lm_eval_bh.routing.tables.null_header import (
    NullHeader,
    check_fields,
    library_versions,
)
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.routing.tensors import numbers_of


def softmax_scores(
    router_logits: torch.Tensor, statistic: str, log_factors: torch.Tensor | None
) -> torch.Tensor:
    """Return a statistic of softmax routers' logits, same shape and device.

    The logits themselves; or the log of weight times factor, float32, or float64 where these are.
    """
    if not STATISTICS[statistic].weighs:
        return router_logits
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    scores = torch.log_softmax(router_logits, dim=-1, dtype=dtype)
    return scores if log_factors is None else scores + log_factors.to(scores)


def statistic_of(
    router_logits: torch.Tensor,
    statistic: str,
    factors: NDArray[Any] | None,
    hidden_states: torch.Tensor | None,
) -> torch.Tensor:
    """Return a statistic of softmax routers' logits and a layer's measured factors.

    Raises
    ------
    ParameterError
        If required hidden states are missing.
    """
    row = STATISTICS[statistic]
    if factors is None:
        return softmax_scores(router_logits, statistic, None)
    found = torch.from_numpy(factors).to(router_logits.device)
    if not row.predicts:
        return softmax_scores(router_logits, statistic, found.log())
    if hidden_states is None:
        raise ParameterError(
            "statistic=predicted needs the router's hidden states: give hidden_states."
        )
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    norms = log_predicted_norms(found.to(dtype), hidden_states)
    return softmax_scores(router_logits, statistic, norms)


def scores_of(
    logits: Mapping[int, torch.Tensor | NDArray[Any]],
    null_scope: str,
    trim: int,
    statistic: str | None,
    factors: NDArray[Any] | None,
    norms: NDArray[Any] | None,
    top_k: int | None,
) -> tuple[NullKind, list[torch.Tensor], NDArray[Any] | None]:
    """Return kind, scores per layer, and factors for the arguments of ``NullModel.fit``.

    Raises
    ------
    ParameterError
        If a parameter is out of range.
    NullModelError
        If a layer's logits are not finite.
    """
    if not isinstance(logits, Mapping):
        raise ParameterError(
            "A null model needs the logits of layers by their numbers, as in {0: logits}: "
            f"found a {type(logits).__name__}."
        )
    if not logits or sorted(logits) != list(range(len(logits))):
        raise ParameterError(
            f"A null model needs the logits of layers 0, 1, ...; found {sorted(logits)}."
        )
    if norms is not None:
        statistic, factors = statistic or "contribution", norms
    origin = "all" if top_k is None else "unselected"
    kind = NullKind(statistic or "logit", null_scope, trim, origin).made()
    found = []
    for layer in range(len(logits)):
        values = numbers_of(logits[layer], f"The logits of layer {layer}")
        if values.ndim != 2:
            raise ParameterError(
                f"The logits of layer {layer} have shape {tuple(values.shape)}: "
                "use [tokens, experts]."
            )
        if bad := int((~values.isfinite()).sum()):
            raise NullModelError(
                f"The router logits of layer {layer} cannot be fitted: {bad} of "
                f"{values.numel()} samples are NaN or infinite; "
                "look for the fault in the model."
            )
        logs = None if factors is None else torch.from_numpy(np.log(factors[layer]))
        found.append(unselected(values, softmax_scores(values, kind.statistic, logs), top_k))
    return kind, found, factors


def fitted(
    found: Sequence[torch.Tensor],
    kind: NullKind,
    factors: NDArray[Any] | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: str | float = "scott",
    points: int | None = None,
    header: Mapping[str, Any] | None = None,
) -> tuple[tuple[Table, ...], NullHeader, NDArray[Any] | None]:
    """Return tables, header and factors of a null model fitted to scores.

    Parameters
    ----------
    found : sequence of Tensor, one per layer
        Scores ``[tokens, experts]``; -inf for experts that are left out.
    kind : NullKind
        The kind of the scores.
    factors, kernel, bandwidth, points, header
        As in ``NullModel.fit``.

    Raises
    ------
    ParameterError, NullModelError
        If a parameter is out of range, or scores cannot be fitted.
    """
    known = dict(header or {})
    check_fields(known, settable=("model", "revision", "fingerprint", "text", "versions"))
    kind = kind.made()
    scope, trim = str(kind.null_scope), kind.trim or 0
    points = points_of(scope, points)
    tables, widths = fit_tables(found, scope, trim, kernel, bandwidth, points)
    experts, tokens = {s.shape[1] for s in found}, {s.shape[0] for s in found}
    if len(experts) > 1:
        raise ParameterError(
            "A null model needs the same number of experts in every layer; found "
            f"{sorted(experts)}."
        )
    known["versions"] = library_versions() | known.get("versions", {})
    known |= {"num_layers": len(tables), "num_experts": experts.pop()}
    known["tokens"] = tokens.pop() if len(tokens) == 1 else None
    known |= {"kernel": kernel, "bandwidth": widths, "trim": trim, "points": points}
    known |= {"statistic": kind.statistic, "null_scope": scope, "null_from": kind.null_from}
    known |= {"of": kind.of, "tables": list(kind.tables)}
    return tuple(tables), NullHeader(**known), factors
