"""Finds the null model for a router: ``kde=auto``, a path, or a NullModel."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lm_eval_bh.errors import BHError, ModelError, NullModelError
from lm_eval_bh.resources import cache_folder, shipped
from lm_eval_bh.routing.nulls.null_model import NullModel, router_fingerprint
from lm_eval_bh.routing.routers import Router, transformers_model

logger = logging.getLogger(__name__)


def is_auto(kde: str | Path | NullModel) -> bool:
    """Return whether a null model shall be looked for, and else calibrated."""
    return not isinstance(kde, NullModel) and str(kde) == "auto"


def resolve_null(
    kde: str | Path | NullModel,
    model: nn.Module,
    routers: Sequence[Router],
    tokenizer: Any = None,
    *,
    statistic: str = "logit",
    null: str | None = "pooled",
    trim: int | None = None,
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
    statistic, null, trim
        What the null model has to be of; "auto" finds or calibrates one that is, and takes a trim
        of None for 0. A null of None may be either, where only the output norms are wanted.

    Raises
    ------
    NullModelError
        If the file is missing, damaged, belongs to another router, or is of something else.
    """
    name = transformers_model(model).name_or_path or type(model).__name__
    fingerprint = router_fingerprint(router.weight for router in routers)
    if is_auto(kde):
        found = _find(fingerprint, statistic, null, trim or 0)
        kind = statistic, null or "pooled", trim or 0
        found = found or _calibrate(model, routers, tokenizer, name, fingerprint, *kind)
    elif isinstance(kde, NullModel):
        found = kde
    elif not Path(kde).exists():
        raise NullModelError(
            f"The null model {str(kde)!r} does not exist: give a file, or kde=auto."
        )
    else:
        found = NullModel.from_pickles(kde) if Path(kde).is_dir() else NullModel.load(kde)
    found.check(fingerprint, len(routers), routers[0].num_experts, name)
    if fault := found.mismatch(statistic, null, trim):
        raise NullModelError(
            f"The null model {'that was given' if isinstance(kde, NullModel) else str(kde)} "
            f"{fault}: use kde=auto, or make one with lm-eval-bh calibrate."
        )
    return found


def _find(fingerprint: str, statistic: str, null: str | None, trim: int) -> NullModel | None:
    for path in _candidates():
        try:
            found = NullModel.load(path)
        except NullModelError as error:
            logger.warning("A null model was passed over: %s", error)
            continue
        if found.header.fingerprint == fingerprint:
            if fault := found.mismatch(statistic, null, trim):
                logger.debug("The null model %s %s", path, fault)
                continue
            logger.info("Null model: %s", path)
            return found
    return None


def _candidates() -> Iterator[Path]:
    yield from sorted(shipped("kde_models").glob("*.safetensors"))
    yield from sorted(cached_null("").parent.glob("*.safetensors"))


def cached_null(
    fingerprint: str, statistic: str = "logit", null: str = "pooled", trim: int = 0
) -> Path:
    """Return where the user's cache keeps the null model of a router, for a statistic."""
    name = fingerprint[:16]
    if (statistic, null, trim) != ("logit", "pooled", 0):
        name += f"-{statistic}-{null}-trim{trim}"
    return cache_folder() / "null" / f"{name}.safetensors"


def _calibrate(
    model: nn.Module,
    routers: Sequence[Router],
    tokenizer: Any,
    name: str,
    fingerprint: str,
    statistic: str,
    null: str,
    trim: int,
) -> NullModel:
    from lm_eval_bh.routing.nulls.calibration import (
        WIKITEXT,
        calibrate_and_check,
        wikitext_train_texts,
    )

    if tokenizer is None:
        tokenizer = tokenizer_of(model)
    try:
        texts = wikitext_train_texts()
    except BHError as error:
        raise NullModelError(
            f"No null model is known for the routers of {name}, and none can be made now: {error}"
        ) from error
    path = cached_null(fingerprint, statistic, null, trim)
    logger.warning(
        "No null model (statistic=%s, null=%s, trim=%d) is known for the routers of %s: "
        "calibrating one on WikiText, kept as %s",
        statistic,
        null,
        trim,
        name,
        path,
    )
    made, _ = calibrate_and_check(
        model,
        tokenizer,
        [r.module for r in routers],
        texts,
        model_name=name,
        revision=None,
        text_name=WIKITEXT,
        trim=trim,
        statistic=statistic,
        null=null,
        experts=routers[0].num_experts,
    )
    made.save(path)
    return made


def tokenizer_of(model: nn.Module) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises
    ------
    ModelError
        If there is none.
    """
    from transformers import AutoTokenizer

    name = transformers_model(model).name_or_path or type(model).__name__
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No tokenizer was found for {name!r}, so it cannot be calibrated: "
            "give kde= a null model."
        ) from error
