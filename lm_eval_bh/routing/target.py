"""Solves a rule's parameter on calibration text: for a mean number of experts, or for one family.

A family of all decisions is tested by Benjamini-Hochberg once, on the text; what it leaves is the
largest p-value that was rejected, a fixed cut-off for whatever text comes.
"""

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
from lm_eval_bh.routing.nulls.calibration import listen
from lm_eval_bh.routing.nulls.find import tokenizer_of
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.nulls.texts import WIKITEXT, text_batches, wikitext_texts
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.rules.registry import Rule
from lm_eval_bh.routing.rules.sorted_scores import SortedScores
from lm_eval_bh.routing.rules.thresholds import thresholds_of
from lm_eval_bh.routing.selector import first_ranked, sort_scores

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
    level : float or None
        For a family of all decisions: the level at which the procedure, over all decisions on the
        text with the unchanged model, has the cut-off that ``alphas`` holds.
    """

    target_experts: float | None
    budget: str
    alphas: dict[int, float]
    mean_experts: float
    layer_means: dict[int, float]
    tokens: int
    text: str
    level: float | None = None

    @property
    def miss(self) -> float:
        """By what share of itself the target is missed; in the worst layer if each has its own."""
        if self.target_experts is None:
            return 0.0
        per_layer = self.budget == "layer"
        means = list(self.layer_means.values()) if per_layer else [self.mean_experts]
        return max(abs(mean / self.target_experts - 1) for mean in means)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Solution:
        """Return what :meth:`as_dict` gave."""
        found = dict(content)
        for name in ("alphas", "layer_means"):
            found[name] = {int(layer): float(value) for layer, value in found[name].items()}
        return cls(**found)

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
    """Solve the parameter of the integration's rule for its ``target_experts`` or its family.

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
    batches = text_batches(
        tokenizer or tokenizer_of(integration.model),
        wikitext_texts("train", INSTEAD) if texts is None else texts,
        tokens=TOKENS,
        length=LENGTH,
        batch=BATCH,
    )
    unchanged = _p_values(integration, batches) if config.family == "all" else None
    scores: Mapping[int, SortedScores] = {}
    best: Solution | None = None
    tried: list[dict[int, float]] = []
    while len(tried) < ROUNDS and (best is None or best.miss > AIM):
        if config.target_experts is None:
            assert unchanged is not None
            alphas = dict.fromkeys(integration.layers, family_cutoff(unchanged, config.alpha))
        else:
            scores = scores or _collect(integration, batches)
            alphas = _solve_on(integration, scores)
        if alphas in tried:
            break
        tried.append(alphas)
        integration.solution = Solution(
            config.target_experts, config.budget, alphas, 0.0, {}, 0, ""
        )
        with integration:
            scores = _collect(integration, batches)
        means = {layer: _mean(integration, scores[layer])(alphas[layer]) for layer in alphas}
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
        _give_up(integration, scores, best, len(tried))
    if unchanged is not None:
        cutoff = next(iter(best.alphas.values()))
        level = config.alpha if config.target_experts is None else family_level(unchanged, cutoff)
        best = dataclasses.replace(best, level=level)
    logger.info("Solved for %s experts: %s", config.target_experts, best)
    return best


def family_cutoff(p_values: Tensor, alpha: float) -> float:
    """Return the largest p-value that Benjamini-Hochberg rejects in one family, 0 if it is none.

    Parameters
    ----------
    p_values : Tensor
        float64 ``[decisions]``, ascending.
    alpha : float
        The level.
    """
    m = len(p_values)
    critical = torch.arange(1, m + 1, dtype=torch.float64) / float(m) * alpha
    rejected = (p_values <= critical).nonzero()
    return float(p_values[rejected[-1, 0]]) if len(rejected) else 0.0


def family_level(p_values: Tensor, cutoff: float) -> float:
    """Return the least level at which Benjamini-Hochberg rejects all p-values up to a cut-off.

    1 where no level below does.
    """
    rejected = int(torch.searchsorted(p_values, cutoff, right=True))
    if rejected == 0:
        return 1.0
    last = float(p_values[rejected - 1])
    return min(last * len(p_values) / rejected, 1.0)


def _p_values(integration: Routed, batches: Sequence[Tensor]) -> Tensor:
    """Return the p-values of all experts in all routed layers, ascending: one family."""
    null_model, layers = integration.null_model, set(integration.layers)
    assert null_model is not None
    parts: list[Tensor] = []

    def hear(layer: int, logits: Tensor, hidden_states: Tensor) -> None:
        if layer in layers:
            found = null_model.p_values(layer, logits.float(), hidden_states)
            parts.append(found.flatten().cpu())

    listen(integration.model, [r.module for r in integration.routers], batches, hear)
    return torch.cat(parts).sort().values


