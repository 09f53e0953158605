"""The metrics of an experiment, each a small function of plain numbers.

The two that compare repeated runs are in :mod:`~lm_eval_bh.analysis.table.stability`.

None means "not measured", or that the metric is undefined; no metric ever falls back on a default
that looks good. Counts are numbers of experts of one token in one layer; "pooled" means over all
tokens of all routed layers.

Arrays
------
histogram : int64 ``[layers, experts + 1]``
    Numbers of tokens with 0, 1, ... experts.
usage : int64 ``[layers, experts]``
    Number of tokens per expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Category -> metrics, in the order of tables. Two companions complete the sixteen:
# normalized_selection_entropy, and mid_range_rate, the remainder of both hit rates.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "quality": ("perplexity", "avg_task_accuracy"),
    "efficiency": ("expert_activation_ratio", "flops_reduction_pct"),
    "speed": ("tokens_per_second", "latency_ms_per_token"),
    "distribution": ("expert_utilization", "gini_coefficient"),
    "behaviour": ("adaptive_range", "selection_entropy", "normalized_selection_entropy"),
    "constraints": ("ceiling_hit_rate", "floor_hit_rate", "mid_range_rate"),
    "cross_layer": ("layer_expert_variance", "layer_consistency_score"),
    "stability": ("expert_overlap_score", "output_determinism"),
}
METRICS: tuple[str, ...] = tuple(name for names in CATEGORIES.values() for name in names)


def perplexity(loglikelihoods: Iterable[float], scored_tokens: Iterable[int]) -> float | None:
    """Return the token-level perplexity of a set of documents.

    ``exp(-sum of loglikelihoods / sum of scored tokens)``; no unit; from 1 upwards, lower is
    better. It is the perplexity of the whole text: long documents weigh more than short ones.

    Parameters
    ----------
    loglikelihoods : iterable of float
        Loglikelihoods of documents, in nats.
    scored_tokens : iterable of int
        Number of predicted tokens of each document. That is not the number of tokens read: prompts
        are read without being scored, and windows overlap.

    Returns
    -------
    float or None
        None if no token was scored.
    """
    total = sum(scored_tokens)
    if total <= 0:
        return None
    loss = -math.fsum(loglikelihoods) / total
    return math.exp(loss) if loss < 709 else math.inf


def perplexity_stderr(
    loglikelihoods: Sequence[float], scored_tokens: Sequence[int]
) -> float | None:
    r"""Return the standard error of :func:`perplexity` over documents.

    With the losses :math:`l_i` (negative loglikelihoods) and scored tokens :math:`w_i` of n
    documents and their ratio :math:`R = \sum l / \sum w`, by the delta method

    .. math:: e^R \, \frac{\sqrt{\frac{n}{n-1} \sum_i (l_i - R w_i)^2}}{\sum w}

    Unit and range are those of the perplexity; None with fewer than two documents or no scored
    token.

    References
    ----------
    Cochran 1977, Sampling Techniques, section 6.4: the variance of a ratio.
    """
    losses, weights = -np.asarray(loglikelihoods, float), np.asarray(scored_tokens, float)
    total = weights.sum()
    if len(losses) < 2 or total <= 0:
        return None
    ratio = losses.sum() / total
    squares = float(np.square(losses - ratio * weights).sum())
    value = perplexity(loglikelihoods, scored_tokens)
    assert value is not None
    return value * math.sqrt(len(losses) / (len(losses) - 1) * squares) / float(total)


def avg_task_accuracy(accuracies: Mapping[str, float]) -> float | None:
    """Return the mean accuracy over tasks with equal weights.

    A share from 0 to 1, higher is better; None without tasks.

    Parameters
    ----------
    accuracies : mapping of str to float
        Task -> accuracy. The caller chooses the tasks: averages over different tasks cannot be
        compared.
    """
    return math.fsum(accuracies.values()) / len(accuracies) if accuracies else None


def expert_activation_ratio(mean_experts: float | None, max_k: int | None) -> float | None:
    """Return the mean number of experts per token as a share of the maximum.

    ``mean experts / max_k``; from ``min_k / max_k`` to 1, lower is cheaper; None if either is
    unknown.
    """
    return None if mean_experts is None or not max_k else mean_experts / max_k


def flops_reduction_pct(flops: float | None, native_flops: float | None) -> float | None:
    """Return the reduction of FLOPs per token against the model's own top-k, in percent.

    ``100 * (1 - flops / native)``; at most 100, negative if more is computed than by the unchanged
    model; None if either is unknown. For the counts see :mod:`lm_eval_bh.analysis.table.flops`.
    """
    return None if flops is None or not native_flops else 100 * (1 - flops / native_flops)


def tokens_per_second(tokens: int | None, seconds: float | None) -> float | None:
    """Return tokens per second of forward passes, from 0; None without tokens or time.

    The metric of this name is measured in the speed phase, over its prefill: all configurations
    run on the same tokens in turn. For an evaluation's passes it is called
    ``evaluation_tokens_per_second``: it depends on padding, batch order and what ran before.
    """
    return None if not tokens or not seconds else tokens / seconds


def latency_ms_per_token(passes: int | None, seconds: float | None) -> float | None:
    """Return milliseconds per token of decoding one sequence; None without passes or time.

    ``1000 * seconds / passes`` of the speed phase, from 0 upwards: each pass gives one token.
    """
    return None if not passes or not seconds else 1000 * seconds / passes


def expert_utilization(usage: Ints) -> float | None:
    """Return the share of experts that served at least one token.

    Over all (layer, expert) pairs of the routed layers, from 0 to 1; None if no token was routed.
    """
    return float((usage > 0).mean()) if usage.size and usage.any() else None


def gini_coefficient(usage: Ints) -> float | None:
    r"""Return how unequally tokens are spread over the experts of a layer, averaged over layers.

    With the usages :math:`u_{(1)} \le \dots \le u_{(N)}` of a layer,

    .. math:: G = \frac{\sum_i (2i - N - 1)\, u_{(i)}}{N \sum_i u_i}

    which is 0 if all experts serve equally often and :math:`1 - 1/N` if one serves all.
    Experts of different layers are unrelated, so they are not pooled. None if no token was
    routed.

    References
    ----------
    Gini 1912, Variabilità e mutabilità; Sen 1973, On Economic Inequality.
    """
    used = np.sort(usage[usage.sum(-1) > 0], axis=-1).astype(np.float64)
    if not used.size:
        return None
    n = used.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    return max(0.0, float((used @ weights / (n * used.sum(-1))).mean()))


def adaptive_range(histogram: Ints) -> int | None:
    """Return the largest minus the smallest count, pooled.

    Experts; from 0, if all tokens get the same number, to ``max_k - min_k``; None if no token
    was routed.
    """
    occurring = np.flatnonzero(histogram.sum(0))
    return int(occurring[-1] - occurring[0]) if occurring.size else None


def selection_entropy(histogram: Ints) -> float | None:
    """Return the Shannon entropy of the pooled distribution of counts.

    ``-sum p_k ln p_k`` in nats; from 0, if all tokens get the same number, to
    ``ln(max_k - min_k + 1)``; None if no token was routed.
    """
    pooled = histogram.sum(0)
    pooled = pooled[pooled > 0]
    if not pooled.size:
        return None
    shares = pooled / pooled.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def normalized_selection_entropy(
    histogram: Ints, min_k: int | None, max_k: int | None
) -> float | None:
    """Return :func:`selection_entropy` divided by its largest value, ``ln(max_k - min_k + 1)``.

    From 0 to 1; None if the counts are fixed (``min_k = max_k``) or no token was routed.
    """
    entropy = selection_entropy(histogram)
    if entropy is None or min_k is None or max_k is None or min_k >= max_k:
        return None
    return min(1.0, entropy / math.log(max_k - min_k + 1))


def ceiling_hit_rate(histogram: Ints, max_k: int | None) -> float | None:
    """Return the percentage of pooled counts equal to ``max_k``, 0 to 100.

    None if no token was routed or ``max_k`` is unknown.
    """
    return _percentage_at(histogram, max_k)


def floor_hit_rate(histogram: Ints, min_k: int | None, max_k: int | None) -> float | None:
    """Return the percentage of pooled counts equal to ``min_k``, 0 to 100.

    With ``min_k = max_k`` every count is at the ceiling and none at the floor. None if no token was
    routed or a bound is unknown.
    """
    rate = _percentage_at(histogram, min_k)
    if rate is None or max_k is None:
        return None
    return 0.0 if min_k == max_k else rate


def mid_range_rate(histogram: Ints, min_k: int | None, max_k: int | None) -> float | None:
    """Return the percentage of pooled counts strictly between the bounds, 0 to 100.

    None if no token was routed or a bound is unknown.
    """
    total = int(histogram.sum())
    if not total or min_k is None or max_k is None:
        return None
    return 100 * int(histogram[:, min_k + 1 : max_k].sum()) / total


def _percentage_at(histogram: Ints, count: int | None) -> float | None:
    total = int(histogram.sum())
    return 100 * int(histogram[:, count].sum()) / total if total and count is not None else None


def layer_expert_variance(histogram: Ints) -> float | None:
    """Return the variance over layers of the mean number of experts.

    Population variance, in experts squared, from 0 upwards; None with fewer than two layers.
    """
    tokens = histogram.sum(-1)
    if len(histogram) < 2 or not tokens.all():
        return None
    return float(np.var(histogram @ np.arange(histogram.shape[-1]) / tokens))


def layer_consistency_score(histogram: Ints, cross: Sequence[int]) -> float | None:
    r"""Return the mean correlation of adjacent layers' counts, token by token.

    For two adjacent routed layers with counts x and y of the same n tokens, Pearson's

    .. math:: r = \frac{n \sum xy - \sum x \sum y}
        {\sqrt{(n \sum x^2 - (\sum x)^2)(n \sum y^2 - (\sum y)^2)}}

    in integers until the last division, averaged over the pairs that have one: from -1 to 1. None
    if no pair has one, because of every pair one layer's counts are constant, or there is only one
    layer.

    Parameters
    ----------
    histogram : int64 [layers, experts + 1]
        Histograms of layers with the same tokens.
    cross : sequence of int
        For each layer, the sum over tokens of its count times the previous layer's; the first is
        not used.
    """
    sums = [
        (
            sum(n for n in row),
            sum(k * n for k, n in enumerate(row)),
            sum(k * k * n for k, n in enumerate(row)),
        )
        for row in histogram.tolist()
    ]
    correlations = []
    for ((n, x, xx), (_, y, yy)), xy in zip(pairwise(sums), cross[1:], strict=True):
        spread = (n * xx - x * x) * (n * yy - y * y)
        if spread > 0:
            r = (n * int(xy) - x * y) / math.sqrt(spread)
            correlations.append(min(1.0, max(-1.0, r)))
    return math.fsum(correlations) / len(correlations) if correlations else None
