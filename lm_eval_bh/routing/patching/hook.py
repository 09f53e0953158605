"""The hook of one router, which replaces the router's selection by the rule's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.pick import pick
from lm_eval_bh.routing.methods.reading import plain
from lm_eval_bh.routing.patching.forward_pass import current_pass
from lm_eval_bh.routing.patching.patch import Patch
from lm_eval_bh.routing.router_reader import RouterReader
from lm_eval_bh.routing.routers import Router


class RouterHook:
    """A forward hook of one router: replaces its selection, or only observes it.

    It runs after the router and does not change what the router computes.
    """

    def __init__(self, patch: Patch, layer: int, router: Router, method: Method) -> None:
        self.patch = patch
        self.layer = layer
        self.method = method
        slots = self.asks(router)
        self._read = RouterReader(router, slots, in_order=not plain(method, slots))

    def asks(self, router: Router) -> int:
        """Return how many experts the router has to return."""
        return self.method.asks(router.top_k)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the router's output with the selection in it, or None to leave it as it is."""
        analyze, now = self.patch.mode == "analyze", current_pass(self.patch)
        # Counting leaves no trace in the graph, nor in what checkpointing recomputes.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not analyze):
            said = self._read(module, args, output)
            if self.patch.routes is not None:
                where = self.layer, now.places, said.logits.device
                said = said._replace(recorded=self.patch.routes.recorded(*where))
            if self.method.bounds.device != said.logits.device:
                self.method.to(said.logits.device)
            if self.method.joint:
                steps = now.steps(said.logits.device)
                if steps is not None and len(steps.of) == len(said.logits):
                    said = said._replace(step=steps.of)
            selection = pick(self.method, said)
        if not now.recomputed:
            now.note(self.layer, said.logits, selection)
            for observe in self.patch.observers:
                observe(self.layer, said.logits, selection)
            if now.alone:  # a layer called by itself: nothing else ends its pass
                now.end()
        if analyze:
            return None
        selected = selection.indices
        padding = now.padding(selected) if self.patch.skips_unused else None
        if padding is not None:
            selected = selected.masked_fill(padding, self.method.num_experts)
        return said.logits, selection.weights, selected
