"""Compares policies at the same cost, paired by documents or groups of documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lm_eval_bh.policies.document_losses import Floats

RESAMPLES = 10_000
LEVEL = 0.05  # intervals hold 95 %


@dataclass(frozen=True)
class Difference:
    """Two perplexities of the same documents, and their difference with its interval.

    Attributes
    ----------
    perplexity, control : float
        Perplexities per token of a policy and of its control.
    difference, low, high : float
        The policy's minus the control's, with a 95 % percentile interval over documents.
    relative, relative_low, relative_high : float
        The same, relative to the control's perplexity.
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
    """Documents' losses of a static policy at several means, with interpolation.

    Between two rungs, the policy is a mixture of both over tokens or steps.

    Parameters
    ----------
    rungs : mapping of mean number of experts, or distinct ones, to float64 ``[documents]``
        Losses in nats; at least one rung.
    """

    def __init__(self, rungs: Mapping[float, Floats]) -> None:
        self.rungs = dict(sorted(rungs.items()))

    def at(self, mean: float) -> Floats:
        """Return the losses at a mean, extrapolated linearly beyond the rungs."""
        means = list(self.rungs)
        if len(means) == 1:
            return self.rungs[means[0]]
        upper = min(max(int(np.searchsorted(means, mean)), 1), len(means) - 1)
        low, high = means[upper - 1], means[upper]
        share = (mean - low) / (high - low)
        found: Floats = (1 - share) * self.rungs[low] + share * self.rungs[high]
        return found

    def within(self, mean: float) -> Floats:
        """Return the losses at a mean, or beyond the rungs those of the nearest."""
        means = list(self.rungs)
        return self.at(min(max(mean, means[0]), means[-1]))


class PairedBootstrap:
    """Resamples documents, with the same draws for every comparison.

    Parameters
    ----------
    tokens : float64 ``[documents]``
        Scored tokens of each document.
    resamples, seed : int
        Number of draws, and their seed.

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
        """Compare two sums over the same tokens: the difference per token, and its interval."""
        means = (self._draws @ (ours - theirs)) / (self._draws @ self.tokens)
        low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
        return float((ours - theirs).sum() / self.tokens.sum()), float(low), float(high)
