"""Which experts serve one kind of token, or one task, more than the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lm_eval_bh.analysis.patterns.counts import Counts
from lm_eval_bh.analysis.patterns.logs import Ints

Floats = NDArray[np.float64]


def entropy(counts: Ints) -> Floats:
    """Return the Shannon entropy of counts along the last axis, in nats; 0 where all are 0."""
    total = counts.sum(-1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    return np.asarray(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1))


def mutual_information(served: Ints, tokens: Ints) -> tuple[Floats, Floats, Floats]:
    """Return what it tells about a token's kind that an expert serves it.

    Parameters
    ----------
    served : int64 [..., kinds]
        How many tokens of each kind an expert served.
    tokens : int64 [..., kinds]
        How many tokens of each kind there were.

    Returns
    -------
    (information, corrected, p_value) : float64 [...]
        The mutual information in nats of "the expert serves the token" and the token's kind; the
        same less what chance alone gives on average, ``(kinds - 1) / 2n``, and no less than 0; and
        the p-value of the likelihood ratio test of independence. It takes tokens for independent;
        those of one document are not, so small p-values are too small.

    References
    ----------
    Miller 1955, Note on the bias of information estimates; Wilks 1938, Ann. Math. Stat. 9:60.
    """
    from scipy import stats

    n = tokens.sum(-1)
    joint = np.stack([served, tokens - served], axis=-2)
    information = (
        entropy(joint.sum(-1)) + entropy(tokens) - entropy(joint.reshape(*joint.shape[:-2], -1))
    )
    information = np.maximum(information, 0)
    # An expert that serves no token, or all, tells nothing, and chance cannot make it tell any.
    varies = (joint.sum(-1) > 0).all(-1)
    freedom = np.where(varies, np.maximum((tokens > 0).sum(-1) - 1, 0), 0)
    corrected = np.maximum(information - freedom / (2 * np.maximum(n, 1)), 0)
    p = np.where(freedom > 0, stats.chi2.sf(2 * n * information, np.maximum(freedom, 1)), 1.0)
    return information, corrected, p


def specialisation(counts: Counts) -> pd.DataFrame:
    """Describe every expert: how its tokens are spread over token classes, and over tasks.

    Returns
    -------
    DataFrame
        One row a layer, expert and ``of`` ("token class", "task"; left out where there is only
        one): ``tokens`` served; ``entropy`` of their kinds in nats, and divided by its largest
        value; ``information`` and ``corrected`` as :func:`mutual_information` has it; ``share``,
        the corrected information as a share of the entropy of the kinds; the p-value; ``most``, the
        kind that is over-represented most, and ``lift``, by what factor.
    """
    tables = [
        _of_kinds(
            "token class", counts.classes, counts.served.sum(0), counts.tokens.sum(0), counts
        ),
        _of_kinds(
            "task",
            counts.tasks,
            counts.served.sum(2).transpose(1, 0, 2),
            counts.tokens.sum(2).T,
            counts,
        ),
    ]
    return pd.concat([table for table in tables if table is not None], ignore_index=True)


def lift(served: Ints, tokens: Ints) -> Floats:
    """Return how many times more often an expert serves a kind than it serves tokens at large.

    Parameters
    ----------
    served, tokens : int64 [..., kinds]

    Returns
    -------
    float64 [..., kinds]
        1 where nothing was served.
    """
    rate = served / np.maximum(tokens, 1)
    overall = served.sum(-1, keepdims=True) / np.maximum(tokens.sum(-1, keepdims=True), 1)
    return np.where(overall > 0, rate / np.where(overall > 0, overall, 1), 1.0)


def _of_kinds(
    of: str, names: Sequence[str], served: Ints, tokens: Ints, counts: Counts
) -> pd.DataFrame | None:
    """Describe all experts; served is ``[layers, kinds, experts]``, tokens ``[layers, kinds]``."""
    present = tokens.sum(0) > 0
    if present.sum() < 2:
        return None
    kinds = np.array(names)[present]
    served = served[:, present].transpose(0, 2, 1)
    tokens = np.broadcast_to(tokens[:, None, present], served.shape)
    information, corrected, p = mutual_information(served, tokens)
    raised = lift(served, tokens)
    spread = entropy(served)
    layer, expert = np.indices(information.shape)
    return pd.DataFrame(
        {
            "layer": np.array(counts.layers)[layer.ravel()],
            "expert": expert.ravel(),
            "of": of,
            "tokens": served.sum(-1).ravel(),
            "entropy": spread.ravel(),
            "normalized_entropy": spread.ravel() / np.log(len(kinds)),
            "information": information.ravel(),
            "corrected": corrected.ravel(),
            "share": (corrected / np.maximum(entropy(tokens), 1e-12)).ravel(),
            "p_value": p.ravel(),
            "most": kinds[raised.argmax(-1).ravel()],
            "lift": raised.max(-1).ravel(),
        }
    )
