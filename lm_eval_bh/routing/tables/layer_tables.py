"""The calibrated tables of one layer, to which a method is fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.methods.survival import survival
from lm_eval_bh.routing.tables.thresholds import thresholds

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerTables:
    """The calibrated tables of one layer.

    Attributes
    ----------
    x, cdf : ndarray
        Its null distribution, float64 [points] or [experts, points].
    factors : ndarray or None
        Factors of the experts' weights, float64 [experts]; or a predictor of norms.
    measured : mapping of str to ndarray
        Further tables of all layers by name: float64 [layers, ...].
    """

    x: Array
    cdf: Array
    factors: Array | None
    measured: Mapping[str, Array]

    @torch.no_grad()
    def p_values(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the p-values of scores, float64, same shape and device.

        Parameters
        ----------
        scores : Tensor [any shape], any float dtype
            [..., experts] with one distribution per expert.
        """
        x, cdf = (torch.tensor(values, device=scores.device) for values in (self.x, self.cdf))
        z = scores.double()
        if x.ndim == 1:
            return survival(x, cdf, z.flatten()).view(z.shape)
        by_expert = z.reshape(-1, z.shape[-1]).T
        return survival(x, cdf, by_expert).T.reshape(z.shape)

    def thresholds(self, critical_values: Any) -> Any:
        """Return the smallest scores whose p-values do not exceed critical values, float64.

        See :meth:`NullModel.thresholds`. Shape and type are those of the critical values.
        """
        if self.x.ndim == 2:
            raise ParameterError(
                "With one distribution per expert, a critical value has no single threshold; "
                "compare p_values()."
            )
        if not isinstance(critical_values, torch.Tensor):
            return thresholds(self.x, self.cdf, critical_values)
        found = thresholds(self.x, self.cdf, critical_values.flatten().numpy())
        return torch.from_numpy(found).view(critical_values.shape)
