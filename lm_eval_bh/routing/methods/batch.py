"""Methods of a step: choose the experts that tokens decoded together load.

While an engine decodes, a layer's time follows the number of different experts that the tokens of a
step need, as each expert's weights are read once (Oncescu et al. 2025, arXiv:2511.02237). These
methods therefore decide per step which experts are loaded, and each token is served by the loaded
experts that its router ranks first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import SCORED, Method
from .declare import Parameter, choice, integer
from .router import RouterOutput

FALLBACK = Parameter(
    "loaded",
    "what serves a token if fewer than `min_k` of its first experts are loaded: the best "
    "`loaded` ones, or its `own` first ones, which are then loaded too",
    *choice(["own", "loaded"]),
)
STEP_BUDGET = Parameter(
    32,
    "number of experts that a step loads per layer",
    *integer("an integer number of experts, 1 or more", 1),
)


class BatchMethod(Method):
    """Load some experts for a step, and serve each token by the loaded ones.

    A method overrides :meth:`load`. Tokens with step -1 take the model's own top-k.

    Attributes
    ----------
    beyond : bool
        Whether a token may take loaded experts beyond the ``max_k`` that its router ranks first.
    """

    declared: ClassVar[dict[str, Parameter]] = SCORED | {"fallback": FALLBACK}
    joint = True
    beyond: ClassVar[bool] = False

    @classmethod
    def scored_by(cls, settings: Mapping[str, Any]) -> str:
        """Return the statistic, with the weight in place of the logit."""
        found = super().scored_by(settings)
        return "weight" if found == "logit" else found

    @property
    def follows_router(self) -> bool:
        """True: a token's experts keep its router's order, whatever loads them."""
        return True

    def asks(self, native_k: int) -> int:
        """Return how many experts the router has to rank."""
        everyone = self.beyond or self.settings["fallback"] == "loaded"
        return self.num_experts if everyone else max(self.max_k, native_k)

    def load(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which experts a step loads, bool ``[steps, experts]``.

        Parameters
        ----------
        router : RouterOutput
            Router output for the tokens of all steps.
        step : Tensor
            int64 ``[tokens]``, below ``steps``; tokens of the last step belong to no step.
        steps : int
            Upper bound of the number of steps, with that last one.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define load.")

    def keep_in_step(self, router: RouterOutput) -> Tensor:
        """Return which slots of the router serve each token, bool ``[tokens, slots]``."""
        step, steps = numbered(router)
        first = torch.arange(router.indices.shape[-1], device=step.device)
        alone = (step == steps - 1).unsqueeze(-1)
        return torch.where(alone, first < router.native_k, self.serve(router, step, steps))

    def serve(self, router: RouterOutput, step: Tensor, steps: int) -> Tensor:
        """Return which slots serve a token of a step, bool ``[tokens, slots]``."""
        first = torch.arange(router.indices.shape[-1], device=step.device)
        kept = self.load(router, step, steps)[step].gather(-1, router.indices)
        own = kept & (first < self.max_k)
        if self.beyond:
            return kept
        if self.settings["fallback"] == "own":
            return own
        # A further loaded one where there is none among its first.
        short = own.sum(-1, keepdim=True) < self.min_k
        return torch.where(short, kept & (kept.cumsum(-1) <= self.min_k), own)

    def values(self, router: RouterOutput, power: float = 1.0) -> Tensor:
        """Return contributions of each first ``max_k`` experts, float64 ``[tokens, max_k]``."""
        found = self.score(router).gather(-1, router.indices[:, : self.max_k]).double()
        return (power * found).exp()


def numbered(router: RouterOutput) -> tuple[Tensor, int]:
    """Return the step of each token, and how many there are at most, see :meth:`BatchMethod.load`.

    Steps are numbered below the tokens, so nothing has to wait for their largest.
    """
    indices = router.indices
    if router.step is None:
        return indices.new_zeros(len(indices)), 2
    return torch.where(router.step < 0, len(indices), router.step), len(indices) + 1


def summed(values: Tensor, experts: Tensor, step: Tensor, steps: int, num_experts: int) -> Tensor:
    """Return each expert's values summed over the tokens of a step, ``[steps, experts]``.

    Parameters
    ----------
    values, experts : Tensor
        float and int64 ``[tokens, slots]``.
    step, steps, num_experts
        As in :meth:`BatchMethod.load`.
    """
    totals = values.new_zeros(steps * num_experts)
    place = step.unsqueeze(-1) * num_experts + experts
    return totals.scatter_add_(0, place.flatten(), values.flatten()).view(steps, num_experts)


def largest(totals: Tensor, budget: int) -> Tensor:
    """Return the ``budget`` largest of a step's totals, those above 0: bool ``[steps, experts]``.

    Ties go to the expert with the smaller index.
    """
    order = totals.argsort(dim=-1, descending=True, stable=True)[:, :budget]
    return torch.zeros_like(totals, dtype=torch.bool).scatter(-1, order, True) & (totals > 0)
