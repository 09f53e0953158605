"""Selection rules: how many of a token's experts are called for.

A rule looks at the N statistics of one token in one layer, sorted so that the most conspicuous
expert comes first, and says how many of them to take. A multiple-testing rule compares the k-th
smallest p-value with its k-th critical value; a control looks at the shares of the router's weight,
or at nothing.

A new rule is one function from :class:`Evidence` to counts, and its line in :data:`RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CriticalValues = Callable[[float, int], NDArray[np.float64]]
STOREY_LAMBDA = 0.5


class Ordered:
    """The statistics of a batch of tokens, sorted; and what rules make of them, once for all.

    Parameters
    ----------
    ascending : Tensor
        float ``[tokens, N]``: p-values, or the negative of statistics that stand for them; the most
        conspicuous expert first.
    """

    def __init__(self, ascending: Tensor) -> None:
        self.ascending = ascending

    @cached_property
    def shares(self) -> Tensor:
        """Each expert's share of the token's weight, descending: float ``[tokens, N]``."""
        return torch.softmax(-self.ascending, dim=-1)

    @cached_property
    def held(self) -> Tensor:
        """The share that the first 1, 2, ... experts hold together: float ``[tokens, N]``."""
        return self.shares.cumsum(-1)


class Evidence:
    """What a rule may look at, for a batch of tokens in one layer.

    Attributes
    ----------
    alpha : float
        The rule's parameter.
    ordered : Ordered
        The sorted statistics.
    limits : Tensor or None
        float ``[rows, N]``, on the same scale: what the rule's critical values become.
    """

    def __init__(self, alpha: float, ordered: Ordered, limits: Tensor | None = None) -> None:
        self.alpha = alpha
        self.ordered = ordered
        self.limits = limits

    def met(self, row: int | Tensor) -> Tensor:
        """Return whether each k-th smallest p-value is at most the k-th critical value of a row.

        Parameters
        ----------
        row : int, or int64 ``[tokens]``
            The row of the rule's critical values, one for all tokens or one for each.

        Returns
        -------
        Tensor, bool ``[tokens, N]``
        """
        assert self.limits is not None
        ascending, limits = self.ordered.ascending, self.limits[row]
        if ascending.device.type == "cpu" and not torch.compiler.is_compiling():
            # in a third of the time that torch's comparison takes
            return torch.from_numpy(ascending.numpy() <= limits.numpy())
        return ascending <= limits


@dataclass(frozen=True)
class Rule:
    """A way to decide how many experts a token gets.

    Attributes
    ----------
    name : str
        What ``rule=`` takes.
    source : str
        Where it was published.
    count : callable or None
        From :class:`Evidence` to int64 ``[tokens]``; None always takes ``max_k``.
    critical_values : callable or None
        For a multiple-testing rule, ``(alpha, N) -> float64 [rows, N]``: what the ascending
        p-values are compared with. Rules that look once have one row. The arithmetic is
        statsmodels' own where it has the rule, to the last bit, so that no decision can differ.
    random : bool
        Whether the experts are drawn instead of taken from the top.
    """

    name: str
    source: str
    count: Callable[[Evidence], Tensor] | None = None
    critical_values: CriticalValues | None = None
    random: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether the number of experts depends on the token."""
        return self.count is not None

    @property
    def tests(self) -> bool:
        """Whether it is a multiple-testing procedure, so that it needs a null distribution."""
        return self.critical_values is not None


def _last(met: Tensor) -> Tensor:
    """Return the rank of the last comparison that is met, 0 if none is: int64 ``[tokens]``."""
    # int16 is the fastest to reduce
    rank = torch.arange(1, met.shape[-1] + 1, dtype=torch.int16, device=met.device)
    return (met * rank).amax(-1).long()


def _step_up(evidence: Evidence) -> Tensor:
    """Reject everything up to the last p-value that meets its critical value."""
    return _last(evidence.met(0))


def _step_down(evidence: Evidence) -> Tensor:
    """Reject everything before the first p-value that does not."""
    met = evidence.met(0)
    rank = torch.arange(met.shape[-1] + 1, dtype=torch.int16, device=met.device)
    return torch.where(met, rank[-1], rank[:-1]).amin(-1).long()


def _two_stages(evidence: Evidence) -> Tensor:
    """Step up, then step up again in the row that belongs to the first number of rejections."""
    return _last(evidence.met(_last(evidence.met(0))))


