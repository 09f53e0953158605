"""Fits null models to a model's router logits on text, and checks them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_bh.errors import ModelError, NullModelError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.routers import Router, find_routers
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.fitting import check_trim, unselected
from lm_eval_bh.routing.tables.kde import check_kernel
from lm_eval_bh.routing.tables.layer_tables import LayerTables
from lm_eval_bh.routing.tables.listening import collect_router_logits, listen
from lm_eval_bh.routing.tables.measure import measure, predictor_batches
from lm_eval_bh.routing.tables.null_health import LayerHealth, layer_health, with_health
from lm_eval_bh.routing.tables.null_kind import LOGITS_OF_A_LAYER, NullKind
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.routing.tables.texts import WIKITEXT, text_batches, wikitext_train_texts

__all__ = [
    "WIKITEXT",
    "calibrate",
    "calibrate_and_check",
    "collect_router_logits",
    "listen",
    "text_batches",
    "wikitext_train_texts",
]


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    routers: Sequence[nn.Module],
    texts: Iterable[str],
    *,
    model_name: str,
    revision: str | None,
    text_name: str,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    kind: NullKind = LOGITS_OF_A_LAYER,
    kernel: str = "gaussian",
    bandwidth: str | float = "scott",
    experts: int | None = None,
    progress: bool = True,
) -> NullModel:
    """Fit a null model to a model's router logits on text.

    Parameters
    ----------
    model, routers, progress
        As in :func:`collect_router_logits`.
    tokenizer, texts, tokens, length, batch
        As in :func:`text_batches`.
    model_name, revision, text_name : str
        Names of model and text for the header.
    kind : NullKind
        The kind of null distribution, and further tables to measure. One forward pass serves them
        all, except tables that need gradients or changed models, which take their own passes.
    kernel, bandwidth
        As in :meth:`NullModel.fit`.
    experts : int, optional
        The expected number of experts of the routers; checked if given.

    Raises
    ------
    ParameterError, DataError, ModelError, NullModelError
        If a parameter, the text, the routers, or their logits are unsuitable.
    """
    check_kernel(kernel)  # the run takes minutes, so check first
    kind = kind.made()
    if experts is not None:
        check_trim(kind.trim or 0, experts)
    header = {
        "model": model_name,
        "revision": revision,
        "text": text_name,
        "fingerprint": router_fingerprint(map(_weight, routers)),
    }
    batches = text_batches(tokenizer, texts, tokens=tokens, length=length, batch=batch)
    row = STATISTICS[kind.statistic]
    factors, wanted, scored = None, [*kind.tables, row.table], kind
    if row.predicts:  # scores need it for each token, so it is measured first
        wanted.remove(row.table)
        few = predictor_batches(batches)
        factors = measure([row.table], model, routers, few, progress)[row.table]
    elif row.table:  # factors are added after the pass
        scored = replace(kind, statistic="weight")
    heard: list[list[Tensor]] = [[] for _ in routers]
    own = find_routers(model)
    top_k = own[0].top_k if kind.null_from == "unselected" else None
    scorers = _scorers(scored, own, factors)

    def hear(layer: int, said: RouterOutput) -> None:
        values = scorers[layer].score(said)
        heard[layer].append(unselected(said.logits, values, top_k, said.indices).cpu())

    names = [name for name in wanted if name]
    measured = measure(names, model, routers, batches, progress, hear, _slots(kind, own))
    found = heard[0][0].shape[1]
    if experts is not None and experts != found:
        raise NullModelError(
            f"The routers of {model_name} give {found} logits per token, not {experts}; "
            "check the list of routers."
        )
    scores = [torch.cat(parts) for parts in heard]
    if row.table in measured:
        factors = measured[row.table]
        logs = [torch.from_numpy(np.log(own)) for own in factors]
        scores = [each + log.to(each) for each, log in zip(scores, logs, strict=True)]
    return NullModel.from_scores(
        scores,
        kind,
        factors,
        {name: measured[name] for name in kind.tables},
        kernel=kernel,
        bandwidth=bandwidth,
        header=header,
    )


def _scorers(
    kind: NullKind, routers: Sequence[Router], factors: NDArray[np.float64] | None
) -> list[Method]:
    """Return for each layer a method with the null model's scores."""
    config = RoutingConfig(rule="min_w" if kind.statistic != "logit" else "topk", **kind.scored)
    found = []
    for layer, router in enumerate(routers):
        method = config.method(config.settings(layer, router.num_experts, router.softmax))
        own = None if factors is None else factors[layer]
        method.fit(LayerTables(np.empty(0), np.empty(0), own, {}), 1.0)
        found.append(method)
    return found


def _slots(kind: NullKind, routers: Sequence[Router]) -> int:
    """Return how many experts routers have to rank so that all have a score."""
    plain = kind.statistic == "logit" or all(router.softmax for router in routers)
    return 1 if plain else routers[0].num_experts


def calibrate_and_check(
    model: nn.Module,
    tokenizer: Any,
    routers: Sequence[nn.Module],
    texts: Sequence[str],
    *,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    progress: bool = True,
    **others: Any,
) -> tuple[NullModel, list[LayerHealth]]:
    """Fit a null model, and check it on the following text, an eighth as long.

    Parameters
    ----------
    model, tokenizer, routers, texts, tokens, length, batch, progress, **others
        As in :func:`calibrate`.

    Returns
    -------
    (NullModel, list of LayerHealth)
        The null model with its health in its header; without it, and an empty list, if the text
        has no window of ``length`` tokens left after those used for the fit.

    Raises
    ------
    ParameterError, DataError, ModelError, NullModelError
        As :func:`calibrate`.
    """
    null = calibrate(
        model,
        tokenizer,
        routers,
        texts,
        tokens=tokens,
        length=length,
        batch=batch,
        progress=progress,
        **others,
    )
    fitted_on = -(-tokens // length)
    wanted = fitted_on * length + max(length, tokens // 8)
    windows = text_batches(tokenizer, texts, tokens=wanted, length=length, batch=1)
    held_out = [window for window in windows[fitted_on:] if window.shape[1] == length]
    if not held_out:
        return null, []
    batches = torch.cat(held_out).split(batch)
    p_values: list[list[Tensor]] = [[] for _ in routers]

    own = find_routers(model)
    kind = null.header.kind
    top_k = own[0].top_k if kind.null_from == "unselected" else None
    scorers = _scorers(kind, own, null.factors)

    def hear(layer: int, said: RouterOutput) -> None:
        found = null.p_values_of(layer, scorers[layer].score(said))
        p_values[layer].append(unselected(said.logits, found, top_k, said.indices).cpu())

    listen(model, routers, batches, hear, progress, _slots(kind, own))
    report = [
        layer_health(layer, torch.cat(parts), null.header.null_scope)
        for layer, parts in enumerate(p_values)
    ]
    return with_health(null, report), report


def _weight(router: nn.Module) -> Tensor:
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"{type(router).__name__} has no weight; give the routers themselves.")
    return weight
