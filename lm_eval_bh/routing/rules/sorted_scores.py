"""What a rule looks at: the scores of one layer's tokens, sorted."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class SortedScores:
    """The scores of a batch of tokens, sorted so that the most significant expert comes first.

    Attributes
    ----------
    ascending : Tensor
        float ``[tokens, experts]``: p-values, or negated scores, which sort the same way.
    experts : Tensor or None
        int64 ``[tokens, experts]``, the experts in that order; None where it is the order of the
        router logits.
    """

    def __init__(self, ascending: Tensor, experts: Tensor | None = None) -> None:
        self.ascending = ascending
        self.experts = experts

    @cached_property
    def weights(self) -> Tensor:
        """Each expert's softmax weight, descending: float ``[tokens, experts]``."""
        return torch.softmax(-self.ascending, dim=-1)

    @cached_property
    def cumulative_weights(self) -> Tensor:
        """The weight of the first 1, 2, ... experts together: float ``[tokens, experts]``."""
        return self.weights.cumsum(-1)

    def at_most(self, thresholds: Tensor) -> Tensor:
        """Compare each rank with its threshold.

        Parameters
        ----------
        thresholds : Tensor
            float ``[experts]``, or ``[tokens, experts]`` where tokens have thresholds of their own.

        Returns
        -------
        Tensor, bool ``[tokens, experts]``
        """
        if self.ascending.device.type == "cpu" and not torch.compiler.is_compiling():
            # NumPy compares in a third of torch's time.
            return torch.from_numpy(self.ascending.numpy() <= thresholds.numpy())
        return self.ascending <= thresholds
