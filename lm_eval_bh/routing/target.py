"""Solves a rule's parameter so that tokens get a given number of experts on the mean."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ParameterError, UnreachableError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.nulls.calibration import collect_router_logits
from lm_eval_bh.routing.nulls.find import tokenizer_of
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.nulls.texts import WIKITEXT, text_batches, wikitext_texts
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.rules.sorted_scores import SortedScores
from lm_eval_bh.routing.selector import sort_scores

logger = logging.getLogger(__name__)

INSTEAD = "give alpha in place of target_experts, or from Python texts= to solve it on"
TOKENS, LENGTH, BATCH = 16384, 512, 8
TOLERANCE = 0.02  # share of the target that the mean may miss it by
AIM = 0.01  # and what ends the search
ROUNDS = 8
LOG_ODDS = 20.0  # alpha is looked for between 2e-9 and 1 - 2e-9
HALVINGS = 24

Mean = Callable[[float], float]


@dataclass(frozen=True)
class Solution:
    """The parameters that meet a target.

    Attributes
    ----------
    target_experts, budget
        What was asked for.
    alphas : dict of layer to float
        The rule's parameter in every routed layer.
    mean_experts : float
        The mean over tokens and layers on the calibration text, with the rule at work.
    layer_means : dict of layer to float
        The means of the layers.
    tokens : int
        How many tokens of the text.
    text : str
        What text.
    """

    target_experts: float
    budget: str
    alphas: dict[int, float]
    mean_experts: float
    layer_means: dict[int, float]
    tokens: int
    text: str

    @property
    def miss(self) -> float:
        """By what share of itself the target is missed; in the worst layer if each has its own."""
        per_layer = self.budget == "layer"
        means = list(self.layer_means.values()) if per_layer else [self.mean_experts]
        return max(abs(mean / self.target_experts - 1) for mean in means)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, whose keys are text."""
        content = dataclasses.asdict(self)
        for name in ("alphas", "layer_means"):
            content[name] = {str(layer): value for layer, value in content[name].items()}
        return content


class Routed(Protocol):
    """What a target is solved for: a model that can be run with the rule at work and without."""

    model: nn.Module
    routers: list[Router]
    num_experts: int
    config: RoutingConfig
    null_model: NullModel | None
    solution: Solution | None

    @property
    def layers(self) -> list[int]:
        """The layers that the rule applies to."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


def solve(
    integration: Routed, tokenizer: Any = None, texts: Sequence[str] | None = None
) -> Solution:
    """Solve the parameter of the integration's rule for its ``target_experts``.

    The rule is solved on the logits of the unchanged model; but experts that are left out below
    change the logits above, so the model is run with what was solved, and it is solved again on the
    logits it gives then, until the mean that really comes out meets the target. What cannot be
    reached on one round's logits may be on the next's: there the nearest parameter is taken.

    Parameters
    ----------
    integration : Routed
        Not patched; its configuration names the target.
    tokenizer : optional
        Of the model; by default the one that belongs to it is loaded.
    texts : sequence of str, optional
        The first 16,384 tokens of these documents are used; default WikiText-2's training text.

    Raises
    ------
    UnreachableError, ParameterError
        If no parameter of the rule reaches the target, or none was found.
    DataError, ModelError
        If the text or the tokenizer cannot be loaded.
    """
    config = integration.config
    assert config.target_experts is not None
    batches = text_batches(
        tokenizer or tokenizer_of(integration.model),
        wikitext_texts("train", INSTEAD) if texts is None else texts,
        tokens=TOKENS,
        length=LENGTH,
        batch=BATCH,
    )
    modules = [router.module for router in integration.routers]
    logits = collect_router_logits(integration.model, modules, batches)
    best: Solution | None = None
    tried: list[dict[int, float]] = []
    while len(tried) < ROUNDS and (best is None or best.miss > AIM):
        alphas = _solve_on(integration, logits)
        if alphas in tried:
            break
        tried.append(alphas)
        integration.solution = Solution(
            config.target_experts, config.budget, alphas, 0.0, {}, 0, ""
        )
        with integration:
            logits = collect_router_logits(integration.model, modules, batches)
        means = {layer: _mean(integration, layer, logits)(alphas[layer]) for layer in alphas}
        found = dataclasses.replace(
            integration.solution,
            mean_experts=sum(means.values()) / len(means),
            layer_means=means,
            tokens=sum(batch.numel() for batch in batches),
            text=WIKITEXT if texts is None else "given",
        )
        if best is None or found.miss < best.miss:
            best = found
    assert best is not None
    if best.miss > TOLERANCE:
        _give_up(integration, logits, best, len(tried))
    logger.info("Solved for %s experts: %s", config.target_experts, best)
    return best


def _give_up(
    integration: Routed, logits: Mapping[int, Tensor], best: Solution, rounds: int
) -> NoReturn:
    """Say of the first budget that is not met whether any parameter could have met it."""
    target, rule = best.target_experts, integration.config.rule
    for layers, mean in _budgets(integration, logits).items():
        met = sum(best.layer_means[layer] for layer in layers) / len(layers)
        if abs(met / target - 1) <= TOLERANCE:
            continue
        where = f" in layer {layers[0]}" if best.budget == "layer" else ""
        low, high = sorted(mean(_level(end)) for end in (-LOG_ODDS, LOG_ODDS))
        if not low <= target <= high:
            raise UnreachableError(
                f"target_experts={target} cannot be reached with rule={rule}{where}: with the rule "
                f"at work on the calibration text its mean lies between {low:.3g} and {high:.3g} "
                "experts for every alpha; give another target or rule."
            )
        raise ParameterError(
            f"target_experts={target} was not met: rule={rule} came no nearer than a mean of "
            f"{met:.3g}{where} in {rounds} rounds; give another target or rule."
        )
    raise AssertionError("a solution that misses its target misses one of its budgets")


def _solve_on(integration: Routed, logits: Mapping[int, Tensor]) -> dict[int, float]:
    """Return every layer's parameter, solved on logits as they are, or the one that is nearest."""
    target = float(integration.config.target_experts or 0)
    alphas: dict[int, float] = {}
    for layers, mean in _budgets(integration, logits).items():
        alphas |= dict.fromkeys(layers, _bisect(mean, target))
    return alphas