def _storey(evidence: Evidence) -> Tensor:
    """Step up in the row that belongs to the number of p-values above lambda."""
    at_most_lambda = evidence.met(0)
    above = at_most_lambda.shape[-1] - at_most_lambda.sum(-1)
    return _last(evidence.met(1 + above))


def _top_p(evidence: Evidence) -> Tensor:
    """Take the fewest experts that hold the share alpha of the weight."""
    held = evidence.ordered.held
    return 1 + torch.searchsorted(held, held.new_full((len(held), 1), evidence.alpha)).squeeze(-1)


def _min_p(evidence: Evidence) -> Tensor:
    """Take the experts whose share is at least alpha times the largest."""
    shares = evidence.ordered.shares
    return (shares >= evidence.alpha * shares[..., :1]).sum(-1)


def _bh_levels(alpha: float, n: int) -> NDArray[np.float64]:
    return np.arange(1, n + 1)[None] / float(n) * alpha


def _by_levels(alpha: float, n: int) -> NDArray[np.float64]:
    harmonic = np.sum(1.0 / np.arange(1, n + 1))
    return np.arange(1, n + 1)[None] / float(n) / harmonic * alpha


def _holm_levels(alpha: float, n: int) -> NDArray[np.float64]:
    return alpha / np.arange(n, 0, -1)[None]


def _bonferroni_levels(alpha: float, n: int) -> NDArray[np.float64]:
    return np.full((1, n), alpha / float(n))


def _two_stage_levels(alpha: float, n: int) -> NDArray[np.float64]:
    """Return BH's critical values at the second stage's level: row r after r rejections."""
    rejected = np.arange(n + 1)
    null = np.where((rejected == 0) | (rejected == n), n, 1.0 * n - rejected)
    level = np.where(null == n, alpha, alpha * n / null)
    return np.arange(1, n + 1) / float(n) * level[:, None]


def storey_null_share(above: NDArray[np.int64] | int, n: int) -> NDArray[np.float64]:
    """Return Storey's estimate of the share of null hypotheses, at lambda = 1/2.

    It is not cut at 1: only so is the procedure's level kept for a finite number of tests.

    Parameters
    ----------
    above : int or ndarray
        How many of the n p-values are greater than lambda.
    n : int
        Number of tests.

    References
    ----------
    Storey, Taylor and Siegmund 2004, J. R. Stat. Soc. B 66:187, equation (4) and theorem 3.
    """
    return np.asarray((np.asarray(above) + 1.0) / (n * (1 - STOREY_LAMBDA)))


def _storey_levels(alpha: float, n: int) -> NDArray[np.float64]:
    """Return lambda itself, and then BH's critical values for 0 to n p-values above lambda."""
    level = alpha / storey_null_share(np.arange(n + 1), n)
    levels = np.minimum(np.arange(1, n + 1) / float(n) * level[:, None], STOREY_LAMBDA)
    return np.vstack([np.full((1, n), STOREY_LAMBDA), levels])


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("bh", "Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57:289", _step_up, _bh_levels),
        Rule("by", "Benjamini and Yekutieli 2001, Ann. Stat. 29:1165", _step_up, _by_levels),
        Rule("holm", "Holm 1979, Scand. J. Stat. 6:65", _step_down, _holm_levels),
        Rule("hochberg", "Hochberg 1988, Biometrika 75:800", _step_up, _holm_levels),
        Rule("bonferroni", "Dunn 1961, J. Am. Stat. Assoc. 56:52", _step_up, _bonferroni_levels),
        Rule(
            "fdr_tsbh",
            "Benjamini and Hochberg 2000, J. Educ. Behav. Stat. 25:60; as in statsmodels",
            _two_stages,
            _two_stage_levels,
        ),
        Rule(
            "storey",
            "Storey, Taylor and Siegmund 2004, J. R. Stat. Soc. B 66:187",
            _storey,
            _storey_levels,
        ),
        Rule("topk", "the control: always max_k experts"),
        Rule("top_p", "Huang et al. 2024, arXiv:2403.07652", _top_p),
        Rule("min_p", "Nguyen et al. 2024, arXiv:2407.01082", _min_p),
        Rule("random_k", "the control of controls: max_k experts drawn at random", random=True),
    )
}
