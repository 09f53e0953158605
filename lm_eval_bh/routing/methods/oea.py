"""Opportunistic expert activation: a token also takes experts that others have loaded."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .batch import BatchMethod, summed
from .declare import Parameter, integer
from .router import RouterOutput


class OEA(BatchMethod):
    """Load each token's first ``k0`` experts; then fill up to ``max_k`` with loaded ones.

    The paper's simplified form: the baseline is a number of experts, not a share of the weight, and
    a token may take any loaded expert, in its router's order, until it has ``max_k``.

    References
    ----------
    Oncescu et al. 2025, "Opportunistic expert activation: batch-aware expert routing for faster
    decode without retraining", arXiv:2511.02237.
    """

    name, label = "oea", "OEA"
    source = "Oncescu et al. 2025, arXiv:2511.02237"
    beyond = True
    declared: ClassVar[dict[str, Parameter]] = {
        "k0": Parameter(
            2,
            "how many of each token's first experts are loaded in any case",
            *integer("an integer number of experts, 1 or more", 1),
        )
    }

    def load(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which experts are loaded, see :meth:`BatchMethod.load`."""
        first = router.indices[:, : self.settings["k0"]]
        return summed(torch.ones_like(first), first, step, steps, self.num_experts) > 0
