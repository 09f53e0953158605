"""What a method costs beside the experts: the time of a decision, and the bytes of its tables."""

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
    """Return how long a method decides about one token in one layer, in seconds.

    The median of several times over the longest window, all tokens at once, as in prefill; of
    documents that are groups over one of them, the tokens at one position a step.

    Parameters
    ----------
    routing : BHRoutingIntegration
        Not patched.
    documents : Documents
        Whose first window or group is decided about.
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
        for _ in range(1 + REPEATS):  # the first one warms up
            start = time.perf_counter()
            for layer, method in methods.items():
                pick(method, heard[layer])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / (len(methods) * ids.numel())


def table_bytes(routing: BHRoutingIntegration) -> int:
    """Return how many bytes a method keeps beside its bounds, in all layers."""
    return sum(
        buffer.numel() * buffer.element_size()
        for layer in routing.layers
        for name, buffer in routing.method(layer).named_buffers()
        if name != "bounds"
    )
