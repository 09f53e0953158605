"""Stepwise multiple-testing procedures: a token's experts are its hypotheses.

For scores s and a null distribution F, the p-value of expert i is ``1 - F(s_i)``. F does not
decrease, so comparing the k-th smallest p-value with the k-th critical value is the same as
comparing the k-th largest *score* with a threshold that depends only on the layer. Thresholds are
computed once; what remains is one sort and one comparison. P-values are computed only if every
expert has its own null distribution.

The arithmetic of critical values follows statsmodels bit for bit where it has the procedure,
so that no decision can differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import SCORED, Method, Shown
from .declare import Parameter, choice, integer, level, or_none
from .survival import survival

FDR, FWER = "level of the false discovery rate", "level of the family-wise error rate"
SCOPES, ORIGINS = ("layer", "expert", "model"), ("all", "unselected")

TESTED: dict[str, Parameter] = SCORED | {
    "null_scope": Parameter(
        "layer",
        "the scope of a null distribution: each `layer`, each `expert` (then the smallest "
        "p-values serve), or the whole `model`",
        *choice(SCOPES, {"pooled": "layer"}),
    ),
    "null_from": Parameter(
        "all",
        "experts from which the null distribution is made: `all`, or those below the native top-k "
        "of each token (`unselected`)",
        *choice(ORIGINS),
    ),
    "trim": Parameter(
        None,
        "how many of each token's largest, and as many of its smallest, scores the null "
        "distribution leaves out; default: any of a given file, else 0",
        *or_none(integer(f"an integer from 0 to {2**32 - 1}", 0, 2**32 - 1)),
    ),
}


class StepUp(Method):
    """Reject up to the last p-value that does not exceed its critical value."""

    declared: ClassVar[dict[str, Parameter]] = {"alpha": level(FDR)} | TESTED
    tests = True

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return the critical values of ascending p-values, float64 ``[rows, n]``.

        Procedures with one stage have one row.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define critical_values.")

    def level(self, alpha: float) -> Tensor:
        """Return the negated critical values, since negated p-values are ranked."""
        return -self.critical_values(alpha, self.num_experts)

    def fit(self, tables: Any, alpha: float) -> None:
        """Take a layer's tables; see :meth:`Method.fit`."""
        super().fit(tables, alpha)
        if self.by_p_value:
            self.keep("null_x", torch.tensor(tables.x))
            self.keep("null_cdf", torch.tensor(tables.cdf))
        elif not self.fixed:  # on the scores themselves, equivalent to the critical values
            self.keep("thresholds", tables.thresholds(-self.table("thresholds")))

    @property
    def by_p_value(self) -> bool:
        """Whether every expert has its own null distribution, so that p-values rank them."""
        return bool(self.settings["null_scope"] == "expert")

    @property
    def follows_router(self) -> bool:
        """Whether the kept experts are those that the router ranks first."""
        return not self.by_p_value and super().follows_router

    def rank(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return sorted scores, or negated p-values with ties ordered by score."""
        if not self.by_p_value:
            return super().rank(scores)
        by_score = scores.argsort(dim=-1, descending=True, stable=True)
        z = scores.double().T.contiguous()
        p = survival(self.table("null_x"), self.table("null_cdf"), z).T
        p = p.masked_fill(scores == -torch.inf, torch.inf)  # not a candidate
        ranked, by_p = (-p).gather(-1, by_score).sort(dim=-1, descending=True, stable=True)
        return ranked, by_score.gather(-1, by_p)

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return the last rank that reaches its threshold, int64 ``[tokens]``."""
        assert level is not None
        return last_rank(ranked >= level[0])

    def shown(self, ranked: Tensor, alpha: float) -> Shown:
        """Return p-values and critical values; None for several rows, which differ by token."""
        critical = self.critical_values(alpha, ranked.shape[-1]).to(ranked.device)
        return "p-value", -ranked, "critical value", critical if len(critical) == 1 else None


class StepDown(StepUp):
    """Reject up to the first p-value that exceeds its critical value."""

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many ranks reach their thresholds without a gap, int64 ``[tokens]``."""
        assert level is not None
        return (ranked >= level[0]).long().cumprod(-1).sum(-1)


def last_rank(passes: Tensor) -> Tensor:
    """Return the last True rank of bool ``[tokens, n]``, 0 if none: int64 ``[tokens]``."""
    # int16 is the fastest to reduce
    rank = torch.arange(1, passes.shape[-1] + 1, dtype=torch.int16, device=passes.device)
    return (passes * rank).amax(-1).long()
