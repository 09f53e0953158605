"""Solves a rule's parameter on calibration text, for a mean number of experts or a family."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ParameterError, UnreachableError
from lm_eval_bh.routing.bisection import LOG_ODDS, Mean, bisect, parameter_at
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.family import family_cutoff, family_level
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.ranked import ranked_scores
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.solution import Solution
from lm_eval_bh.routing.step_target import (
    Ranking,
    joined,
    mean_distinct,
    on_cpu,
    rankings,
    served,
    whole_steps,
)
from lm_eval_bh.routing.tables.calibration import listen
from lm_eval_bh.routing.tables.find import tokenizer_of
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.routing.tables.texts import WIKITEXT, text_batches, wikitext_texts

logger = logging.getLogger(__name__)

INSTEAD = "give alpha in place of target_experts, or in Python texts= to solve it on"
TOKENS, LENGTH, BATCH = 16384, 512, 8
TOLERANCE = 0.02  # largest relative error of the mean
AIM = 0.01  # relative error that ends the search
ROUNDS = 8
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


def solve(
    integration: Routed, tokenizer: Any = None, texts: Sequence[str] | None = None
) -> Solution:
    """Solve the parameter of the integration's rule for its target, or its family.

    The target is a mean number of experts per token, or of distinct experts per layer and step.

    The rule is first solved on the logits of the unchanged model; but leaving out experts in lower
    layers changes the logits above. The model is therefore run with the solution, and solved again
    on the new logits, until the measured mean meets the target. A target that one round's logits
    cannot reach may be reachable in the next, so the nearest parameter is taken.

    Parameters
    ----------
    integration : Routed
        The integration, not patched; its configuration names the target.
    tokenizer : optional
        The model's tokenizer; loaded by default.
    texts : sequence of str, optional
        The first 16,384 tokens of these documents are used; by default WikiText-2's training text.

    Raises
    ------
    UnreachableError, ParameterError
        If no parameter of the rule reaches the target, or none was found.
    DataError, ModelError
        If the text or the tokenizer cannot be loaded.
    """
    config = integration.config
    batches = calibration_batches(
        integration.model, tokenizer, texts, config.decode_batch if config.target_distinct else None
    )
    unchanged = _p_values(integration, batches) if config.family == "all" else None
    scores: Mapping[int, Heard] = {}
    best: Solution | None = None
    tried: list[dict[int, float]] = []
    while len(tried) < ROUNDS and (best is None or best.miss > AIM):
        if _target(config) is None:
            assert unchanged is not None
            alphas = dict.fromkeys(integration.layers, family_cutoff(unchanged, config.alpha))
        else:
            scores = scores or _collect(integration, batches)
            alphas = _solve_on(integration, scores)
        if alphas in tried:
            break
        tried.append(alphas)
        integration.solution = Solution(
            config.target_experts,
            config.budget,
            alphas,
            0.0,
            {},
            0,
            "",
            target_distinct=config.target_distinct,
        )
        with integration:
            scores = _collect(integration, batches)
        means = {layer: _mean(integration, layer, scores[layer])(alphas[layer]) for layer in alphas}
        mean = sum(means.values()) / len(means)
        found = dataclasses.replace(
            integration.solution,
            mean_experts=_experts(integration, scores, alphas) if config.target_distinct else mean,
            distinct_experts=mean if config.target_distinct else None,
            layer_means=means,
            tokens=sum(batch.numel() for batch in batches),
            text=WIKITEXT if texts is None else "given",
        )
        if best is None or found.miss < best.miss:
            best = found
    assert best is not None
    if best.miss > TOLERANCE:
        _give_up(integration, scores, best, len(tried))
    if unchanged is not None:
        cutoff = next(iter(best.alphas.values()))
        level = config.alpha if _target(config) is None else family_level(unchanged, cutoff)
        best = dataclasses.replace(best, level=level)
    logger.info("Solved for %s experts: %s", _target(config), best)
    return best


def _target(config: RoutingConfig) -> float | None:
    target: float | None = config.target_distinct or config.target_experts
    return target


def calibration_batches(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    decode_batch: int | None = None,
) -> list[Tensor]:
    """Return the text to solve on as token ids; see :func:`solve`.

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


