"""SERE: experts that a step's tokens want less give way to the most similar one that is loaded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .batch import BatchMethod, numbered, summed
from .declare import Parameter, integer, number
from .router import RouterOutput

CRITICAL = "similarity to a loaded expert below which an expert is critical, and loaded too"


class SERE(BatchMethod):
    """Load each token's first ``k0`` experts, and re-route the others among its first ``max_k``.

    The first ``k0`` of all tokens of a step are its primary experts P. Every other expert u of a
    token hands it on to ``argmax S_uv`` over v in P, with the weight that u has; where
    ``max S_uv < alpha`` (the paper's rho), u is critical and stays. Several experts of a token that
    meet in one give it the sum of their weights, which the authors' kernel gets by running it once
    for each. S is the table ``similarities``.

    Of equally similar experts the one with the smaller index serves, as in that kernel. Assumed
    where the paper states nothing: with ``min_k`` above ``k0`` a token's first ``min_k`` are
    primary; with the gain ``fold``, that gain's own scalars replace the sums.

    References
    ----------
    Wu et al. 2026, "SERE: similarity-based expert re-routing for efficient batch decoding in MoE
    models", arXiv:2602.07616; what it leaves open as in github.com/JL-Cheng/SERE.
    """

    name, label, alpha = "sere", "SERE", CRITICAL
    source = "Wu et al. 2026, arXiv:2602.07616"
    beyond = True
    measured = ("similarities",)
    declared: ClassVar[dict[str, Parameter]] = {
        "alpha": Parameter(
            0.3, CRITICAL, *number("a number from 0 to 1", lambda value: 0 <= value <= 1)
        ),
        "k0": Parameter(
            1,
            "how many of each token's first experts are loaded in any case",
            *integer("an integer number of experts, 1 or more", 1),
        ),
    }

    def fit(self, tables: Any, alpha: float) -> None:
        """Take the layer's similarities; see :meth:`Method.fit`."""
        super().fit(tables, alpha)
        if not self.fixed:
            similar = self.tables["similarities"][self.settings["layer"]]
            self.keep("similar", torch.from_numpy(similar).float())

    def level(self, alpha: float) -> Tensor:
        """Return alpha, float32 ``[1]``, as similarities are."""
        return torch.tensor([alpha], dtype=torch.float32)

    def serve(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which slots serve a token, see :meth:`BatchMethod.serve`."""
        served = torch.zeros_like(router.logits, dtype=torch.bool)
        served.scatter_(-1, self.targets(router, step, steps), True)
        return served.gather(-1, router.indices)

    def targets(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return what serves in place of a token's first experts, int64 ``[tokens, max_k]``."""
        own = router.indices[:, : self.max_k]
        first = own[:, : max(self.settings["k0"], self.min_k)]
        primary = summed(torch.ones_like(first), first, step, steps, self.num_experts)[step] > 0
        to_primary = self.table("similar")[own].masked_fill(~primary.unsqueeze(1), -1.0)
        similarity, nearest = to_primary.max(-1)
        stays = primary.gather(-1, own) | (similarity < self.table("thresholds"))
        return torch.where(stays | (step == steps - 1).unsqueeze(-1), own, nearest)

    def weigh(self, kept: Tensor, router: RouterOutput, experts: Tensor) -> Tensor:
        """Return the weights: what each expert kept has been handed, then a gain."""
        if not (self.fixed or self.folds):
            targets = self.targets(router, *numbered(router))
            handed = kept.new_zeros(len(kept), self.num_experts + 1)  # of unused slots nothing
            handed = handed.scatter_add(-1, targets, router.weights[:, : self.max_k])
            kept = handed.gather(-1, experts)
        return super().weigh(kept, router, experts)
