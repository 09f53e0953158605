"""What a rule compares sorted scores with: its critical values, taken through the null model.

For one token with scores s (its router logits, say) and null distribution F, the p-value of expert
i is ``1 - F(s_i)``. F does not decrease, so comparing the k-th smallest p-value with the k-th
critical value is comparing the k-th largest *score* with a threshold that depends only on the
layer. The thresholds are computed once, in float64; what remains for a batch is one sort and one
comparison. Only where every expert has a null distribution of its own are p-values computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.rules.registry import Rule


def thresholds_of(
    rules: Sequence[tuple[Rule, float]],
    null_model: NullModel | None,
    layer: int,
    num_experts: int,
) -> list[Tensor | None]:
    """Return what each rule compares ascending negated scores, or p-values, with.

    The thresholds of all rules are found together, which takes little longer than those of one.

    Parameters
    ----------
    rules : sequence of (Rule, float)
        Rules and their levels.
    null_model : NullModel or None
        Where an expert has its own distribution, the critical values themselves are returned.
    layer, num_experts : int
        The layer, and how many experts it has.

    Returns
    -------
    list of (Tensor or None)
        float64 ``[rows, experts]`` on the CPU; None for a rule that neither tests nor weighs.

    Raises
    ------
    ParameterError
        If a test is asked for without a null model, or there is no such layer.
    """
    found = [
        _weight_threshold(alpha, num_experts) if rule.weighs else None for rule, alpha in rules
    ]
    critical = [
        None if rule.critical_values is None else rule.critical_values(alpha, num_experts)
        for rule, alpha in rules
    ]
    tests = [values for values in critical if values is not None]
    if not tests:
        return found
    if null_model is None:
        name = next(rule.name for rule, _ in rules if rule.tests)
        raise ParameterError(
            f"rule={name!r} needs a null model: use null_model= with one, or rule='topk'."
        )
    if null_model.header.null_scope == "expert":
        null_model.cdf(layer)  # raises if there is no such layer
    else:
        ends = np.cumsum([values.size for values in tests])
        levels = np.concatenate([values.ravel() for values in tests])
        flat = -null_model.thresholds(layer, levels)
        tests = [
            own.reshape(values.shape)
            for own, values in zip(np.split(flat, ends[:-1]), tests, strict=True)
        ]
    made = iter(tests)
    return [
        own if values is None else torch.from_numpy(next(made))
        for own, values in zip(found, critical, strict=True)
    ]


def _weight_threshold(alpha: float, num_experts: int) -> Tensor:
    """Return the negated log weight that each of the ascending negated scores is compared with."""
    return torch.full((1, num_experts), -math.log(alpha), dtype=torch.float64)


def round_down(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 thresholds down to what a comparison in ``dtype``, at least float32, needs.

    Every float32 (bfloat16, float16) value v satisfies ``v <= t`` exactly if it satisfies
    ``v <= t rounded down to float32``, so no decision is lost by comparing in float32.
    """
    if dtype == torch.float64:
        return thresholds
    rounded = thresholds.float()
    return torch.where(
        rounded.double() > thresholds,
        torch.nextafter(rounded, torch.tensor(-torch.inf)),
        rounded,
    )
