"""Measures tables: those of forward statistics share one pass over the text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.tables import (
    benefit,
    changed_layers,
    contribution,
    expert_weights,
    folding,
    norm_regression,
    similarities,
    weight_quantiles,
)
from lm_eval_bh.routing.tables.listening import Hear, listen
from lm_eval_bh.routing.tables.measurement import TABLES, Array, hearing_experts

KINDS = (
    *(benefit, changed_layers, contribution, expert_weights),
    *(folding, norm_regression, similarities, weight_quantiles),
)


def measure(
    names: Iterable[str],
    model: nn.Module,
    routers: Sequence[nn.Module],
    batches: Sequence[Tensor],
    progress: bool = True,
    hear: Hear | None = None,
    slots: int = 1,
) -> dict[str, Array]:
    """Return tables by name, each float64 ``[layers, ...]``.

    Parameters
    ----------
    names : iterable of str
        Keys of :data:`~lm_eval_bh.routing.tables.measurement.TABLES`.
    model, routers, batches, progress, slots
        As in :func:`~lm_eval_bh.routing.tables.listening.listen`.
    hear : callable, optional
        A further listener of the shared pass.

    Raises
    ------
    ModelError, DataError
        If the model or the text is unsuitable.
    """
    made = [TABLES[name](model, routers) for name in names]
    for each in made:
        each.run(batches, progress)
    ears = [each.hear for each in made if each.listens == "routers"] + ([hear] if hear else [])

    def hear_all(layer: int, said: RouterOutput) -> None:
        for ear in ears:
            ear(layer, said)

    inner = [each for each in made if each.listens == "experts"]
    if ears or inner:
        with hearing_experts(model, routers, inner):
            listen(model, routers, batches, hear_all, progress, slots)
    return {each.name: each.result() for each in made}


def predictor_batches(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the first batches, as many as the regression of norms uses."""
    seen = itertools.accumulate(batch.numel() for batch in batches)
    return batches[: 1 + sum(tokens < norm_regression.TOKENS for tokens in seen)]
