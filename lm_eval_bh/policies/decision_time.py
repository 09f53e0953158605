"""Costs of a method besides experts: the time of a decision, and the bytes of its tables."""

from __future__ import annotations

import statistics
import time

import torch

from lm_eval_bh.policies.document_losses import Documents
from lm_eval_bh.routing.methods.pick import pick
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.tables.calibration import listen

REPEATS = 7


def decision_seconds(routing: BHRoutingIntegration, documents: Documents) -> float:
    """Return the seconds that a method takes to decide about one token in one layer.

    The median of several times over the longest window, with all tokens at once, as in prefill; for
    documents that are groups, over one group, with the tokens at one position as a step.

    Parameters
    ----------
    routing : BHRoutingIntegration
        The integration, not patched.
    documents : Documents
        Documents, of which the first window or group is used.
    """
    methods = {layer: routing.method(layer) for layer in routing.layers}
    heard: dict[int, RouterOutput] = {}

    def hear(layer: int, said: RouterOutput) -> None:
        heard[layer] = said

    rows = [ids[:-1] for _, ids in documents.batches[0]]
    rows = rows if documents.decode_batch else rows[:1]
    ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
    listen(
        routing.model,
        [router.module for router in routing.routers],
        [ids],
        hear,
        progress=False,
        slots=max(m.asks(routing.routers[layer].top_k) for layer, m in methods.items()),
    )
    device = heard[0].logits.device
    for method in methods.values():
        method.to(device)
    times = []
    with torch.inference_mode():
        for _ in range(1 + REPEATS):  # the first run warms up
            start = time.perf_counter()
            for layer, method in methods.items():
                pick(method, heard[layer])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / (len(methods) * ids.numel())


def table_bytes(routing: BHRoutingIntegration) -> int:
    """Return the bytes of a method's tables in all layers, and of what ``affine`` was fitted to."""
    affine = 0 if routing.affine is None else routing.affine.nbytes
    return affine + sum(
        buffer.numel() * buffer.element_size()
        for layer in routing.layers
        for name, buffer in routing.method(layer).named_buffers()
        if name != "bounds"
    )
