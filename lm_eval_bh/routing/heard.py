"""Runs a model over calibration text, and keeps what its methods look at in every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.ranked import ranked_scores
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.solution import Solution
from lm_eval_bh.routing.step_target import Ranking, joined, on_cpu, rankings, whole_steps
from lm_eval_bh.routing.tables.calibration import listen
from lm_eval_bh.routing.tables.find import tokenizer_of
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.routing.tables.texts import text_batches, wikitext_texts

INSTEAD = "give alpha in place of target_experts, or in Python texts= to solve it on"
TOKENS, LENGTH, BATCH = 16384, 512, 8
# Input of a layer's method: ranked scores; for a step also their experts, or all.
Heard = Tensor | Ranking | RouterOutput


class Routed(Protocol):
    """The model to solve for, which can run with and without the rule."""

    model: nn.Module
    routers: list[Router]
    num_experts: int
    config: RoutingConfig
    null_model: NullModel | None
    solution: Solution | None

    @property
    def layers(self) -> list[int]:
        """The layers that the rule applies to."""

    def method(self, layer: int) -> Method:
        """Return a layer's fitted method."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


def calibration_batches(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    decode_batch: int | None = None,
) -> list[Tensor]:
    """Return the text to solve on as token ids; see :func:`~lm_eval_bh.routing.target.solve`.

    With ``decode_batch``, in whole batches of that many rows.
    """
    found = text_batches(
        tokenizer or tokenizer_of(model),
        wikitext_texts("train", INSTEAD) if texts is None else texts,
        tokens=TOKENS,
        length=LENGTH,
        batch=BATCH,
    )
    return found if decode_batch is None else whole_steps(found, decode_batch, LENGTH)


def p_values(integration: Routed, batches: Sequence[Tensor]) -> Tensor:
    """Return the p-values of all experts in all routed layers, ascending: one family."""
    null_model = integration.null_model
    assert null_model is not None
    parts: list[Tensor] = []

    def hear(layer: int, method: Method, said: RouterOutput) -> None:
        found = null_model.p_values_of(layer, Method.score(method, said))  # for all experts
        parts.append(found.flatten().cpu())

    _listen(integration, batches, hear)
    return torch.cat(parts).sort().values


def collect(integration: Routed, batches: Sequence[Tensor]) -> dict[int, Heard]:
    """Run the model as it is now, and return the rule's input in every routed layer."""
    parts: dict[int, list[Any]] = {layer: [] for layer in integration.layers}
    joint, by_step = integration.config.method.joint, integration.config.target_distinct

    def hear(layer: int, method: Method, said: RouterOutput) -> None:
        if joint:
            parts[layer].append(on_cpu(said, method.statistic.predicts))
            return
        ranked, order = ranked_scores(method, integration.null_model, layer, said)
        if not by_step:
            parts[layer].append(ranked.cpu())
            return
        assert said.step is not None
        experts = (said.indices if method.follows_router else order)[:, : method.max_k]
        parts[layer].append(Ranking(ranked.cpu(), experts.cpu(), said.step.cpu()))

    _listen(integration, batches, hear)
    join: Callable[[list[Any]], Heard] = joined if joint else rankings if by_step else torch.cat
    return {layer: join(found) for layer, found in parts.items()}


def _listen(
    integration: Routed,
    batches: Sequence[Tensor],
    hear: Callable[[int, Method, RouterOutput], None],
) -> None:
    """Run the model as it is now, and pass on the output of the routed layers' routers."""
    methods: dict[int, Method] = {}

    def note(layer: int, said: RouterOutput) -> None:
        if layer in methods:
            exact = said._replace(logits=said.logits.float())
            hear(layer, methods[layer].to(said.logits.device), exact)

    methods |= {layer: integration.method(layer) for layer in integration.layers}
    modules = [router.module for router in integration.routers]
    slots = max(methods[layer].asks(integration.routers[layer].top_k) for layer in methods)
    listen(integration.model, modules, batches, note, slots=slots)
