"""What a rule looks at: the scores of one layer's tokens, sorted."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_bh.routing.host import on_host

Array = Tensor | NDArray[Any]


class SortedScores:
    """The scores of a batch of tokens, sorted so that the most significant expert comes first.

    Parameters
    ----------
    ascending : Tensor or ndarray
        float ``[tokens, experts]``: p-values, or negated scores, which sort the same way.
    experts : Tensor or None
        int64 ``[tokens, experts]``, the experts in that order; None where it is the order of the
        router logits.

    Attributes
    ----------
    values : Tensor or ndarray
        The scores: an array on the CPU, where NumPy decides in a third of torch's time.
    """

    def __init__(self, ascending: Array, experts: Tensor | None = None) -> None:
        if isinstance(ascending, Tensor) and on_host(ascending):
            ascending = ascending.detach().numpy()
        self.values: Array = ascending
        self.experts = experts

    @cached_property
    def ascending(self) -> Tensor:
        """The scores as a tensor, float ``[tokens, experts]``."""
        return self.values if isinstance(self.values, Tensor) else torch.from_numpy(self.values)

    @cached_property
    def weights(self) -> Tensor:
        """Each expert's softmax weight, descending: float ``[tokens, experts]``."""
        return torch.softmax(-self.ascending, dim=-1)

    @cached_property
    def cumulative_weights(self) -> Tensor:
        """The weight of the first 1, 2, ... experts together: float ``[tokens, experts]``."""
        return self.weights.cumsum(-1)

    def alike(self, thresholds: Tensor) -> Array:
        """Return thresholds as what they are compared with is: on its device, or an array."""
        if isinstance(self.values, Tensor):
            return thresholds.to(self.values.device)
        return thresholds.numpy()

    def at_most(self, thresholds: Array) -> Any:
        """Compare each rank with its threshold.

        Parameters
        ----------
        thresholds : Tensor or ndarray
            float ``[experts]``, or ``[tokens, experts]`` where tokens have thresholds of their own;
            see :meth:`alike`.

        Returns
        -------
        Tensor or ndarray, bool ``[tokens, experts]``
        """
        return self.values <= thresholds
