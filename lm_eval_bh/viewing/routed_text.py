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


def route_texts(
    integration: BHRoutingIntegration, texts: Sequence[Sequence[int]]
) -> list[ViewRouted]:
    """Run a patched model over texts, side by side, and return its decisions on each.

    Parameters
    ----------
    integration : BHRoutingIntegration
        The patched integration.
    texts : sequence of sequences of int
        Token ids of each text.

    Raises
    ------
    ParameterError
        If the integration is not patched.
    DataError
        If a text has no tokens, or more than the model's context.
    """
    model = integration.model
    if not integration.patched:
        raise ParameterError(
            "The model is not patched, so the rule has no effect: call patch_model() first."
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    for text in texts:
        if not len(text):
            raise DataError("The text has no tokens: give one that is not empty.")
        if longest is not None and len(text) > longest:
            raise DataError(
                f"The text has {len(text)} tokens, and the model takes {longest}: give fewer."
            )
    heard: list[tuple[int, Tensor, Picked]] = []

    def observe(*of_layer: Any) -> None:
        heard.append(of_layer)

    device = next(model.parameters()).device
    length = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)
    real = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    mask = {} if bool(real.all()) else {"attention_mask": real.to(device)}
    with _said(integration) as said, torch.no_grad():
        integration.observers.append(observe)
        try:
            logits = model(input_ids=ids, **mask, use_cache=False).logits
        finally:
            integration.observers.remove(observe)
    found: list[ViewRouted] = []
    for row, text in enumerate(texts):
        own = slice(row * length, row * length + len(text))
        layers = [
            _layer(integration, at, values[own], _some(chosen, own), _some(said.get(at), own))
            for at, values, chosen in heard
        ]
        predicted = logits[row, : len(text) - 1].float()
        losses = F.cross_entropy(predicted, ids[row, 1 : len(text)], reduction="none")
        found.append({"loss": [None, *map(short, losses.tolist())], "layers": layers})
    return found


def _some(of_tokens: Any, own: slice) -> Any:
    """Return some tokens of a tuple of tensors ``[tokens, ...]``; what is no tensor stays."""
    if of_tokens is None:
        return None
    return type(of_tokens)(*(f[own] if isinstance(f, Tensor) else f for f in of_tokens))


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
