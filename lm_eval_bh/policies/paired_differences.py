"""Is a policy better than another at the same cost? Paired by document, or group of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lm_eval_bh.policies.document_losses import Floats

RESAMPLES = 10_000
LEVEL = 0.05  # intervals hold 95 %


@dataclass(frozen=True)
class Difference:
    """Two perplexities of the same documents, and the interval of their difference.

    Attributes
    ----------
    perplexity, control : float
        Of a policy, and of what it is compared with; per token.
    difference, low, high : float
        The policy's minus the control's, with a 95 % percentile interval over documents.
    relative, relative_low, relative_high : float
        The same as a share of the control's perplexity.
    """

    perplexity: float
    control: float
    difference: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float


class Ladder:
    """Documents' losses of a static policy at several means, between which it is interpolated.

    A mean between two rungs is what mixing the two over the tokens, or steps, would give.

    Parameters
    ----------
    rungs : mapping of mean number of experts, or distinct ones, to float64 ``[documents]``
        Losses in nats; at least one.
    """

    def __init__(self, rungs: Mapping[float, Floats]) -> None:
        self.rungs = dict(sorted(rungs.items()))

    def at(self, mean: float) -> Floats:
        """Return the losses at a mean, beyond the rungs continued in a straight line."""
        means = list(self.rungs)
        if len(means) == 1:
            return self.rungs[means[0]]
        upper = min(max(int(np.searchsorted(means, mean)), 1), len(means) - 1)
        low, high = means[upper - 1], means[upper]
        share = (mean - low) / (high - low)
        found: Floats = (1 - share) * self.rungs[low] + share * self.rungs[high]
        return found

    def within(self, mean: float) -> Floats:
        """Return the losses at a mean, beyond the rungs those of the nearest one."""
        means = list(self.rungs)
        return self.at(min(max(mean, means[0]), means[-1]))


class PairedBootstrap:
    """Draws the same documents again and again, for every comparison the same draws.

    Parameters
    ----------
    tokens : float64 ``[documents]``
        Scored tokens of each document.
    resamples, seed : int
        How many draws, and from where.

    References
    ----------
    Efron 1979, Ann. Stat. 7:1.
    """

    def __init__(self, tokens: Floats, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.tokens = tokens
        documents = len(tokens)
        shares = np.full(documents, 1 / documents)
        self._draws = np.random.default_rng(seed).multinomial(documents, shares, resamples)

    def perplexity(self, losses: Floats) -> float:
        """Return the token perplexity of float64 ``[documents]`` losses."""
        return float(np.exp(losses.sum() / self.tokens.sum()))

    def compare(self, losses: Floats, control: Floats) -> Difference:
        """Compare the losses of a policy with those of a control."""
        tokens = self._draws @ self.tokens
        ours = np.exp(self._draws @ losses / tokens)
        theirs = np.exp(self._draws @ control / tokens)
        low, high = np.quantile(ours - theirs, [LEVEL / 2, 1 - LEVEL / 2])
        relative = np.quantile(ours / theirs - 1, [LEVEL / 2, 1 - LEVEL / 2])
        a, b = self.perplexity(losses), self.perplexity(control)
        return Difference(
            a, b, a - b, float(low), float(high), a / b - 1, float(relative[0]), float(relative[1])
        )

    def difference_of_means(self, ours: Floats, theirs: Floats) -> tuple[float, float, float]:
        """Compare two sums over the same tokens, a token: the difference, and its interval."""
        means = (self._draws @ (ours - theirs)) / (self._draws @ self.tokens)
        low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
        return float((ours - theirs).sum() / self.tokens.sum()), float(low), float(high)
