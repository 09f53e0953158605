"""The hooks of the base model, which begin and end a forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.patching.forward_pass import (
    ForwardPass,
    begin_pass,
    end_pass,
    in_backward,
    what_ends,
    what_was_told,
)
from lm_eval_bh.routing.patching.patch import Patch
from lm_eval_bh.routing.patching.query_mask import query_mask
from lm_eval_bh.routing.patching.rerun import OwnPass
from lm_eval_bh.routing.patching.routes import remember
from lm_eval_bh.routing.releases import given_cache, returned_cache

CHECKPOINTING = "_gradient_checkpointing_func"  # attribute of transformers' layers


class Begin:
    """A forward pre-hook of the base model: begins a pass."""

    def __init__(self, patch: Patch, base: nn.Module) -> None:
        self.patch = patch
        self._names = list(inspect.signature(type(base).forward).parameters)[1:]
        self._layers = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Find out which tokens are padding, from the caller or else from the attention mask."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        real = self._real(module, given)
        shape = _shape(given)
        begun = ForwardPass(self.patch, real, shape, self._decoded(module, given))
        if given.get("cache") is not None:  # of continuous batching
            begun.queries = given.get("cu_seq_lens_q")
        if shape == (1, 1) and begun.queries is None:
            self.patch.tell_alone()
        if self.patch.routes is not None:
            ids, cache = given.get("input_ids"), given_cache(given)
            begun.places, begun.paths = self.patch.routes.places(ids, begun.real, cache)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            begun.recomputed = in_backward()  # the whole model is checkpointed
            self._wrap_checkpointing()
        begin_pass(begun)

    def _wrap_checkpointing(self) -> None:
        for layer in self._layers:
            function: Any = getattr(layer, CHECKPOINTING, None)
            if layer.gradient_checkpointing and not isinstance(function, OwnPass):
                setattr(layer, CHECKPOINTING, OwnPass(function, self.patch))

    def _real(self, module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
        tokens = _tokens(kwargs)
        if tokens is None:
            return None
        rows, length = tokens.shape[:2]
        told, _ = what_was_told(module)
        if told is not None and told.shape != tokens.shape[:2]:
            raise ParameterError(
                f"real_tokens() was given a mask for {tuple(told.shape)} tokens, but the forward "
                f"pass has {(rows, length)}: give a mask [rows, length] of the same tokens."
            )
        mask = kwargs.get("attention_mask") if told is None else told
        if mask is None:
            self._look_for_padding(module, tokens)
            return None
        real = query_mask(mask, rows, length, given_cache(kwargs))
        if real is None:
            self.patch.tell_once("its attention mask has an unsupported format")
            return None
        self.patch.padded = True
        return real.reshape(-1).to(tokens.device)

    def _decoded(self, module: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
        """Return which tokens belong to a step; None if all do, or if steps are not needed."""
        tokens = _tokens(given)
        if tokens is None or not self.patch.has_steps:
            return None
        ends, (rows, length) = what_ends(), tokens.shape[:2]
        if length == 1:  # decoding; a row whose input is an end token has finished
            if ends is None or tokens.is_floating_point():
                return None
            return ~torch.isin(tokens.reshape(-1), ends.to(tokens.device))
        if not self.patch.decoded_only:
            return None
        _, told = what_was_told(module)
        return torch.zeros(rows * length, dtype=torch.bool) if told is None else told.reshape(-1)

    def _look_for_padding(self, module: nn.Module, tokens: Tensor) -> None:
        """Check in the first pass without a mask whether its rows look padded."""
        if self.patch.looked or len(tokens) == 1 or tokens.is_floating_point():
            return
        self.patch.looked = True
        pad = getattr(getattr(module, "config", None), "pad_token_id", None)
        if pad is not None and bool((tokens[:, [0, -1]] == pad).any()):
            self.patch.tell_once("its rows begin or end with padding tokens, and it has no mask")


class End:
    """A forward hook of the base model, called even after an error: ends the pass."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Restore the outer pass; count, and check logits, unless the pass has failed."""
        ended = end_pass(self.patch)
        if ended is None or output is None:
            return
        if ended.paths is not None and isinstance(output, Mapping):
            for cache in returned_cache(output).values():
                remember(cache, ended.paths)
        ended.end()


def _tokens(given: Mapping[str, Any]) -> Tensor | None:
    ids: Tensor | None = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def _shape(given: Mapping[str, Any]) -> tuple[int, int] | None:
    tokens = _tokens(given)
    return None if tokens is None else (tokens.shape[0], tokens.shape[1])