def _collect(integration: Routed, batches: Sequence[Tensor]) -> dict[int, SortedScores]:
    """Run the model as it is now, and return what the rule looks at in every routed layer."""
    config, null_model = integration.config, integration.null_model
    parts: dict[int, list[Tensor]] = {layer: [] for layer in integration.layers}

    def hear(layer: int, logits: Tensor, hidden_states: Tensor) -> None:
        if layer not in parts:
            return
        logits = logits.float()
        if not config.tests:
            scores = sort_scores(logits, null_model, layer, config, hidden_states).ascending
        else:  # p-values once are cheaper than the thresholds of many levels
            assert null_model is not None
            scores = null_model.p_values(layer, logits, hidden_states)
            if config.at_work.alone:
                scores = scores.masked_fill(~first_ranked(logits, config.max_k), torch.inf)
            scores = scores.sort(dim=-1).values
        parts[layer].append(scores.cpu())

    listen(integration.model, [r.module for r in integration.routers], batches, hear)
    return {layer: SortedScores(torch.cat(found)) for layer, found in parts.items()}


def _give_up(
    integration: Routed, scores: Mapping[int, SortedScores], best: Solution, rounds: int
) -> NoReturn:
    """Say of the first budget that is not met whether any parameter could have met it."""
    target, rule = best.target_experts or 0.0, integration.config.rule
    for layers, mean in _budgets(integration, scores).items():
        met = sum(best.layer_means[layer] for layer in layers) / len(layers)
        if abs(met / target - 1) <= TOLERANCE:
            continue
        where = f" in layer {layers[0]}" if best.budget == "layer" else ""
        at_work = integration.config.at_work
        low, high = sorted(mean(_level(end, at_work)) for end in (-LOG_ODDS, LOG_ODDS))
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


def _solve_on(integration: Routed, scores: Mapping[int, SortedScores]) -> dict[int, float]:
    """Return every layer's parameter, solved on logits as they are, or the one that is nearest."""
    target = float(integration.config.target_experts or 0)
    alphas: dict[int, float] = {}
    for layers, mean in _budgets(integration, scores).items():
        alphas |= dict.fromkeys(layers, _bisect(mean, target, integration.config.at_work))
    return alphas


def _budgets(
    integration: Routed, scores: Mapping[int, SortedScores]
) -> dict[tuple[int, ...], Mean]:
    """Return the layers that share a parameter, and their mean as a function of it."""
    means = {layer: _mean(integration, scores[layer]) for layer in integration.layers}
    if integration.config.budget == "layer":
        return {(layer,): mean for layer, mean in means.items()}

    def over_layers(alpha: float) -> float:
        return sum(mean(alpha) for mean in means.values()) / len(means)

    return {tuple(means): over_layers}


def _mean(integration: Routed, scores: SortedScores) -> Mean:
    """Return the function from the parameter to a layer's mean number of experts."""
    config, experts = integration.config, integration.num_experts
    rule = config.at_work

    def mean(alpha: float) -> float:
        if rule.critical_values is not None:
            thresholds: Tensor | None = torch.from_numpy(rule.critical_values(alpha, experts))
        else:
            [thresholds] = thresholds_of([(rule, alpha)], None, 0, experts)
        counts = rule.counts(scores, alpha, thresholds)
        return float(counts.clamp(config.min_k, config.max_k).double().mean())

    return mean


def _bisect(mean: Mean, target: float, rule: Rule) -> float:
    """Return the parameter whose mean comes nearest to the target.

    The mean rises with the level of a test and falls with that of ``min_p`` and ``min_w``.
    """
    low, high = -LOG_ODDS, LOG_ODDS
    ends = mean(_level(low, rule)), mean(_level(high, rule))
    rising = ends[1] >= ends[0]
    nearest = min((abs(ends[0] - target), low), (abs(ends[1] - target), high))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value = mean(_level(middle, rule))
        nearest = min(nearest, (abs(value - target), middle))
        low, high = (middle, high) if (value < target) == rising else (low, middle)
    return _level(nearest[1], rule)


def _level(position: float, rule: Rule) -> float:
    """Return the parameter at a position: log odds, or the log where it has no upper bound."""
    return math.exp(position) if math.isinf(rule.most) else 1 / (1 + math.exp(-position))