def _budgets(integration: Routed, logits: Mapping[int, Tensor]) -> dict[tuple[int, ...], Mean]:
    """Return the layers that share a parameter, and their mean as a function of it."""
    means = {layer: _mean(integration, layer, logits) for layer in integration.layers}
    if integration.config.budget == "layer":
        return {(layer,): mean for layer, mean in means.items()}

    def over_layers(alpha: float) -> float:
        return sum(mean(alpha) for mean in means.values()) / len(means)

    return {tuple(means): over_layers}


def _mean(integration: Routed, layer: int, logits: Mapping[int, Tensor]) -> Mean:
    """Return the function from the parameter to a layer's mean number of experts."""
    config, null_model = integration.config, integration.null_model
    rule, experts = RULES[config.rule], integration.num_experts
    if (
        rule.tests and null_model is not None
    ):  # many levels: p-values once are cheaper than thresholds
        scores = SortedScores(null_model.p_values(layer, logits[layer]).sort(dim=-1).values)
    else:
        scores = sort_scores(logits[layer], null_model, layer)

    def mean(alpha: float) -> float:
        levels = None if rule.critical_values is None else rule.critical_values(alpha, experts)
        critical = None if levels is None else torch.from_numpy(levels)
        assert rule.count is not None
        counts = rule.count(scores, alpha, critical)
        return float(counts.clamp_(config.min_k, config.max_k).double().mean())

    return mean


def _bisect(mean: Mean, target: float) -> float:
    """Return the parameter whose mean comes nearest to the target.

    The mean rises with the level of a test and falls with that of ``min_p``.
    """
    low, high = -LOG_ODDS, LOG_ODDS
    ends = mean(_level(low)), mean(_level(high))
    rising = ends[1] >= ends[0]
    nearest = min((abs(ends[0] - target), low), (abs(ends[1] - target), high))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value = mean(_level(middle))
        nearest = min(nearest, (abs(value - target), middle))
        low, high = (middle, high) if (value < target) == rising else (low, middle)
    return _level(nearest[1])


def _level(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))
