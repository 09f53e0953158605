"""The selection rules. A rule says how many of a token's experts, best first, are taken.

Adding a rule is adding one row to :data:`RULES`; tables, figures and reports take its label and
everything else from there, by way of the results file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_bh.routing.rules import adaptive_levels, controls, stepwise
from lm_eval_bh.routing.rules.sorted_scores import SortedScores
from lm_eval_bh.schema import RuleInfo

# (sorted scores, alpha, thresholds: float [rows, experts] or None) -> int [tokens]; thresholds and
# counts are arrays where the scores are
Count = Callable[[SortedScores, float, Any], Any]
CriticalValues = Callable[[float, int], NDArray[np.float64]]

FDR, FWER = "level of the false discovery rate", "level of the family-wise error rate"


@dataclass(frozen=True)
class Rule:
    """A way to decide how many experts a token gets.

    Attributes
    ----------
    name : str
        What ``rule=`` takes.
    label : str
        What tables and figures say. The ``k`` of a fixed count's label gives way to the number:
        top-k, top-8.
    source : str
        Where it was published.
    alpha : str
        What ``alpha`` means, in half a sentence; empty for a rule without it.
    count : callable or None
        From :class:`~lm_eval_bh.routing.rules.sorted_scores.SortedScores`, alpha and thresholds,
        both tensors or both arrays, to an integer ``[tokens]``; None always takes ``max_k``.
    critical_values : callable or None
        For a multiple-testing rule, ``(alpha, N) -> float64 [rows, N]``: what the ascending
        p-values are compared with. Rules that look once have one row.
    random : bool
        Whether the experts are drawn instead of taken from the top.
    weighs : bool
        Whether alpha is a threshold on the softmax weight, times the factor of the statistic.
    alone : bool
        Whether each expert is decided by itself, whatever the token's others are. Then the
        candidates are the ``max_k`` experts that the router ranks first, whatever the statistic, so
        that no other sort than the router's own is needed.
    most : float
        Alpha lies strictly between 0 and this.
    """

    name: str
    label: str
    source: str
    alpha: str = ""
    count: Count | None = None
    critical_values: CriticalValues | None = None
    random: bool = False
    weighs: bool = False
    alone: bool = False
    most: float = 1.0

    @property
    def fixed_count(self) -> bool:
        """Whether every token gets ``max_k`` experts."""
        return self.count is None

    @property
    def tests(self) -> bool:
        """Whether it is a multiple-testing procedure, so that it needs a null distribution."""
        return self.critical_values is not None

    def counts(self, scores: SortedScores, alpha: float, thresholds: Tensor | None) -> Tensor:
        """Return how many experts the rule takes, whatever the bounds: int64 ``[tokens]``."""
        assert self.count is not None
        alike = None if thresholds is None else scores.alike(thresholds)
        return torch.as_tensor(self.count(scores, alpha, alike), dtype=torch.int64)

    def describe(self) -> RuleInfo:
        """Return what results say about the rule, see :class:`lm_eval_bh.schema.RuleInfo`."""
        return {
            "name": self.name,
            "label": self.label,
            "source": self.source,
            "fixed_count": self.fixed_count,
            "tests": self.tests,
            "random": self.random,
            "alpha": self.alpha,
        }


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "bh",
            "BH",
            "Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57:289",
            FDR,
            stepwise.step_up,
            stepwise.bh_critical_values,
        ),
        Rule(
            "by",
            "BY",
            "Benjamini and Yekutieli 2001, Ann. Stat. 29:1165",
            FDR,
            stepwise.step_up,
            stepwise.by_critical_values,
        ),
        Rule(
            "holm",
            "Holm",
            "Holm 1979, Scand. J. Stat. 6:65",
            FWER,
            stepwise.step_down,
            stepwise.holm_critical_values,
        ),
        Rule(
            "hochberg",
            "Hochberg",
            "Hochberg 1988, Biometrika 75:800",
            FWER,
            stepwise.step_up,
            stepwise.holm_critical_values,
        ),
        Rule(
            "bonferroni",
            "Bonferroni",
            "Dunn 1961, J. Am. Stat. Assoc. 56:52",
            FWER,
            stepwise.step_up,
            stepwise.bonferroni_critical_values,
        ),
        Rule(
            "fdr_tsbh",
            "fdr_tsbh",
            "Benjamini and Hochberg 2000, J. Educ. Behav. Stat. 25:60; as in statsmodels",
            FDR,
            adaptive_levels.two_stage,
            adaptive_levels.two_stage_critical_values,
        ),
        Rule(
            "storey",
            "storey",
            "Storey, Taylor and Siegmund 2004, J. R. Stat. Soc. B 66:187",
            FDR,
            adaptive_levels.storey,
            adaptive_levels.storey_critical_values,
        ),
        Rule("topk", "top-k", "static top-k: always max_k experts"),
        Rule(
            "top_p",
            "top-p",
            "Huang et al. 2024, arXiv:2403.07652",
            "share of the softmax weight to reach",
            controls.top_p,
        ),
        Rule(
            "min_p",
            "min-p",
            "Nguyen et al. 2024, arXiv:2407.01082",
            "share of the largest softmax weight to reach",
            controls.min_p,
        ),
        Rule(
            "p_value",
            "p",
            "uncorrected: p <= alpha",
            "level of each expert's own test",
            stepwise.count_all,
            stepwise.uncorrected_critical_values,
            alone=True,
        ),
        Rule(
            "min_w",
            "min-w",
            "absolute threshold, not relative to the token's largest weight as min-p's is",
            "what the softmax weight, times the statistic's factor, has to reach",
            stepwise.count_all,
            weighs=True,
            alone=True,
            most=math.inf,
        ),
        Rule("random_k", "random-k", "random baseline: max_k experts drawn at random", random=True),
    )
}
