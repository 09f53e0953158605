"""The state of one forward pass: which of its tokens are real, and what its routers have noted.

It belongs to the pass: hooks of the base model begin and end it, and while it lasts a context
variable, of which every thread has its own, says which it is. Activation checkpointing runs layers
again when their pass has long ended; :class:`OwnPass` has kept it for them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ParameterError, RoutingError
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.routing.patching.patch import Patch
from lm_eval_bh.routing.patching.query_mask import query_mask
from lm_eval_bh.routing.releases import given_cache

CHECKPOINTING = "_gradient_checkpointing_func"  # where transformers' layers keep it

_current: ContextVar[ForwardPass | None] = ContextVar("bh_forward_pass", default=None)
_told: ContextVar[Mapping[int, Tensor]] = ContextVar("bh_real_tokens")
_counting = threading.Lock()


class ForwardPass:
    """One forward pass of a patched model.

    Attributes
    ----------
    patch : Patch
        What was put into the model.
    real : Tensor or None
        bool ``[tokens]``, False for padding; None where all tokens are real, or nobody can tell.
    recomputed : bool
        Whether activation checkpointing runs it again, so that nothing of it counts.
    alone : bool
        Whether it is of one router only, which was called outside of a pass of the model.
    outer : ForwardPass or None
        The pass, of another model, that this one runs within.
    """

    def __init__(
        self, patch: Patch, real: Tensor | None, *, recomputed: bool = False, alone: bool = False
    ) -> None:
        self.patch = patch
        self.real = real
        self.recomputed = recomputed
        self.alone = alone
        self.outer: ForwardPass | None = None
        self.selections: list[tuple[int, Picked]] = []
        self._sums: list[tuple[int, Tensor]] = []
        self._padding: dict[torch.device, Tensor] = {}

    def note(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Keep what a router said, until the end of the pass.

        Of its logits their sum, which is not finite if one of them is not: asking each layer at
        once would make the host wait for a device.
        """
        self._sums.append((layer, router_logits.detach().sum(dtype=torch.float32)))
        if self.patch.counters is not None:
            self.selections.append((layer, selection))

    def padding(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return which tokens are padding, bool ``[tokens, 1]`` on a device; None if none are."""
        if self.real is None:
            return None
        if len(self.real) != tokens:  # virtual tokens, say, that the model adds on its own
            self.patch.tell_once("its routers were given other tokens than the model")
            return None
        found = self._padding.get(device)
        if found is None:
            found = self._padding[device] = (~self.real).unsqueeze(-1).to(device)
        return found

    def end(self) -> None:
        """Count what was selected, and ask all layers at once whether their logits were finite.

        Raises
        ------
        RoutingError
            If they were not.
        """
        sums, selections = self._sums, self.selections
        self._sums, self.selections = [], []
        broken = []
        if sums:
            device = sums[0][1].device
            finite = torch.stack([each.to(device) for _, each in sums]).isfinite().tolist()
            broken = sorted(
                {layer for (layer, _), fine in zip(sums, finite, strict=True) if not fine}
            )
        if broken:
            names = ", ".join(map(str, broken))
            raise RoutingError(
                f"The router logits of layer {names} hold NaN or infinite values: "
                "check the model's weights and its dtype."
            )
        if self.patch.counters is not None and selections:
            with _counting:
                self.patch.counters.add(selections, self.real)


def current_pass(patch: Patch) -> ForwardPass:
    """Return the pass that a router of this model runs in.

    Raises
    ------
    RoutingError
        If it is run again in a backward pass by a checkpointing that is not transformers' own, so
        that nobody knows which tokens are padding.
    """
    found = _current.get()
    if found is not None and found.patch is patch:
        return found
    recomputed = _in_backward()
    if recomputed and patch.padded:
        raise RoutingError(
            "A layer is run again in the backward pass by a checkpointing that is not "
            "transformers' own, so which tokens are padding is not known: use the "
            "activation checkpointing of the model itself."
        )
    return ForwardPass(patch, None, recomputed=recomputed, alone=True)


@contextmanager
def real_tokens(base: nn.Module, mask: Tensor) -> Iterator[None]:
    """Say which tokens of the passes of a base model inside are real, bool ``[rows, length]``."""
    token = _told.set({**_told.get({}), id(base): mask})
    try:
        yield
    finally:
        _told.reset(token)


class Begin:
    """A forward pre-hook of the base model: begins a pass."""

    def __init__(self, patch: Patch, base: nn.Module) -> None:
        self.patch = patch
        self._names = list(inspect.signature(type(base).forward).parameters)[1:]
        self._layers = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn from the caller, or else from the attention mask, which tokens are padding."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        begun = ForwardPass(self.patch, self._real(module, given))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            begun.recomputed = _in_backward()  # the whole model is checkpointed
            self._wrap_checkpointing()
        outer = _current.get()
        if outer is not None and outer.patch is self.patch:  # it died before its end
            outer = outer.outer
        begun.outer = outer
        _current.set(begun)

    def _wrap_checkpointing(self) -> None:
        for layer in self._layers:
            function: Any = getattr(layer, CHECKPOINTING, None)
            if layer.gradient_checkpointing and not isinstance(function, OwnPass):
                setattr(layer, CHECKPOINTING, OwnPass(function, self.patch))

    def _real(self, module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            return None
        rows, length = tokens.shape[:2]
        told = _told.get({}).get(id(module))
        if told is not None and told.shape != tokens.shape[:2]:
            raise ParameterError(
                f"real_tokens() was told of {tuple(told.shape)} tokens, but the forward pass has "
                f"{(rows, length)}: give a mask [rows, length] of the same tokens."
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

    def _look_for_padding(self, module: nn.Module, tokens: Tensor) -> None:
        """Look, in the first pass without a mask, whether its rows look as if they were padded."""
        if self.patch.looked or len(tokens) == 1 or tokens.is_floating_point():
            return
        self.patch.looked = True
        pad = getattr(getattr(module, "config", None), "pad_token_id", None)
        if pad is not None and bool((tokens[:, [0, -1]] == pad).any()):
            self.patch.tell_once("its rows begin or end with padding tokens, and it has no mask")


class End:
    """A forward hook of the base model, called whatever happens: ends the pass."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the outer pass back; count, and check the logits, unless the pass has failed."""
        ended = _current.get()
        if ended is None or ended.patch is not self.patch:
            return
        _current.set(ended.outer)
        if output is not None:
            ended.end()


class OwnPass:
    """Wraps a checkpointing function: what is run again meets the pass that it first ran in.

    Parameters
    ----------
    function : callable
        Takes what to run, and its arguments; as ``torch.utils.checkpoint.checkpoint``.
    patch : Patch
        What was put into the model.
    """

    def __init__(self, function: Callable[..., Any], patch: Patch) -> None:
        self.function = function
        self.patch = patch

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint a layer."""
        return self.function(_Rerun(run, current_pass(self.patch)), *args)


class _Rerun:
    def __init__(self, run: Callable[..., Any], own: ForwardPass) -> None:
        self.run = run
        self.own = own
        self.ran = False

    def __call__(self, *args: Any) -> Any:
        if not self.ran:
            self.ran = True
            return self.run(*args)
        patch = self.own.patch
        if not patch.alive:
            if patch.mode == "analyze":
                return self.run(*args)
            raise RoutingError(
                "The backward pass has to run layers again, and the model is no longer routed as "
                "in its forward pass: call backward() before the model is unpatched or "
                "configured anew."
            )
        token = _current.set(ForwardPass(patch, self.own.real, recomputed=True))
        try:
            return self.run(*args)
        finally:
            _current.reset(token)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
