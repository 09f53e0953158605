"""Stepwise multiple-testing procedures: a token's experts are its hypotheses.

For scores s and a null distribution F the p-value of expert i is ``1 - F(s_i)``. F does not
decrease, so comparing the k-th smallest p-value with the k-th critical value is comparing the k-th
largest *score* with a threshold that depends only on the layer. The thresholds are computed once;
what remains is one sort and one comparison. Only where every expert has a null distribution of its
own are p-values computed.

The arithmetic of critical values is statsmodels' own where it has the procedure, to the last bit,
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
        "what one null distribution is fitted to: each `layer`, each `expert` (then the smallest "
        "p-values serve), or the whole `model`",
        *choice(SCOPES, {"pooled": "layer"}),
    ),
    "null_from": Parameter(
        "all",
        "which experts the null distribution is made of: `all`, or those below the native top-k of "
        "each token (`unselected`)",
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
    """Reject everything up to the last p-value that is at most its critical value."""

    declared: ClassVar[dict[str, Parameter]] = {"alpha": level(FDR)} | TESTED
    tests = True

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return what the ascending p-values are compared with, float64 ``[rows, n]``.

        Procedures that look once have one row.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define critical_values.")

    def level(self, alpha: float) -> Tensor:
        """Return the negated critical values: ranked are negated p-values."""
        return -self.critical_values(alpha, self.num_experts)

    def fit(self, tables: Any, alpha: float) -> None:
        """Take a layer's tables; see :meth:`Method.fit`."""
        super().fit(tables, alpha)
        if self.fixed and not self.by_p_value:
            return
        if self.by_p_value:
            self.keep("null_x", torch.tensor(tables.x))
            self.keep("null_cdf", torch.tensor(tables.cdf))
        else:  # the thresholds that stand for the critical values, on the scores themselves
            self.keep("thresholds", tables.thresholds(-self.table("thresholds")))

    @property
    def by_p_value(self) -> bool:
        """Whether every expert has a null distribution of its own, so that p-values rank them."""
        return bool(self.settings["null_scope"] == "expert")

    @property
    def follows_router(self) -> bool:
        """Whether the experts that serve are those that the router ranks first."""
        return not self.by_p_value and super().follows_router

    def rank(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores by size, or negated p-values, of equal ones the larger score first."""
        if not self.by_p_value:
            return super().rank(scores)
        by_score = scores.argsort(dim=-1, descending=True, stable=True)
        z = scores.double().T.contiguous()
        p = survival(self.table("null_x"), self.table("null_cdf"), z).T
        p = p.masked_fill(scores == -torch.inf, torch.inf)  # no candidate
        ranked, by_p = (-p).gather(-1, by_score).sort(dim=-1, descending=True, stable=True)
        return ranked, by_score.gather(-1, by_p)

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return the last rank that reaches its threshold, int64 ``[tokens]``."""
        assert level is not None
        return last_rank(ranked >= level[0])

    def shown(self, ranked: Tensor, alpha: float) -> Shown:
        """Return p-values beside critical values; several rows differ by token."""
        critical = self.critical_values(alpha, ranked.shape[-1]).to(ranked.device)
        return "p-value", -ranked, "critical value", critical if len(critical) == 1 else None


class StepDown(StepUp):
    """Reject everything before the first p-value that exceeds its critical value."""

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many ranks reach their thresholds without a gap, int64 ``[tokens]``."""
        assert level is not None
        return (ranked >= level[0]).long().cumprod(-1).sum(-1)


def last_rank(passes: Tensor) -> Tensor:
    """Return the last True rank of bool ``[tokens, n]``, 0 if there is none: int64 ``[tokens]``."""
    # int16 is the fastest to reduce
    rank = torch.arange(1, passes.shape[-1] + 1, dtype=torch.int16, device=passes.device)
    return (passes * rank).amax(-1).long()
