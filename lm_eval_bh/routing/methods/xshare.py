"""XShare: a budget of experts per step by gate mass, and top-k within it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import SCORED
from .batch import STEP_BUDGET, BatchMethod, largest, summed
from .declare import Parameter, integer
from .router import RouterOutput


class XShare(BatchMethod):
    """Load the experts with the largest gate mass in a step, and take top-k among them.

    Each token's first ``k0`` experts are always loaded (the paper's warm-up), and the rest of
    ``step_budget`` is filled by the gating scores summed over the step's tokens. Then each token
    takes the ``max_k`` loaded experts that its router ranks first.

    References
    ----------
    Vankov et al. 2026, "XShare: collaborative in-batch expert sharing for faster MoE inference",
    arXiv:2602.07265. Its refinement for several GPUs is left out.
    """

    name, label = "xshare", "XShare"
    source = "Vankov et al. 2026, arXiv:2602.07265"
    beyond = True
    declared: ClassVar[dict[str, Parameter]] = SCORED | {
        "step_budget": STEP_BUDGET,
        "k0": Parameter(
            0,
            "how many of each token's first experts are loaded in any case",
            *integer("an integer number of experts, 0 or more", 0),
        ),
    }

    def load(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which experts are loaded, see :meth:`BatchMethod.load`."""
        gates = self.score(router).double().exp()
        everyone = torch.arange(self.num_experts, device=gates.device).expand_as(gates)
        totals = summed(gates, everyone, step, steps, self.num_experts)
        first = router.indices[:, : self.settings["k0"]]
        wanted = summed(torch.ones_like(first), first, step, steps, self.num_experts) > 0
        totals = torch.where(wanted, totals + 2 * len(gates), totals)
        return largest(totals, self.settings["step_budget"]) | wanted
