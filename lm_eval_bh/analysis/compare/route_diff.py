"""Differences of two routing logs of the same texts: how often, where, and which experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lm_eval_bh.analysis.compare.same_texts import same_tokens
from lm_eval_bh.errors import DataError
from lm_eval_bh.logged_rows import Ints, LoggedRows
from lm_eval_bh.schema import UNUSED

AT_ONCE = 4096  # tokens whose experts are compared at a time
NOBODY = -1  # in place of an expert: one was dropped or added

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RouteDiff:
    """How two logs differ. A pair is a token in a layer; it differs if its set of experts does.

    Attributes
    ----------
    tokens, pairs : int
        Numbers that both logs have.
    tokens_differ, pairs_differ : int
        Numbers that differ; a token differs if any of its layers does.
    jaccard : float
        Experts of a pair in both logs over those in either; the mean over pairs.
    layers : DataFrame
        ``layer``, ``pairs``, ``differ`` (share of pairs), ``jaccard``, ``experts_a`` and
        ``experts_b`` (mean numbers), ``weight_a`` and ``weight_b`` (share of the pairs' weight on
        experts that the other log lacks; null without weights).
    positions : DataFrame
        ``first``, ``last``, ``pairs``, ``differ``, ``jaccard``: in powers of two.
    grid : float64 [layers, positions]
        Share of pairs that differ.
    swaps : DataFrame
        ``layer``, ``a``, ``b``, ``times``, ``weight``, most frequent first: ``b`` replaces ``a``,
        both in the order of their weights, -1 for none; and the mean share of the token's weight
        that ``a`` had (or without ``a``, that ``b`` has).
    losses : DataFrame
        ``layers_differ`` (number of layers), ``tokens``, ``loss_a``, ``loss_b``: mean nats of such
        tokens; empty if no token has a loss in both.
    left_out, by_text : tuple of int, int
        See :class:`~lm_eval_bh.analysis.compare.same_texts.SameTokens`.
    other_layers : list of int
        Layers that only one log has.
    """

    tokens: int
    pairs: int
    tokens_differ: int
    pairs_differ: int
    jaccard: float
    layers: pd.DataFrame
    positions: pd.DataFrame
    grid: Floats
    swaps: pd.DataFrame
    losses: pd.DataFrame
    left_out: tuple[int, int]
    by_text: int
    other_layers: list[int]

    @property
    def share(self) -> float:
        """Share of pairs that differ."""
        return self.pairs_differ / self.pairs

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        from lm_eval_bh.analysis.table.table_files import plain

        tables = ("layers", "positions", "swaps", "losses")
        rows = {
            name: [
                {key: plain(value) for key, value in row.items()}
                for row in getattr(self, name).to_dict(orient="records")
            ]
            for name in tables
        }
        counts = ("tokens", "pairs", "tokens_differ", "pairs_differ", "jaccard", "by_text")
        return {
            **{name: getattr(self, name) for name in counts},
            "tokens_share": self.tokens_differ / self.tokens,
            "pairs_share": self.share,
            "layers_that_differ": int((self.layers["differ"] > 0).sum()),
            "left_out": {"a": self.left_out[0], "b": self.left_out[1]},
            "layers_of_one_log": self.other_layers,
            **rows,
        }


def diff_routes(a: LoggedRows, b: LoggedRows) -> RouteDiff:
    """Compare two logs of the same texts.

    Raises
    ------
    DataError
        If their texts differ, or they have no layer in common.
    """
    same = same_tokens(a, b)
    layers = np.intersect1d(a.layers, b.layers)
    if not len(layers):
        raise DataError(
            f"{a.folder} has the layers {a.layers.tolist()} and {b.folder} {b.layers.tolist()}: "
            "give logs that have a layer in common."
        )
    compared = [
        _compare(_part(a, same.a[some], layers), _part(b, same.b[some], layers))
        for some in np.array_split(np.arange(len(same.a)), -(-len(same.a) // AT_ONCE))
    ]
    of_pairs = {name: np.concatenate([one[0][name] for one in compared]) for name in compared[0][0]}
    differs, jaccard = of_pairs["differ"] > 0, of_pairs["jaccard"]
    bins = np.zeros(len(differs), dtype=np.int64)  # 0, 1, 2 to 3, 4 to 7, ...
    later = same.position > 0
    bins[later] = np.floor(np.log2(same.position[later])) + 1
    known = np.unique(bins)
    grid = np.stack([differs[bins == one].mean(0) for one in known], axis=1)
    by_position = {
        "first": np.where(known > 0, 2 ** np.maximum(known - 1, 0), 0),
        "last": 2**known - 1,
        "pairs": np.bincount(bins)[known] * len(layers),
        "differ": grid.mean(0),
        "jaccard": [jaccard[bins == one].mean() for one in known],
    }
    means = {name: values.mean(0) for name, values in of_pairs.items()}
    return RouteDiff(
        tokens=len(differs),
        pairs=differs.size,
        tokens_differ=int(differs.any(1).sum()),
        pairs_differ=int(differs.sum()),
        jaccard=float(jaccard.mean()),
        layers=pd.DataFrame({"layer": layers, "pairs": len(differs), **means}),
        positions=pd.DataFrame(by_position),
        grid=grid,
        swaps=_counted([one[1] for one in compared], layers),
        losses=_losses(a.loss[same.a], b.loss[same.b], differs.sum(1)),
        left_out=same.left_out,
        by_text=same.by_text,
        other_layers=np.setxor1d(a.layers, b.layers).tolist(),
    )


def _part(log: LoggedRows, tokens: Ints, layers: Ints) -> tuple[NDArray[np.int16], Floats]:
    """Return experts, and their shares of their token's weight, both ``[tokens, layers, k]``."""
    at = np.ix_(tokens, np.searchsorted(log.layers, layers))
    experts = log.experts[at]
    if log.weights is None:
        return experts, np.full(experts.shape, np.nan)
    weights = log.weights[at].astype(np.float64)
    total = weights.sum(-1, keepdims=True)
    return experts, np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def _compare(
    a: tuple[NDArray[np.int16], Floats], b: tuple[NDArray[np.int16], Floats]
) -> tuple[dict[str, Floats], pd.DataFrame]:
    """Return numbers of each pair, ``[tokens, layers]``, and its swaps, one per row."""
    used_a, used_b = a[0] != UNUSED, b[0] != UNUSED
    equal = (a[0][..., :, None] == b[0][..., None, :]) & used_a[..., None]
    only_a, only_b = used_a & ~equal.any(-1), used_b & ~equal.any(-2)
    counts_a, counts_b = used_a.sum(-1), used_b.sum(-1)
    both = counts_a - only_a.sum(-1)
    numbers = {
        "differ": (only_a.any(-1) | only_b.any(-1)).astype(np.float64),
        "jaccard": both / np.maximum(counts_a + counts_b - both, 1),
        "experts_a": counts_a.astype(np.float64),
        "experts_b": counts_b.astype(np.float64),
        "weight_a": np.where(only_a, a[1], 0.0).sum(-1),
        "weight_b": np.where(only_b, b[1], 0.0).sum(-1),
    }
    k = max(only_a.shape[-1], only_b.shape[-1])
    (from_a, share_a), (to_b, share_b) = (
        _first(*side, only, k) for side, only in ((a, only_a), (b, only_b))
    )
    token, layer, slot = np.nonzero((from_a != NOBODY) | (to_b != NOBODY))
    at = token, layer, slot
    swaps = {"layer": layer, "a": from_a[at], "b": to_b[at]}
    weight = np.where(from_a[at] != NOBODY, share_a[at], share_b[at])
    return numbers, pd.DataFrame(swaps | {"weight": weight})


