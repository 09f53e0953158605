"""NAEE: skips experts far below the token's largest weight, by a calibrated ratio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .allocation import quantile
from .base import Shown
from .declare import level
from .min_p import MinP

QUANTILE = "quantile of the layer's weight ratios below which an expert is skipped; published: 0.5"


class NAEE(MinP):
    """Skip experts whose ratio to the token's largest weight is below the layer's quantile.

    The table ``ratios`` holds the quantiles of ``w_i / w_1`` on calibration text, per layer. The
    paper has k = 2: the second expert is skipped below the median of ``w_2 / w_1``. Extended here
    to k > 2: the ratios of all native slots but the first are pooled, and each later expert is
    compared with their quantile. Levels other than the median are this project's addition, so that
    the mean number of experts can be chosen.

    References
    ----------
    Lu et al. 2024, "Not all experts are equal: efficient expert pruning and skipping for
    mixture-of-experts large language models", arXiv:2402.14800.
    """

    name, label, alpha = "naee", "NAEE", QUANTILE
    source = "Lu et al. 2024, arXiv:2402.14800"
    measured = ("ratios",)
    declared = {"alpha": level(QUANTILE, 0.5)}  # noqa: RUF012

    @classmethod
    def scored_by(cls, settings: Mapping[str, Any]) -> str:
        """Return the weight, from which ratios are computed."""
        return "weight"

    def level(self, alpha: float) -> Tensor:
        """Return the smallest ratio kept, float64."""
        grid = torch.from_numpy(self.tables["ratios"][self.settings["layer"]])
        return quantile(grid, alpha)

    def shown(self, ranked: Tensor, alpha: float) -> Shown:
        """Return the weights and the smallest weight kept."""
        return super().shown(ranked, float(self.level(alpha)))
