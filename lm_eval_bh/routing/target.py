"""Solves a rule's parameter on calibration text, for a mean number of experts or a family."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from torch import Tensor

from lm_eval_bh.errors import ParameterError, UnreachableError
from lm_eval_bh.routing.bisection import LOG_ODDS, Mean, bisect, parameter_at
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.family import family_cutoff, family_level
from lm_eval_bh.routing.heard import Heard, Routed, calibration_batches, collect, p_values
from lm_eval_bh.routing.solution import Solution
from lm_eval_bh.routing.step_target import mean_distinct, served
from lm_eval_bh.routing.tables.texts import WIKITEXT

logger = logging.getLogger(__name__)

TOLERANCE = 0.02  # largest relative error of the mean
AIM = 0.01  # relative error that ends the search
ROUNDS = 8


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
    found = _solved(integration, batches)
    found = dataclasses.replace(found, text=WIKITEXT if texts is None else "given")
    logger.info("Solved for %s experts: %s", _target(config), found)
    return found


def _solved(integration: Routed, batches: Sequence[Tensor]) -> Solution:
    config = integration.config
    if config.family != "all":
        return _towards_target(integration, batches)
    unchanged = p_values(integration, batches)
    if _target(config) is None:  # the level is given: it leaves one cut-off
        cutoff = family_cutoff(unchanged, config.alpha)
        found, _ = _run_with(integration, batches, dict.fromkeys(integration.layers, cutoff))
        return dataclasses.replace(found, level=config.alpha)
    found = _towards_target(integration, batches)
    level = family_level(unchanged, next(iter(found.alphas.values())))
    return dataclasses.replace(found, level=level)


def _towards_target(integration: Routed, batches: Sequence[Tensor]) -> Solution:
    """Solve, run, and solve again on what the routers then say, until the mean is met."""
    heard = collect(integration, batches)
    best: Solution | None = None
    tried: list[dict[int, float]] = []
    while len(tried) < ROUNDS and (best is None or best.miss > AIM):
        alphas = _solve_on(integration, heard)
        if alphas in tried:
            break
        tried.append(alphas)
        found, heard = _run_with(integration, batches, alphas)
        if best is None or found.miss < best.miss:
            best = found
    assert best is not None
    if best.miss > TOLERANCE:
        _give_up(integration, heard, best, len(tried))
    return best


def _run_with(
    integration: Routed, batches: Sequence[Tensor], alphas: dict[int, float]
) -> tuple[Solution, dict[int, Heard]]:
    """Run the model with parameters; return them with their means, and what was heard."""
    config = integration.config
    solution = Solution(
        target_experts=config.target_experts,
        budget=config.budget,
        alphas=alphas,
        mean_experts=0.0,
        layer_means={},
        tokens=sum(batch.numel() for batch in batches),
        text="",
        target_distinct=config.target_distinct,
    )
    integration.solution = solution
    with integration:
        heard = collect(integration, batches)
    means = {layer: _mean(integration, layer, heard[layer])(alphas[layer]) for layer in alphas}
    mean = sum(means.values()) / len(means)
    solution = dataclasses.replace(solution, mean_experts=mean, layer_means=means)
    if config.target_distinct:
        experts = _experts(integration, heard, alphas)
        solution = dataclasses.replace(solution, mean_experts=experts, distinct_experts=mean)
    return solution, heard


def _target(config: RoutingConfig) -> float | None:
    return cast("float | None", config.target_distinct or config.target_experts)


def _experts(integration: Routed, heard: Mapping[int, Heard], alphas: Mapping[int, float]) -> float:
    """Return the mean number of experts per token."""
    means = []
    for layer, said in heard.items():
        assert not isinstance(said, Tensor)
        method = integration.method(layer).cpu()
        used = served(method, said, alphas[layer]) < method.num_experts
        means.append(float(used.sum(-1).double().mean()))
    return sum(means) / len(means)


def _give_up(
    integration: Routed, heard: Mapping[int, Heard], best: Solution, rounds: int
) -> NoReturn:
    """Raise for the first unmet budget, saying whether any parameter could meet it."""
    target, rule = _target(integration.config) or 0.0, integration.config.rule
    name = "target_experts" if best.target_distinct is None else "target_distinct"
    for layers, mean in _budgets(integration, heard).items():
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


def _solve_on(integration: Routed, heard: Mapping[int, Heard]) -> dict[int, float]:
    """Return every layer's parameter, solved on given logits, or the nearest one."""
    target = float(_target(integration.config) or 0)
    alphas: dict[int, float] = {}
    for layers, mean in _budgets(integration, heard).items():
        alphas |= dict.fromkeys(layers, bisect(mean, target, integration.config.method))
    return alphas


def _budgets(integration: Routed, heard: Mapping[int, Heard]) -> dict[tuple[int, ...], Mean]:
    """Return the layers that share a parameter, and their mean as a function of it."""
    means = {layer: _mean(integration, layer, heard[layer]) for layer in integration.layers}
    if integration.config.budget == "layer":
        return {(layer,): mean for layer, mean in means.items()}

    def over_layers(alpha: float) -> float:
        return sum(mean(alpha) for mean in means.values()) / len(means)

    return {tuple(means): over_layers}


def _mean(integration: Routed, layer: int, heard: Heard) -> Mean:
    """Return a layer's mean number of experts as a function of the parameter."""
    method = integration.method(layer).cpu()
    if not isinstance(heard, Tensor):
        return mean_distinct(method, heard)

    def mean(alpha: float) -> float:
        counts = method.count(heard, method.level(alpha))
        return float(counts.clamp(method.min_k, method.max_k).double().mean())

    return mean
