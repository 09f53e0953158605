"""Calibrates a model that is named rather than loaded: what ``lm-eval-bh calibrate`` does."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh.errors import DataError, ModelError, ParameterError
from lm_eval_bh.resources import TINY_OLMOE
from lm_eval_bh.routing.calibration import LayerHealth, calibrate, collect_router_logits, health
from lm_eval_bh.routing.null import NullModel
from lm_eval_bh.routing.resolution import cached_null
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.texts import WIKITEXT, text_batches, wikitext_train_texts


def calibrate_pretrained(
    pretrained: str,
    *,
    name: str,
    text: Path | None = None,
    output: Path | None = None,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    trim: int = 0,
    kernel: str = "gaussian",
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[NullModel, list[LayerHealth], Path]:
    """Load a model, fit a null model to its routers, check it on held-out text, and save it.

    Parameters
    ----------
    pretrained, name : str
        Hub name or folder of the model, and what the header calls it.
    text : Path or None
        A text file whose paragraphs are documents; None takes WikiText-2's training text.
    output : Path or None
        File to write; None takes the cache that ``kde=auto`` reads.
    tokens, length, batch, trim, kernel
        See :func:`~lm_eval_bh.routing.calibration.calibrate`. The text that follows, an eighth of
        ``tokens``, is held out for the check.
    dtype, device : str
        How the model is loaded; device None takes cuda where there is one.

    Returns
    -------
    (NullModel, list of LayerHealth, Path)
        The null model, its health on the held-out text, and where it was written.

    Raises
    ------
    ParameterError, DataError, ModelError, NullModelError
        If an argument, the text, the model or its logits cannot serve.
    """
    if not (dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype)):
        raise ParameterError(
            f"dtype={dtype!r} is no dtype of torch: give auto, float32, bfloat16 or float16."
        )
    texts = wikitext_train_texts() if text is None else _paragraphs(text)
    try:
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The model {name!r} could not be loaded ({str(error).splitlines()[0]}): "
            "check its name and the network, "
            f"or use {TINY_OLMOE}, which ships and needs none."
        ) from error
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    routers = find_routers(model)
    modules = [router.module for router in routers]
    null = calibrate(
        model,
        tokenizer,
        modules,
        texts,
        model_name=name,
        revision=getattr(model.config, "_commit_hash", None),
        text_name=WIKITEXT if text is None else text.name,
        tokens=tokens,
        length=length,
        batch=batch,
        trim=trim,
        kernel=kernel,
        experts=routers[0].num_experts,
    )
    batches = text_batches(
        tokenizer, texts, tokens=tokens + max(length, tokens // 8), length=length, batch=1
    )
    held_out = [window for window in batches[-(-tokens // length) :] if window.shape[1] == length]
    if not held_out:
        raise DataError(
            f"The text ends within the {tokens} tokens to fit on and leaves none to check on: "
            "lower --tokens."
        )
    report = health(null, collect_router_logits(model, modules, torch.cat(held_out).split(batch)))
    path = output or cached_null(null.header.fingerprint or "")
    null.save(path)
    return null, report, path


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The text {str(path)!r} cannot be read ({error}): give a UTF-8 text file."
        ) from error
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
