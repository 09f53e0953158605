"""What a rule decides on a text: every token's experts, with what they were decided by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm_eval_bh.analysis.show.view_page import ViewLayer, ViewRouted, short
from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.selection import Selection
from lm_eval_bh.routing.selector import sort_scores


class _Decided(NamedTuple):
    """What the experts of a layer were decided by.

    ``scores`` are float ``[tokens, experts]``; ``limits`` are what each rank's is compared with,
    ``[tokens, experts]``. Where there is no such thing, both the name and the tensor are None.
    """

    score: str | None = None
    scores: Tensor | None = None
    limit: str | None = None
    limits: Tensor | None = None


def route_text(integration: BHRoutingIntegration, token_ids: Sequence[int]) -> ViewRouted:
    """Run a patched model over one text, and return what was decided.

    Parameters
    ----------
    integration : BHRoutingIntegration
        Patched.
    token_ids : sequence of int
        The text.

    Raises
    ------
    ParameterError
        If the integration is not patched.
    DataError
        If the text has no tokens, or more than the model takes.
    """
    model = integration.model
    if not integration.patched:
        raise ParameterError(
            "The model is not patched, so the rule decides nothing: call patch_model() first."
        )
    if not len(token_ids):
        raise DataError("The text has no tokens: give one that is not empty.")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(token_ids) > longest:
        raise DataError(
            f"The text has {len(token_ids)} tokens, and the model takes {longest}: give fewer."
        )
    layers: list[ViewLayer] = []

    def observe(layer: int, router_logits: Tensor, selection: Selection) -> None:
        layers.append(_layer(integration, layer, router_logits, selection, hidden.get(layer)))

    with _hidden_states(integration) as hidden, torch.no_grad():
        integration.observers.append(observe)
        try:
            ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
        finally:
            integration.observers.remove(observe)
        losses = F.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")
    return {"loss": [None, *map(short, losses.tolist())], "layers": layers}


@contextmanager
def _hidden_states(integration: BHRoutingIntegration) -> Iterator[dict[int, Tensor]]:
    """Yield what each router was given last, ``[tokens, hidden]``, by its layer."""
    found: dict[int, Tensor] = {}

    def listener(layer: int) -> Any:
        def take(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            found[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])

        return take

    with ExitStack() as hooks:
        for layer in integration.layers:
            module = integration.routers[layer].module
            hooks.callback(module.register_forward_pre_hook(listener(layer)).remove)
        yield found


def _layer(
    integration: BHRoutingIntegration,
    layer: int,
    router_logits: Tensor,
    selection: Selection,
    hidden_states: Tensor | None,
) -> ViewLayer:
    """Return each token's experts, and behind them the first that was left out."""
    experts = integration.num_experts
    decided = _decided_by(integration, layer, router_logits, hidden_states)
    softmax = router_logits.float().softmax(-1)
    used = selection.indices < experts
    left = softmax if decided.scores is None else decided.scores
    if decided.score == "p-value":
        left = -left
    chosen = torch.zeros(len(softmax), experts + 1, dtype=torch.bool, device=softmax.device)
    chosen.scatter_(-1, selection.indices, True)
    next_best = left.double().masked_fill(chosen[:, :experts], -torch.inf).argmax(-1)
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
    integration: BHRoutingIntegration,
    layer: int,
    router_logits: Tensor,
    hidden_states: Tensor | None,
) -> _Decided:
    config, null = integration.config, integration.null_model
    rule, alpha = RULES[config.at_work.name], integration.alphas[layer]
    if rule.fixed_count:
        return _Decided()
    shape = router_logits.shape
    if rule.tests and null is not None:
        p_values = null.p_values(layer, router_logits, hidden_states)
        critical = None if rule.critical_values is None else rule.critical_values(alpha, shape[-1])
        if critical is None or len(critical) > 1:  # which row counts differs from token to token
            return _Decided("p-value", p_values)
        limits = torch.from_numpy(critical).expand(shape)
        return _Decided("p-value", p_values, "critical value", limits)
    ranked = sort_scores(router_logits, null, layer, config, hidden_states)
    order = ranked.experts
    if order is None:
        order = router_logits.argsort(dim=-1, descending=True, stable=True)
    order = order[:, : ranked.ascending.shape[-1]]

    def by_expert(values: Tensor) -> Tensor:
        found = values.new_full(shape, float("nan"))
        return found.scatter(-1, order, values)

    level = torch.full(shape, alpha)
    if rule.weighs:  # scores are logarithms of the weight, times the factors of the statistic
        return _Decided("score", by_expert(-ranked.ascending).exp(), "threshold", level)
    if rule.name == "top_p":
        return _Decided("weights so far", by_expert(ranked.cumulative_weights), "to reach", level)
    if rule.name == "min_p":
        least = alpha * ranked.weights[:, :1].expand(shape)
        return _Decided("share", by_expert(ranked.weights), "threshold", least)
    return _Decided()
