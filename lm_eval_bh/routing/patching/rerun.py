"""Activation checkpointing: layers that run again use their original pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval_bh.errors import RoutingError
from lm_eval_bh.routing.patching.forward_pass import ForwardPass, current_pass, entering
from lm_eval_bh.routing.patching.patch import Patch


class OwnPass:
    """Wraps a checkpointing function: layers that run again use their original pass.

    Parameters
    ----------
    function : callable
        Takes a function and its arguments, like ``torch.utils.checkpoint.checkpoint``.
    patch : Patch
        The patch of the model.
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
        own = self.own
        again = ForwardPass(patch, own.real, own.shape, own.decoded, recomputed=True)
        again.places = own.places
        with entering(again):
            return self.run(*args)
