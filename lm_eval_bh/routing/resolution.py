"""Finds the null model for a router: ``kde=auto``, a path, or a NullModel."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lm_eval_bh.errors import BHError, ModelError, NullModelError
from lm_eval_bh.resources import cache_folder, shipped
from lm_eval_bh.routing.null import NullModel, router_fingerprint
from lm_eval_bh.routing.routers import Router, transformers_model

logger = logging.getLogger(__name__)


def resolve_null(
    kde: str | Path | NullModel, model: nn.Module, routers: Sequence[Router], tokenizer: Any = None
) -> NullModel:
    """Return the null model that serves the model's routers.

    Parameters
    ----------
    kde : "auto", path or NullModel
        "auto" looks, by the routers' fingerprint, among the null models that ship and in the user's
        cache, and otherwise calibrates one on WikiText train text and caches it. A path may be a
        null model file or a folder of the earlier prototype's pickles.
    model, routers, tokenizer
        The model, its routers, and what "auto" may need to calibrate; without a tokenizer the one
        that belongs to the model is loaded.

    Raises
    ------
    NullModelError
        If the file is missing, damaged, or belongs to another router.
    """
    name = transformers_model(model).name_or_path or type(model).__name__
    fingerprint = router_fingerprint(router.weight for router in routers)
    if not isinstance(kde, NullModel) and str(kde) == "auto":
        null = _find(fingerprint) or _calibrate(model, routers, tokenizer, name, fingerprint)
    elif isinstance(kde, NullModel):
        null = kde
    elif not Path(kde).exists():
        raise NullModelError(
            f"The null model {str(kde)!r} does not exist: give a file, or kde=auto."
        )
    else:
        null = NullModel.from_pickles(kde) if Path(kde).is_dir() else NullModel.load(kde)
    null.check(fingerprint, len(routers), routers[0].num_experts, name)
    return null


def _find(fingerprint: str) -> NullModel | None:
    for path in _candidates():
        try:
            null = NullModel.load(path)
        except NullModelError as error:
            logger.warning("A null model was passed over: %s", error)
            continue
        if null.header.fingerprint == fingerprint:
            logger.info("Null model: %s", path)
            return null
    return None


def _candidates() -> Iterator[Path]:
    yield from sorted(shipped("kde_models").glob("*.safetensors"))
    yield from sorted(cached_null("").parent.glob("*.safetensors"))


def cached_null(fingerprint: str) -> Path:
    """Return where the user's cache keeps the null model of a router."""
    return cache_folder() / "null" / f"{fingerprint[:16]}.safetensors"


def _calibrate(
    model: nn.Module, routers: Sequence[Router], tokenizer: Any, name: str, fingerprint: str
) -> NullModel:
    from lm_eval_bh.routing.calibration import WIKITEXT, calibrate, wikitext_train_texts

    if tokenizer is None:
        tokenizer = _tokenizer(name)
    try:
        texts = wikitext_train_texts()
    except BHError as error:
        raise NullModelError(
            f"No null model is known for the routers of {name}, and none can be made now: {error}"
        ) from error
    path = cached_null(fingerprint)
    logger.warning(
        "No null model is known for the routers of %s: calibrating one on WikiText, kept as %s",
        name,
        path,
    )
    null = calibrate(
        model,
        tokenizer,
        [r.module for r in routers],
        texts,
        model_name=name,
        revision=None,
        text_name=WIKITEXT,
        experts=routers[0].num_experts,
    )
    null.save(path)
    return null


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No tokenizer was found for {name!r}, so it cannot be calibrated: "
            "give kde= a null model."
        ) from error
