"""Finds experts that serve one kind of token, or one task, more than others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import Ints

Floats = NDArray[np.float64]
Names = NDArray[np.str_]

DRAWS = 499  # shuffles of the documents: p-values from 0.002
SPECIALISATION = (
    "layer",
    "expert",
    "of",
    "tokens",
    "entropy",
    "normalized_entropy",
    "information",
    "corrected",
    "share",
    "p_value",
    "most",
    "lift",
)


class Tested(NamedTuple):
    """Information in nats, its value corrected for chance (at least 0), and its p-value."""

    information: Floats
    corrected: Floats
    p_value: Floats


def entropy(counts: Ints) -> Floats:
    """Return the Shannon entropy of counts along the last axis, in nats; 0 if all are 0."""
    total = counts.sum(-1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    return np.asarray(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1))


def information(served: Ints, tokens: Ints) -> Floats:
    """Return how much an expert's choice tells about a token's kind, in nats.

    The mutual information of "the expert serves the token" and the token's kind.

    Parameters
    ----------
    served : int64 [..., kinds]
        Number of tokens of each kind that an expert served.
    tokens : int64 [..., kinds]
        Number of tokens of each kind.

    Returns
    -------
    float64 [...]
    """
    joint = np.stack([served, tokens - served], axis=-2)
    flat = joint.reshape(*joint.shape[:-2], -1)
    return np.maximum(entropy(joint.sum(-1)) + entropy(tokens) - entropy(flat), 0)


def independent_tokens(served: Ints, tokens: Ints) -> Tested:
    """Test information under independent tokens.

    Chance alone gives ``(kinds - 1) / 2n`` on average; the p-value is that of the likelihood ratio
    test.

    References
    ----------
    Miller 1955, Note on the bias of information estimates; Wilks 1938, Ann. Math. Stat. 9:60.
    """
    from scipy import stats

    n, found = tokens.sum(-1), information(served, tokens)
    # An expert that serves no token, or every token, carries no information even by chance.
    varies = (served.sum(-1) > 0) & (served.sum(-1) < n)
    freedom = np.where(varies, np.maximum((tokens > 0).sum(-1) - 1, 0), 0)
    p = np.where(freedom > 0, stats.chi2.sf(2 * n * found, np.maximum(freedom, 1)), 1.0)
    return Tested(found, np.maximum(found - freedom / (2 * np.maximum(n, 1)), 0), p)


def shuffled_documents(
    served: Ints, tokens: Ints, kinds: Ints, seed: int = 0, draws: int = DRAWS
) -> Tested:
    """Test information about the kind of documents, by shuffling kinds among documents.

    Tokens of a document are dependent, so a test that assumes independence would find experts of a
    task whenever documents differ.

    Parameters
    ----------
    served : int64 [documents, experts]
        Number of tokens of each document that an expert served.
    tokens : int64 [documents]
        Number of tokens per document.
    kinds : int64 [documents]
        The kind of each document, from 0.
    seed, draws : int
        Seed and number of shuffles.
    """
    rng = np.random.default_rng(seed)
    names = np.arange(kinds.max() + 1)
    counted = served.astype(np.float64)  # still exact, but with a fast product

    def of(labels: Ints) -> Floats:
        inside = (labels == names[:, None]).astype(np.float64)
        return information((inside @ counted).T, np.broadcast_to(inside @ tokens, (1, len(names))))

    found = of(kinds)
    total, reached = np.zeros_like(found), np.zeros_like(found)
    for _ in range(draws):
        drawn = of(rng.permutation(kinds))
        total += drawn
        reached += drawn >= found - 1e-12
    return Tested(found, np.maximum(found - total / draws, 0), (1 + reached) / (1 + draws))


def specialisation(counts: Counts, seed: int = 0) -> pd.DataFrame:
    """Describe every expert by the distribution of its tokens over classes and tasks.

    Parameters
    ----------
    counts : Counts
        Counts of a log; tasks are compared by the kept documents.
    seed : int
        Seed of the shuffles.

    Returns
    -------
    DataFrame
        With the columns :data:`SPECIALISATION`, one row per layer, expert and ``of`` ("token
        class", "task"; omitted if there is only one): ``tokens`` served; ``entropy`` of their kinds
        in nats, and divided by its maximum; ``information``; ``corrected``, the same corrected for
        chance; ``share``, that relative to the entropy of the kinds; the p-value
        (:func:`independent_tokens` for classes, :func:`shuffled_documents` for tasks); ``most``,
        the most over-represented kind, and ``lift``, the factor.
    """
    found = []
    tokens, served = counts.tokens.sum(0), counts.served.sum(0).transpose(0, 2, 1)
    present = tokens.sum(0) > 0
    if present.sum() > 1:
        served, tokens = served[..., present], tokens[:, None, present]
        tested = independent_tokens(served, np.broadcast_to(tokens, served.shape))
        names = np.array(counts.classes)[present]
        found.append(_described("token class", names, served, tokens, tested, counts))

    documents, used = counts.document_table()
    length = documents["tokens"].to_numpy()
    names, kinds = np.unique(documents["task"], return_inverse=True)
    if len(names) > 1:
        inside = (kinds == np.arange(len(names))[:, None]).astype(np.int64)
        served = (inside @ used).T.reshape(len(counts.layers), counts.experts, len(names))
        tested = shuffled_documents(used, length, kinds, seed)
        found.append(_described("task", names, served, inside @ length, tested, counts))
    if not found:
        return pd.DataFrame(columns=SPECIALISATION).astype({"corrected": "float64"})
    return pd.concat(found, ignore_index=True)


def lift(served: Ints, tokens: Ints) -> Floats:
    """Return how many times as often an expert serves a kind as tokens overall.

    Parameters
    ----------
    served, tokens : int64 [..., kinds]

    Returns
    -------
    float64 [..., kinds]
        1 if the expert served nothing.
    """
    rate = served / np.maximum(tokens, 1)
    overall = served.sum(-1, keepdims=True) / np.maximum(tokens.sum(-1, keepdims=True), 1)
    return np.where(overall > 0, rate / np.where(overall > 0, overall, 1), 1.0)


def _described(
    of: str, names: Names, served: Ints, tokens: Ints, tested: Tested, counts: Counts
) -> pd.DataFrame:
    """Return the table for one set of kinds; served is ``[layers, experts, kinds]``."""
    tokens = np.broadcast_to(tokens, served.shape)
    raised, spread = lift(served, tokens), entropy(served)
    information, corrected, p_value = (part.reshape(spread.shape) for part in tested)
    layer, expert = np.indices(spread.shape)
    columns = {
        "layer": np.array(counts.layers)[layer],
        "expert": expert,
        "of": np.full(spread.shape, of),
        "tokens": served.sum(-1),
        "entropy": spread,
        "normalized_entropy": spread / np.log(len(names)),
        "information": information,
        "corrected": corrected,
        "share": corrected / np.maximum(entropy(tokens), 1e-12),
        "p_value": p_value,
        "most": names[raised.argmax(-1)],
        "lift": raised.max(-1),
    }
    return pd.DataFrame({name: columns[name].ravel() for name in SPECIALISATION})
