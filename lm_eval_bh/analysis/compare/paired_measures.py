"""Paired differences of perplexities, and of scores such as accuracies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.analysis.compare.paired_tests import mcnemar_exact, t_test, tost
from lm_eval_bh.errors import ParameterError

Floats = NDArray[np.float64]
Interval = Callable[..., tuple[Floats, Floats]]  # interval of a function of means of paired samples

MOST_RESAMPLES = 1_000_000  # more would change no displayed digit and take hours


def check_settings(
    margin: float, accuracy_margin: float, confidence: float, resamples: int, seed: int
) -> None:
    """Raise :class:`ParameterError` if a setting of a comparison is out of range."""
    for name, value in (
        ("margin", margin),
        ("accuracy_margin", accuracy_margin),
        ("confidence", confidence),
    ):
        if not 0 < value < 1:
            raise ParameterError(f"{name} must be a number between 0 and 1, not {value}.")
    if not 1 <= resamples <= MOST_RESAMPLES:
        raise ParameterError(
            f"resamples must be an integer from 1 to {MOST_RESAMPLES}, not {resamples}."
        )
    if seed < 0:
        raise ParameterError(f"seed must be an integer of at least 0, not {seed}.")


def compare_perplexities(
    one: Floats, other: Floats, sizes: Floats, margin: float, interval: Interval
) -> dict[str, Any]:
    """Compare two perplexities, paired by document.

    Parameters
    ----------
    one, other : float64 [documents]
        Loss of each document in nats; ``other`` is the baseline's.
    sizes : float64 [documents]
        Divisors of the losses: tokens, words or bytes.
    margin : float
        Largest relative difference of perplexity that counts as equivalent.
    interval : callable
        :func:`~lm_eval_bh.analysis.compare.paired_tests.bootstrap_interval` with its settings.

    Returns
    -------
    dict
        The columns of :data:`~lm_eval_bh.analysis.compare.paired.COMPARISON` that follow, and
        ``effect`` and ``spread``: mean and standard deviation over documents of the tested
        quantity, here the linearised log ratio of perplexities. For infinite losses, ``reason``.
    """
    found: dict[str, Any] = {"documents": len(one), "margin": margin}
    if not (np.isfinite(one).all() and np.isfinite(other).all() and sizes.sum() > 0):
        return found | {"reason": "a loglikelihood is not finite"}
    losses, total = one - other, sizes.sum()
    log_ratio = float(losses.sum() / total)
    value, baseline_value = perplexity(one.sum(), total), perplexity(other.sum(), total)
    (ratio_low, low), (ratio_high, high) = interval(_ratio_and_difference, one, other, sizes)
    # The ratio of two means behaves like the mean of these influences of documents.
    influence = log_ratio + (losses - log_ratio * sizes) / sizes.mean()
    return found | {
        "value": float(value),
        "baseline_value": float(baseline_value),
        "difference": float(value - baseline_value),
        "difference_low": float(low),
        "difference_high": float(high),
        "ratio": float(perplexity(losses.sum(), total)),
        "ratio_low": float(ratio_low),
        "ratio_high": float(ratio_high),
        "test": "paired t",
        "p_value": t_test(influence),
        "equivalence_p": tost(influence, math.log1p(-margin), math.log1p(margin)),
        "effect": log_ratio,
        "spread": float(influence.std(ddof=1)),
    }


def compare_scores(one: Floats, other: Floats, margin: float, interval: Interval) -> dict[str, Any]:
    """Compare two means of scores, paired by document; binary ones by McNemar's test.

    Parameters
    ----------
    one, other : float64 [documents]
        The score of each document; ``other`` is the baseline's.
    margin : float
        Largest difference of the means that counts as equivalent.
    interval : callable
        As for :func:`compare_perplexities`.

    Returns
    -------
    dict
        As in :func:`compare_perplexities`; ``effect`` and ``spread`` describe the differences.
    """
    difference = one - other
    low, high = interval(np.asarray, difference)
    found = {
        "documents": len(one),
        "margin": margin,
        "value": float(one.mean()),
        "baseline_value": float(other.mean()),
        "difference": float(difference.mean()),
        "difference_low": float(low),
        "difference_high": float(high),
        "equivalence_p": tost(difference, -margin, margin)
        if difference.any()
        else (1 - margin) ** len(difference),
        "effect": float(difference.mean()),
        "spread": float(difference.std(ddof=1)),
    }
    if not (np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all()):
        return found | {"test": "paired t", "p_value": t_test(difference)}
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return found | {
        "flips_worse": worse,
        "flips_better": better,
        "test": "McNemar, exact",
        "p_value": mcnemar_exact(better, worse),
    }


def perplexity(loss: Floats, weight: Floats) -> Floats:
    """Return exp(loss / weight) of means, or sums, over documents."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(loss / weight))


def _ratio_and_difference(one: Floats, other: Floats, weight: Floats) -> Floats:
    """Return the ratio of two perplexities and their difference, stacked along axis 0."""
    ours, theirs = perplexity(one, weight), perplexity(other, weight)
    return np.stack([perplexity(one - other, weight), ours - theirs])
