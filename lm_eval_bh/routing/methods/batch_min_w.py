"""A threshold on an expert's contribution to a step: best at equal distinct experts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .batch import BatchMethod, summed
from .declare import Parameter, choice, number
from .router import RouterOutput

REACH = "what the step's sum of (weight times the statistic's factor) to the `power` has to reach"


class BatchMinW(BatchMethod):
    """Load the experts whose contribution summed over a step's tokens reaches ``alpha``.

    The sum of (weight times factor) to the power 1 or 2 runs over the tokens that have the expert
    among their first ``max_k``. One threshold serves all layers and steps, so each gets as many
    experts as it needs. This project's own.
    """

    name, label = "batch_min_w", "batch min-w"
    source = "threshold on a step's sum of (weight x benefit)², of this project"
    alpha = REACH
    declared: ClassVar[dict[str, Parameter]] = BatchMethod.declared | {
        "alpha": Parameter(0.05, REACH, *number("a positive number", lambda value: value > 0)),
        "power": Parameter(2, "of what is summed up over a step, 1 or 2", *choice([1, 2])),
    }

    def level(self, alpha: float) -> Tensor:
        """Return alpha, float64 ``[1]``."""
        return torch.tensor([alpha], dtype=torch.float64)

    def load(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which experts reach the threshold, see :meth:`BatchMethod.load`."""
        values = self.values(router, self.settings["power"])
        experts = router.indices[:, : self.max_k]
        return summed(values, experts, step, steps, self.num_experts) >= self.table("thresholds")
