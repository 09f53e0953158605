"""Finds the null model for a router: ``null_model=auto``, a path, or a NullModel."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_eval_bh.errors import BHError, ModelError, NullModelError
from lm_eval_bh.files import as_path, unwritable
from lm_eval_bh.resources import cache_folder, shipped
from lm_eval_bh.routing.routers import Router, transformers_model
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.null_kind import LOGITS_OF_A_LAYER, NullKind
from lm_eval_bh.routing.tables.null_match import check_routers, mismatch
from lm_eval_bh.routing.tables.null_model import NullModel

logger = logging.getLogger(__name__)


def is_auto(null_model: str | Path | NullModel) -> bool:
    """Return whether to look for a null model, and to calibrate one if none is found."""
    return not isinstance(null_model, NullModel) and str(null_model) == "auto"


def resolve_null(
    null_model: str | Path | NullModel,
    model: nn.Module,
    routers: Sequence[Router],
    tokenizer: Any = None,
    kind: NullKind = LOGITS_OF_A_LAYER,
) -> NullModel:
    """Return the null model for a model's routers.

    Parameters
    ----------
    null_model : "auto", path or NullModel
        "auto" looks for the routers' fingerprint among the shipped null models and in the user's
        cache, and otherwise calibrates one on WikiText train text and caches it. A path may be a
        null model file or a folder of the earlier prototype's pickles.
    model, routers, tokenizer
        The model, its routers, and what "auto" may need to calibrate; without a tokenizer, the
        model's own is loaded.
    kind : NullKind
        The required kind; "auto" finds or calibrates one of it, and takes a trim of None as 0. A
        scope of None accepts any, if only the output norms are needed.

    Raises
    ------
    NullModelError
        If the file is missing, damaged, belongs to another router, or is of another kind.
    """
    name = transformers_model(model).name_or_path or type(model).__name__
    fingerprint = router_fingerprint(router.weight for router in routers)
    if is_auto(null_model):
        kind = replace(kind, trim=kind.trim or 0)
        known = known_null(fingerprint, kind)
        if known is not None:
            found = known[1]
        else:
            found = _calibrate(model, routers, tokenizer, name, fingerprint, kind.made())
    elif isinstance(null_model, NullModel):
        found = null_model
    elif not as_path(null_model).exists():
        raise NullModelError(
            f"The null model {str(null_model)!r} does not exist: use a file, or null_model=auto."
        )
    elif Path(null_model).is_dir():
        found = NullModel.from_pickles(null_model)
    else:
        found = NullModel.load(null_model)
    check_routers(
        found.header, fingerprint, len(routers), routers[0].num_experts, name, rounded(routers)
    )
    if fault := mismatch(found.header, kind):
        given = "that was given" if isinstance(null_model, NullModel) else str(null_model)
        raise NullModelError(
            f"The null model {given} {fault}: "
            "use null_model=auto, or make one with lm-eval-bh calibrate."
        )
    return found


def rounded(routers: Sequence[Router]) -> str:
    """Return advice for a differing fingerprint: float16 changes the smallest weights."""
    if any(router.weight.dtype == torch.float16 for router in routers):
        return (
            "; or load the model with dtype=bfloat16 or float32, as float16 rounds the router "
            "weights from which the fingerprint is computed"
        )
    return ""


def known_null(fingerprint: str, kind: NullKind) -> tuple[Path, NullModel] | None:
    """Return the shipped or cached null model of a kind for some routers, and its file."""
    for path in _candidates():
        try:
            found = NullModel.load(path)
        except NullModelError as error:
            logger.warning("A null model was skipped: %s", error)
            continue
        if found.header.fingerprint == fingerprint:
            if fault := mismatch(found.header, kind):
                logger.debug("The null model %s %s", path, fault)
                continue
            logger.info("Null model: %s", path)
            return path, found
    return None


def _candidates() -> Iterator[Path]:
    yield from sorted(shipped("kde_models").glob("*.safetensors"))
    yield from sorted(cached_null("").parent.glob("*.safetensors"))


def cached_null(fingerprint: str, kind: NullKind = LOGITS_OF_A_LAYER) -> Path:
    """Return the path of a router's null model of a kind in the user's cache."""
    return cache_folder() / "null" / f"{fingerprint[:16]}{kind.suffix}.safetensors"


def _calibrate(
    model: nn.Module,
    routers: Sequence[Router],
    tokenizer: Any,
    name: str,
    fingerprint: str,
    kind: NullKind,
) -> NullModel:
    from lm_eval_bh.routing.tables.calibration import (
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
            f"No null model is known for the routers of {name}, and none can be made now: "
            f"{str(error).removesuffix('.')}{rounded(routers)}."
        ) from error
    path = cached_null(fingerprint, kind)
    fault = unwritable(path.parent)
    kept = f"kept as {path}"
    if fault is not None:  # the cache is optional
        kept = (
            f"used now, but not kept ({fault}): set XDG_CACHE_HOME to a folder that can be written"
        )
    logger.warning(
        "No null model (%s) is known for the routers of %s: calibrating one on WikiText, %s",
        kind,
        name,
        kept,
    )
    made, _ = calibrate_and_check(
        model,
        tokenizer,
        [r.module for r in routers],
        texts,
        model_name=name,
        revision=None,
        text_name=WIKITEXT,
        kind=kind,
        experts=routers[0].num_experts,
    )
    if fault is None:
        made.save(path)
    return made


def tokenizer_of(model: nn.Module) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises
    ------
    ModelError
        If there is no tokenizer.
    """
    from transformers import AutoTokenizer

    name = transformers_model(model).name_or_path or type(model).__name__
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"No tokenizer was found for {name!r}, so it cannot be calibrated: "
            "use null_model= with a null model."
        ) from error
