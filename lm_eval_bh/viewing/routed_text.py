"""A rule's decisions on a text: every token's experts, scores and thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm_eval_bh.analysis.show.view_page import ViewLayer, ViewRouted, short
from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.ranked import ranked_scores
from lm_eval_bh.routing.router_reader import RouterReader


class _Decided(NamedTuple):
    """The scores and thresholds of a layer's decisions.

    ``scores`` are float ``[tokens, experts]``; ``limits`` are the thresholds of each rank,
    ``[tokens, experts]``. If there are none, both the name and the tensor are None.
    """

    score: str | None = None
    scores: Tensor | None = None
    limit: str | None = None
    limits: Tensor | None = None


def route_text(integration: BHRoutingIntegration, token_ids: Sequence[int]) -> ViewRouted:
    """Run a patched model over one text, and return its decisions.

    Parameters
    ----------
    integration : BHRoutingIntegration
        The patched integration.
    token_ids : sequence of int
        Token ids of the text.

    Raises
    ------
    ParameterError
        If the integration is not patched.
    DataError
        If the text has no tokens, or more than the model's context.
    """
    model = integration.model
    if not integration.patched:
        raise ParameterError(
            "The model is not patched, so the rule has no effect: call patch_model() first."
        )
    if not len(token_ids):
        raise DataError("The text has no tokens: give one that is not empty.")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(token_ids) > longest:
        raise DataError(
            f"The text has {len(token_ids)} tokens, and the model takes {longest}: give fewer."
        )
    layers: list[ViewLayer] = []

    def observe(layer: int, router_logits: Tensor, selection: Picked) -> None:
        layers.append(_layer(integration, layer, router_logits, selection, said.get(layer)))

    with _said(integration) as said, torch.no_grad():
        integration.observers.append(observe)
        try:
            ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
        finally:
            integration.observers.remove(observe)
        losses = F.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")
    return {"loss": [None, *map(short, losses.tolist())], "layers": layers}


@contextmanager
def _said(integration: BHRoutingIntegration) -> Iterator[dict[int, RouterOutput]]:
    """Yield the last output of each router, by layer."""
    found: dict[int, RouterOutput] = {}

    def listener(layer: int, read: RouterReader) -> Any:
        def take(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found[layer] = read(module, inputs, output)

        return take

    with ExitStack() as hooks:
        for layer in integration.layers:
            router = integration.routers[layer]
            read = RouterReader(router, integration.method(layer).asks(router.top_k))
            hook = router.module.register_forward_hook(listener(layer, read), prepend=True)
            hooks.callback(hook.remove)
        yield found


def _layer(
    integration: BHRoutingIntegration,
    layer: int,
    router_logits: Tensor,
    selection: Picked,
    said: RouterOutput | None,
) -> ViewLayer:
    """Return each token's experts, followed by the first one left out."""
    experts = integration.num_experts
    decided = _decided_by(integration, layer, said)
    softmax = router_logits.float().softmax(-1)
    used = selection.indices < experts
    left = softmax if decided.scores is None else decided.scores
    if decided.score == "p-value":
        left = -left
    chosen = torch.zeros(len(softmax), experts + 1, dtype=torch.bool, device=softmax.device)
    chosen.scatter_(-1, selection.indices, True)
    left = left.double().nan_to_num(nan=-torch.inf)  # non-candidates come last
    next_best = left.masked_fill(chosen[:, :experts], -torch.inf).argmax(-1)
    plain = softmax.tolist() if integration.routers[layer].softmax else None
    scores = None if decided.scores is None else decided.scores.tolist()
    limits = None if decided.limits is None else decided.limits.tolist()
    rows = []
    for token, (indices, weights, kept, best) in enumerate(
        zip(
            selection.indices.tolist(),
            selection.weights.float().tolist(),
            used.tolist(),
            next_best.tolist(),
            strict=True,
        )
    ):
        taken = [(e, w) for e, w, k in zip(indices, weights, kept, strict=True) if k]
        if len(taken) < experts:
            taken.append((best, None if plain is None else plain[token][best]))
        rows.append(
            [
                (
                    expert,
                    short(weight),
                    None if scores is None else short(scores[token][expert]),
                    None if limits is None else short(limits[token][rank]),
                )
                for rank, (expert, weight) in enumerate(taken)
            ]
        )
    return {
        "layer": layer,
        "score": decided.score,
        "limit": decided.limit,
        "counts": used.sum(-1).tolist(),
        "rows": rows,
    }


def _decided_by(
    integration: BHRoutingIntegration, layer: int, said: RouterOutput | None
) -> _Decided:
    method, alpha = integration.method(layer), integration.alphas[layer]
    if method.fixed_count or said is None:
        return _Decided()
    ranked, order = ranked_scores(
        method.to(said.logits.device), integration.null_model, layer, said
    )
    shown = method.shown(ranked, alpha)
    if shown is None:
        return _Decided()
    name, values, limit, limits = shown
    blank = values.new_full(said.logits.shape, float("nan"))
    by_expert = blank.scatter(-1, order, values)
    if limits is None:
        return _Decided(name, by_expert)
    limits = limits.expand(values.shape)
    beyond = limits[:, -1:].expand(-1, said.logits.shape[-1] - limits.shape[-1])
    return _Decided(name, by_expert, limit, torch.cat([limits, beyond], dim=-1))
