"""Adds the hooks of a patch to a model, and removes this package's hooks from one."""

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

# Attributes of a module's hooks, and the arguments they were registered with.
KINDS = ("_forward_pre_hooks", "_forward_hooks")
KEPT = (
    *KINDS,
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def put_in(model: nn.Module, patch: Patch, hooks: Iterable[tuple[Router, RouterHook]]) -> None:
    """Add the hooks of a patch to a model.

    A router with an adjustable number of experts is told to select as many as the method chooses
    from: the router's own weights then serve, in its own order and with its own rescaling.

    Parameters
    ----------
    model : nn.Module
        A transformers model, possibly wrapped.
    patch : Patch
        The state that the hooks share.
    hooks : iterable of (Router, RouterHook)
        One hook per router, which the router's inactive copies get too.
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
    """Remove every hook of :class:`BHRoutingIntegration` from a model, whatever added it.

    The model may be a copy of a patched model, or one that was saved while patched.

    Parameters
    ----------
    model : nn.Module
        Any model; an unpatched one stays unchanged.
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
    """Raise :class:`ModelError` if a model has hooks of any integration."""
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