def _p_values(integration: Routed, batches: Sequence[Tensor]) -> Tensor:
    """Return the p-values of all experts in all routed layers, ascending: one family."""
    null_model = integration.null_model
    assert null_model is not None
    parts: list[Tensor] = []

    def hear(layer: int, method: Method, said: RouterOutput) -> None:
        found = null_model.p_values_of(layer, Method.score(method, said))  # for all experts
        parts.append(found.flatten().cpu())

    _listen(integration, batches, hear)
    return torch.cat(parts).sort().values


def _collect(integration: Routed, batches: Sequence[Tensor]) -> dict[int, Heard]:
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
    join: Callable[[list[Any]], Heard] = torch.cat
    if joint or by_step:
        join = joined if joint else rankings
    return {layer: join(found) for layer, found in parts.items()}


def _experts(integration: Routed, heard: Mapping[int, Heard], alphas: Mapping[int, float]) -> float:
    """Return the mean number of experts per token."""
    means = []
    for layer, said in heard.items():
        assert not isinstance(said, Tensor)
        method = integration.method(layer).cpu()
        used = served(method, said, alphas[layer]) < method.num_experts
        means.append(float(used.sum(-1).double().mean()))
    return sum(means) / len(means)


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


def _give_up(
    integration: Routed, scores: Mapping[int, Heard], best: Solution, rounds: int
) -> NoReturn:
    """Raise for the first unmet budget, saying whether any parameter could meet it."""
    target, rule = _target(integration.config) or 0.0, integration.config.rule
    name = "target_experts" if best.target_distinct is None else "target_distinct"
    for layers, mean in _budgets(integration, scores).items():
        met = sum(best.layer_means[layer] for layer in layers) / len(layers)
        if abs(met / target - 1) <= TOLERANCE:
            continue
        where = f" in layer {layers[0]}" if best.budget == "layer" else ""
        method = integration.config.method
        low, high = sorted(mean(parameter_at(end, method)) for end in (-LOG_ODDS, LOG_ODDS))
        if not low <= target <= high:
            raise UnreachableError(
                f"{name}={target} cannot be reached with rule={rule}{where}: with the rule "
                f"applied, the mean on the calibration text lies between {low:.3g} and {high:.3g} "
                "experts for every alpha; give another target or rule."
            )
        raise ParameterError(
            f"{name}={target} was not met: rule={rule} came no closer than a mean of "
            f"{met:.3g}{where} in {rounds} rounds; give another target or rule."
        )
    raise AssertionError("a solution that misses its target misses one of its budgets")


def _solve_on(integration: Routed, scores: Mapping[int, Heard]) -> dict[int, float]:
    """Return every layer's parameter, solved on given logits, or the nearest one."""
    target = float(_target(integration.config) or 0)
    alphas: dict[int, float] = {}
    for layers, mean in _budgets(integration, scores).items():
        alphas |= dict.fromkeys(layers, bisect(mean, target, integration.config.method))
    return alphas


def _budgets(integration: Routed, scores: Mapping[int, Heard]) -> dict[tuple[int, ...], Mean]:
    """Return the layers that share a parameter, and their mean as a function of it."""
    means = {layer: _mean(integration, layer, scores[layer]) for layer in integration.layers}
    if integration.config.budget == "layer":
        return {(layer,): mean for layer, mean in means.items()}

    def over_layers(alpha: float) -> float:
        return sum(mean(alpha) for mean in means.values()) / len(means)

    return {tuple(means): over_layers}


def _mean(integration: Routed, layer: int, ranked: Heard) -> Mean:
    """Return a layer's mean number of experts as a function of the parameter."""
    method = integration.method(layer).cpu()
    if not isinstance(ranked, Tensor):
        return mean_distinct(method, ranked)

    def mean(alpha: float) -> float:
        counts = method.count(ranked, method.level(alpha))
        return float(counts.clamp(method.min_k, method.max_k).double().mean())

    return mean
