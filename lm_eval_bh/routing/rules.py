"""Selection rules: how many of a token's experts are significant.

A rule turns the N p-values of one token, sorted ascending, into a number of rejected null
hypotheses ("this expert's router logit comes from the null distribution"). It does so by comparing
the k-th smallest p-value with the k-th critical value and walking the comparisons up or down.

A new rule is one :class:`Rule` in :data:`RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CriticalValues = Callable[[float, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Rule:
    """A stepwise multiple-testing procedure, or, without critical values, the fixed top-k.

    Attributes
    ----------
    name : str
        What ``rule=`` takes.
    critical_values : callable or None
        ``(alpha, N) -> float64 [N]``, what the ascending p-values are compared with. The arithmetic
        is statsmodels' own, to the last bit, so that no decision can differ from it.
    step : "up" or "down"
        Step-up rejects everything up to the *last* p-value that meets its critical value, step-down
        everything before the *first* that does not.
    source : str
        Where the procedure was published.
    """

    name: str
    critical_values: CriticalValues | None
    step: Literal["up", "down"]
    source: str

    @property
    def adaptive(self) -> bool:
        """Whether the number of experts depends on the token."""
        return self.critical_values is not None

    def count(self, met: Tensor) -> Tensor:
        """Return the number of rejections, int64 ``[tokens]``.

        Parameters
        ----------
        met : Tensor
            bool ``[tokens, N]``; whether the k-th smallest p-value meets the k-th critical value.
        """
        n = met.shape[-1]
        rank = torch.arange(n + 1, dtype=torch.int16, device=met.device)  # the fastest to reduce
        if self.step == "up":
            return (met * rank[1:]).amax(-1).long()
        return torch.where(met, rank[-1], rank[:-1]).amin(-1).long()


def _bh(alpha: float, n: int) -> NDArray[np.float64]:
    return np.arange(1, n + 1) / float(n) * alpha


def _by(alpha: float, n: int) -> NDArray[np.float64]:
    harmonic = np.sum(1.0 / np.arange(1, n + 1))
    return np.arange(1, n + 1) / float(n) / harmonic * alpha


def _holm(alpha: float, n: int) -> NDArray[np.float64]:
    return alpha / np.arange(n, 0, -1)


def _bonferroni(alpha: float, n: int) -> NDArray[np.float64]:
    return np.full(n, alpha / float(n))


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("bh", _bh, "up", "Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57:289"),
        Rule("by", _by, "up", "Benjamini and Yekutieli 2001, Ann. Stat. 29:1165"),
        Rule("holm", _holm, "down", "Holm 1979, Scand. J. Stat. 6:65"),
        Rule("hochberg", _holm, "up", "Hochberg 1988, Biometrika 75:800"),
        Rule("bonferroni", _bonferroni, "up", "Dunn 1961, J. Am. Stat. Assoc. 56:52"),
        Rule("topk", None, "up", "the control: always max_k experts"),
    )
}
