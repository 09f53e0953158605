"""Calibrates or previews a model given by name, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh.errors import ModelError, ParameterError
from lm_eval_bh.policies.paragraphs import read_paragraphs
from lm_eval_bh.policies.preview import GridRow, analyze_grid
from lm_eval_bh.resources import TINY_OLMOE
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.placement import placement
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.step_target import whole_steps
from lm_eval_bh.routing.tables.calibration import calibrate_and_check
from lm_eval_bh.routing.tables.find import cached_null, resolve_null
from lm_eval_bh.routing.tables.null_health import LayerHealth
from lm_eval_bh.routing.tables.null_kind import LOGITS_OF_A_LAYER, NullKind
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.routing.tables.texts import (
    WIKITEXT,
    text_batches,
    wikitext_texts,
    wikitext_train_texts,
)
from lm_eval_bh.threads import use_threads_that_pay


def calibrate_pretrained(
    pretrained: str,
    *,
    name: str,
    text: Path | None = None,
    output: Path | None = None,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    kind: NullKind = LOGITS_OF_A_LAYER,
    kernel: str = "gaussian",
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[NullModel, list[LayerHealth], Path]:
    """Load a model, fit a null model to its routers, check it on held-out text, save it.

    Parameters
    ----------
    pretrained, name : str
        Hub name or folder of the model, and its name in the header.
    text : Path or None
        A text file whose paragraphs are documents; None takes WikiText-2's training text.
    output : Path or None
        File to write; None takes the cache that ``null_model=auto`` reads.
    tokens, length, batch, kind, kernel
        See ``calibrate_and_check``.
    dtype, device : str
        Dtype and device of the model; None takes CUDA if available.

    Returns
    -------
    (NullModel, list of LayerHealth, Path)
        The null model, its health on the held-out text (empty if no text is left), and the path of
        its file.

    Raises
    ------
    ParameterError, DataError, ModelError, NullModelError
        If an argument, the text, the model or its logits are unsuitable.
    """
    texts = wikitext_train_texts() if text is None else read_paragraphs(text)
    model, tokenizer = load_pretrained(pretrained, name, dtype, device, length)
    routers = find_routers(model)
    modules = [router.module for router in routers]
    null, report = calibrate_and_check(
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
        kind=kind,
        kernel=kernel,
        experts=routers[0].num_experts,
    )
    path = output or cached_null(null.header.fingerprint or "", kind)
    null.save(path)
    return null, report, path


def analyze_pretrained(
    pretrained: str,
    configs: Sequence[RoutingConfig],
    *,
    name: str,
    null_model: str = "auto",
    text: Path | None = None,
    tokens: int = 65536,
    length: int = 512,
    batch: int = 8,
    dtype: str = "auto",
    device: str | None = None,
) -> tuple[list[GridRow], int]:
    """Load a model, run it once over text, and preview every configuration.

    Parameters
    ----------
    pretrained, name, dtype, device
        As in :func:`calibrate_pretrained`.
    configs : sequence of RoutingConfig
        The grid.
    null_model : str
        The null model: a path, or "auto".
    text : Path or None
        A text file whose paragraphs are documents; None takes WikiText-2's test text.
    tokens, length, batch : int
        Number of tokens, window length, and windows per batch.

    Returns
    -------
    (list of GridRow, int)
        In the order of ``configs``; and the number of tokens.

    Raises
    ------
    ParameterError, DataError, ModelError, NullModelError
        If an argument, the text, the model or the null model is unsuitable.
    """
    texts = wikitext_texts("test") if text is None else read_paragraphs(text)
    model, tokenizer = load_pretrained(pretrained, name, dtype, device, length)
    routers = find_routers(model)
    kinds = {config.null_kind for config in configs if config.needs_null}
    nulls = {  # tests first: other rules take any null model with output norms
        kind: resolve_null(null_model, model, routers, tokenizer, kind)
        for kind in sorted(kinds, key=lambda kind: kind.null_scope is None)
    }
    batches = text_batches(tokenizer, texts, tokens=tokens, length=length, batch=batch)
    if configs[0].decode_batch is not None:  # as all of the grid
        batches = whole_steps(batches, configs[0].decode_batch, length)
    rows = analyze_grid(model, routers, batches, configs, nulls)
    return rows, sum(ids.numel() for ids in batches)


def load_pretrained(
    pretrained: str, name: str, dtype: str, device: str | None, length: int
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer.

    Raises
    ------
    ParameterError, ModelError
        If the device, dtype or window length is impossible, or the model cannot be loaded.
    """
    place = placement(device, dtype)
    try:
        config = AutoConfig.from_pretrained(pretrained)
        _check_length(length, config)
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(pretrained, dtype=place["dtype"])
    except ParameterError:
        raise
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ModelError(
            f"The model {name!r} could not be loaded ({reason}); check its name and the network, "
            f"or use {TINY_OLMOE}, which needs no download."
        ) from error
    model = model.to(place["device"])
    use_threads_that_pay(model)
    return model, tokenizer


def _check_length(length: int, config: Any) -> None:
    """Raise :class:`ParameterError` if windows are longer than the model's context."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ParameterError(
            f"length={length} is more than the model's context of {longest} tokens: "
            f"use at most {longest}."
        )
