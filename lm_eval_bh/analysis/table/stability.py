"""Similarity of repeated runs of a configuration, in chosen experts and output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.schema import Sample

Ints = NDArray[np.int64]


def expert_overlap_score(first: Iterable[Sample], second: Iterable[Sample]) -> float | None:
    """Return the similarity of the experts that two runs chose.

    The Jaccard index (size of the intersection over size of the union), averaged over layers and
    tokens: from 0, nothing in common, to 1, always the same sets.

    Parameters
    ----------
    first, second : iterable of Sample
        The samples of two internal routing logs. Requests are matched by document, request and
        layer; if two runs generated different text, only tokens before the difference count.

    Returns
    -------
    float or None
        None if they have no token in common.
    """
    others = {(sample["sample_id"], sample["request"]): sample for sample in second}
    total, tokens = 0.0, 0
    for sample in first:
        other = others.get((sample["sample_id"], sample["request"]))
        if other is None:
            continue
        length = _common_prefix(sample["token_ids"], other["token_ids"])
        layers = {layer["layer"]: layer["selected_experts"] for layer in other["layers"]}
        for layer in sample["layers"]:
            if length and layer["layer"] in layers:
                overlaps = jaccard(
                    np.asarray(layer["selected_experts"][:length]),
                    np.asarray(layers[layer["layer"]][:length]),
                )
                total += float(overlaps.sum())
                tokens += length
    return total / tokens if tokens else None


def jaccard(first: Ints, second: Ints) -> NDArray[np.float64]:
    """Return the Jaccard index of two sets of experts for each token.

    Parameters
    ----------
    first, second : int64 [tokens, slots]
        Experts, each at most once per token; negative in unused slots. The numbers of slots
        may differ.

    Returns
    -------
    float64 [tokens]
        1 if both sets are empty.
    """
    used = first >= 0
    both = ((first[:, :, None] == second[:, None, :]) & used[:, :, None]).sum((1, 2))
    either = used.sum(1) + (second >= 0).sum(1) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    for position in range(length):
        if first[position] != second[position]:
            return position
    return length


def output_determinism(first: Mapping[int, str], second: Mapping[int, str]) -> float | None:
    """Return the percentage of documents whose output is the same in two runs, 0 to 100.

    "The same" means equal to the last digit of every loglikelihood, or to the last character of a
    generated text.

    Parameters
    ----------
    first, second : mapping of int to str
        Document -> its responses as logged.

    Returns
    -------
    float or None
        Percentage of the common documents; None if there are none.
    """
    shared = first.keys() & second.keys()
    if not shared:
        return None
    return 100 * sum(first[document] == second[document] for document in shared) / len(shared)
