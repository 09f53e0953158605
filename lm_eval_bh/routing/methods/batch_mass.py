"""A fixed number of experts per step: those with the largest sums over its tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .batch import STEP_BUDGET, BatchMethod, largest, summed
from .declare import Parameter
from .router import RouterOutput


class BatchMass(BatchMethod):
    """Load the ``step_budget`` experts with the largest sums of weights times factors.

    Sums run over the tokens that have the expert among their first ``max_k``; each token keeps its
    loaded ones. The control of ``batch_min_w``, whose number of experts adapts.
    """

    name, label = "batch_mass", "batch mass"
    source = "fixed budget of a step by summed weight (x benefit), of this project"
    declared: ClassVar[dict[str, Parameter]] = BatchMethod.declared | {"step_budget": STEP_BUDGET}

    def load(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which experts are loaded, see :meth:`BatchMethod.load`."""
        experts = router.indices[:, : self.max_k]
        totals = summed(self.values(router), experts, step, steps, self.num_experts)
        return largest(totals, self.settings["step_budget"])
