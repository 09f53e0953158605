"""Puts the hooks of one patching into a model, and takes out whatever of ours is in one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.patching.affine import AffineHook
from lm_eval_bh.routing.patching.begin_and_end import CHECKPOINTING, Begin, End
from lm_eval_bh.routing.patching.hook import RouterHook
from lm_eval_bh.routing.patching.patch import Patch
from lm_eval_bh.routing.patching.rerun import OwnPass
from lm_eval_bh.routing.routers import OWN_TOP_K, Router, transformers_model

# Where a module keeps its hooks, and what they were registered with.
KINDS = ("_forward_pre_hooks", "_forward_hooks")
KEPT = (
    *KINDS,
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def put_in(model: nn.Module, patch: Patch, hooks: Iterable[tuple[Router, RouterHook]]) -> None:
    """Put the hooks of one patching into a model.

    A router that selects as many experts as it is told is told to select as many as the method
    chooses from: then its own weights serve, in its own order and rescaled its own way.

    Parameters
    ----------
    model : nn.Module
        A transformers model, possibly wrapped.
    patch : Patch
        What the hooks share.
    hooks : iterable of (Router, RouterHook)
        A hook for every router; its inactive copies get it too.
    """
    base = transformers_model(model).base_model
    assert isinstance(base, nn.Module)
    base.register_forward_pre_hook(Begin(patch, base), with_kwargs=True)
    base.register_forward_hook(End(patch), always_call=True)
    for router, hook in hooks:
        asked = hook.asks(router)
        for module in (router.module, *router.copies):
            module.register_forward_hook(hook, prepend=True)
            if patch.mode == "patch" and router.behaviour.obeys and asked != router.top_k:
                setattr(module, OWN_TOP_K, router.top_k)
                module.top_k = asked  # type: ignore[assignment]


def unpatch(model: nn.Module) -> None:
    """Take every hook of :class:`BHRoutingIntegration` out of a model, whoever put it there.

    The model can be a copy of one that was patched, or one that was saved while it was.

    Parameters
    ----------
    model : nn.Module
        Any model; one that is not patched is left as it is.
    """
    patches = []
    for module in model.modules():
        for key, hook in _ours(module):
            hook.patch.alive = False
            patches.append(hook.patch)
            for kind in KEPT:
                getattr(module, kind).pop(key, None)
        function = getattr(module, CHECKPOINTING, None)
        if isinstance(function, OwnPass):
            setattr(module, CHECKPOINTING, function.function)
        top_k = getattr(module, OWN_TOP_K, None)
        if top_k is not None:
            module.top_k = top_k
            delattr(module, OWN_TOP_K)
    for patch in patches:
        if patch.switch is not None:
            patch.switch.restore(model)
            patch.switch = None


def refuse_patched(model: nn.Module) -> None:
    """Raise :class:`ModelError` if a model carries hooks of this or another integration."""
    for name, module in model.named_modules():
        if any(isinstance(hook, RouterHook) for hook in module._forward_hooks.values()):
            raise ModelError(
                f"The router {name} is patched already: call unpatch_model() of its integration, "
                "or lm_eval_bh.unpatch(model), first."
            )


def _ours(module: nn.Module) -> list[tuple[int, Any]]:
    return [
        (key, hook)
        for kind in KINDS
        for key, hook in getattr(module, kind).items()
        if isinstance(hook, (AffineHook, Begin, End, RouterHook))
    ]