def _first(experts: NDArray[np.int16], shares: Floats, only: Bools, k: int) -> tuple[Ints, Floats]:
    """Return the contents of some slots, moved to the front of ``k`` slots."""
    order = np.argsort(~only, axis=-1, kind="stable")
    found = np.take_along_axis(np.where(only, experts, NOBODY), order, -1)
    of_them = np.take_along_axis(shares, order, -1)
    wider = [(0, 0), (0, 0), (0, k - only.shape[-1])]
    return np.pad(found, wider, constant_values=NOBODY), np.pad(of_them, wider)


def _counted(swaps: list[pd.DataFrame], layers: Ints) -> pd.DataFrame:
    every = pd.concat(swaps, ignore_index=True)
    every["layer"] = layers[every["layer"]]
    found = every.groupby(["layer", "a", "b"])["weight"].agg(["size", "mean"]).reset_index()
    found = found.set_axis(["layer", "a", "b", "times", "weight"], axis=1)
    order = {"by": ["times", "layer", "a", "b"], "ascending": [False, True, True, True]}
    return found.sort_values(**order, ignore_index=True)


def _losses(a: NDArray[np.float32], b: NDArray[np.float32], differ: Ints) -> pd.DataFrame:
    """Return the mean losses of tokens by the number of layers in which they differ."""
    table = pd.DataFrame({"layers_differ": differ, "loss_a": a, "loss_b": b}, dtype=np.float64)
    groups = table.dropna().astype({"layers_differ": int}).groupby("layers_differ")
    return groups.agg(
        tokens=("loss_a", "size"), loss_a=("loss_a", "mean"), loss_b=("loss_b", "mean")
    ).reset_index()
