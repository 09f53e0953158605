"""Parameters solved on calibration text, one per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Solution:
    """The parameters that meet a target.

    Attributes
    ----------
    target_experts, budget
        The target.
    alphas : dict of layer to float
        The rule's parameter in every routed layer.
    mean_experts : float
        The mean over tokens and layers on the calibration text, with the rule applied.
    layer_means : dict of layer to float
        The means of the layers.
    tokens : int
        Number of tokens of the text.
    text : str
        Name of the text.
    target_distinct, distinct_experts : float or None
        For a method of a step: the target, and the measured mean of distinct experts per layer and
        step on the calibration text; ``layer_means`` then holds those of the layers.
    level : float or None
        For a family of all decisions: the level at which the procedure, over all decisions on the
        text with the unchanged model, has the cut-off in ``alphas``.
    """

    target_experts: float | None
    budget: str
    alphas: dict[int, float]
    mean_experts: float
    layer_means: dict[int, float]
    tokens: int
    text: str
    level: float | None = None
    target_distinct: float | None = None
    distinct_experts: float | None = None

    @property
    def miss(self) -> float:
        """Relative error against the target; of the worst layer if each has its own."""
        if self.target_distinct is not None:
            return abs((self.distinct_experts or 0.0) / self.target_distinct - 1)
        if self.target_experts is None:
            return 0.0
        per_layer = self.budget == "layer"
        means = list(self.layer_means.values()) if per_layer else [self.mean_experts]
        return max(abs(mean / self.target_experts - 1) for mean in means)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Solution:
        """Rebuild a solution from :meth:`as_dict`."""
        found = dict(content)
        for name in ("alphas", "layer_means"):
            found[name] = {int(layer): float(value) for layer, value in found[name].items()}
        return cls(**found)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with text keys."""
        content = dataclasses.asdict(self)
        if self.target_distinct is None:  # as earlier releases wrote it
            del content["target_distinct"], content["distinct_experts"]
        for name in ("alphas", "layer_means"):
            content[name] = {str(layer): value for layer, value in content[name].items()}
        return content
