"""What every configuration of a grid would select, from one forward pass of the unchanged model.

Configurations share what they can: the sort of a layer's statistics is made once for all rules with
the same null model, the rejections once for all bounds of the same rule and level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.nulls.calibration import listen
from lm_eval_bh.routing.nulls.null_kind import NullKind
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.rules.sorted_scores import SortedScores
from lm_eval_bh.routing.rules.thresholds import thresholds_of
from lm_eval_bh.routing.selector import Selector, sort_scores


@dataclass(frozen=True)
class GridRow:
    """What one configuration would select, over tokens and layers.

    Attributes
    ----------
    config : RoutingConfig
        The configuration.
    mean_experts : float
        Mean number of experts a token in the configuration's layers, as all that follows.
    floor_share, ceiling_share : float
        Shares of tokens with ``min_k`` and with ``max_k`` experts; where these are equal all are at
        the ceiling and none at the floor.
    overlap : float
        Mean Jaccard overlap with the experts that the model itself takes.
    retained_mass : float
        Mean share of a token's softmax weight that the selected experts hold.
    layer_means : tuple of float
        Mean number of experts of each of the configuration's layers.
    """

    config: RoutingConfig
    mean_experts: float
    floor_share: float
    ceiling_share: float
    overlap: float
    retained_mass: float
    layer_means: tuple[float, ...]


def analyze_grid(
    model: nn.Module,
    routers: Sequence[Router],
    batches: Iterable[Tensor],
    configs: Sequence[RoutingConfig],
    nulls: Mapping[NullKind, NullModel],
    progress: bool = True,
) -> list[GridRow]:
    """Run the unchanged model once, and say what every configuration would have selected.

    Parameters
    ----------
    model, routers : nn.Module, sequence of Router
        A mixture-of-experts model and its routers, whose weights are a softmax of their logits.
    batches : iterable of Tensor, int64 [batch, length]
        Token ids without padding.
    configs : sequence of RoutingConfig
        The grid.
    nulls : mapping of NullKind to NullModel
        A null model for every configuration that needs one.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    list of GridRow
        In the order of ``configs``.

    Raises
    ------
    ParameterError
        If a configuration does not fit the model.
    ModelError, DataError
        If the model or the text cannot serve.
    """
    if not all(router.softmax for router in routers):
        raise ParameterError(
            "The weights of these routers are not a softmax of their logits, so there is no mass "
            "to retain: use mode=analyze with one configuration."
        )
    for config in configs:
        config.check_experts(routers[0].num_experts)
        if config.solves:
            asked = "family=all" if config.target_experts is None else "target_experts"
            raise ParameterError(
                f"{asked} needs the rule at work, which a pass of "
                "the unchanged model is not: give levels."
            )
    layers = [_LayerGrid(layer, router, configs, nulls) for layer, router in enumerate(routers)]
    listen(
        model,
        [router.module for router in routers],
        batches,
        lambda layer, logits, hidden_states: layers[layer].add(logits, hidden_states),
        progress,
    )
    histogram = torch.stack([grid.histogram.cpu() for grid in layers]).double()
    sums = torch.stack([grid.sums.cpu() for grid in layers])
    return [_row(config, histogram[:, at], sums[:, at]) for at, config in enumerate(configs)]


def _row(config: RoutingConfig, histogram: Tensor, sums: Tensor) -> GridRow:
    """Return the means over a configuration's layers of ``[layers, N + 1]`` and ``[layers, 2]``."""
    chosen = config.select_layers(len(histogram))
    tokens = histogram[chosen].sum(-1, keepdim=True)
    shares = histogram[chosen] / tokens
    # No matrix product, whose last bit depends on how many layers there are.
    means = (shares * torch.arange(shares.shape[-1], dtype=torch.float64)).sum(-1)
    floor = float(shares[:, config.min_k].mean()) if config.min_k < config.max_k else 0.0
    overlap, mass = (sums[chosen] / tokens).mean(0).tolist()
    return GridRow(
        config,
        float(means.mean()),
        floor if config.adaptive else 0.0,
        float(shares[:, config.max_k].mean()),
        overlap,
        mass,
        tuple(means.tolist()),
    )


class _LayerGrid:
    """Sums over the tokens of one layer, on the device.

    Attributes
    ----------
    histogram : Tensor
        int64 ``[configs, experts + 1]``, how many tokens would get 0, 1, ... experts.
    sums : Tensor
        float64 ``[configs, 2]``, of the overlap and of the mass.
    """

    def __init__(
        self,
        layer: int,
        router: Router,
        configs: Sequence[RoutingConfig],
        nulls: Mapping[NullKind, NullModel],
    ) -> None:
        self.histogram = torch.zeros(len(configs), router.num_experts + 1, dtype=torch.int64)
        self.sums = torch.zeros(len(configs), 2, dtype=torch.float64)
        self._layer, self._router, self._configs = layer, router, configs
        self._nulls = [nulls[config.null_kind] if config.needs_null else None for config in configs]
        self._selectors: dict[object, Selector] = {}
        for kind in {config.null_kind for config in configs}:
            some = {_rule_of(c): c for c in configs if c.null_kind == kind}
            rules = [(RULES[c.rule], c.alpha) for c in some.values()]
            null, experts = nulls.get(kind), router.num_experts
            found = thresholds_of(rules, null, layer, experts)
            for (key, config), thresholds in zip(some.items(), found, strict=True):
                self._selectors[key] = Selector(config, null, layer, experts, thresholds=thresholds)

    def add(self, router_logits: Tensor, hidden_states: Tensor) -> None:
        """Count what each configuration selects for ``[tokens, experts]``, ``[tokens, hidden]``."""
        self.histogram = self.histogram.to(router_logits.device)
        self.sums = self.sums.to(router_logits.device)
        views: dict[object, _View] = {}
        called_for: dict[object, Tensor] = {}
        for at, (config, null) in enumerate(zip(self._configs, self._nulls, strict=True)):
            key, selector = _rule_of(config), self._selectors[_rule_of(config)]
            view_key: object = config.null_kind, config.at_work.alone and config.max_k
            if selector.rule.random:
                view_key = (config.seed, config.max_k)
            if view_key not in views:
                order = None
                scores = sort_scores(router_logits, null, self._layer, config, hidden_states)
                if selector.rule.random:
                    order = selector.draw(router_logits, config.max_k)
                views[view_key] = _View(router_logits, scores, order, self._router.top_k)
            view = views[view_key]
            if selector.rule.fixed_count:
                count = torch.full(
                    router_logits.shape[:1], config.max_k, device=router_logits.device
                )
            else:
                if key not in called_for:
                    called_for[key] = selector.count(view.scores)
                count = called_for[key].clamp(config.min_k, config.max_k)
            self.histogram[at] += torch.bincount(count, minlength=self.histogram.shape[1])
            self.sums[at] += view.sums(count)


class _View:
    """The experts of a batch of tokens in one order."""

    def __init__(
        self, router_logits: Tensor, scores: SortedScores, order: Tensor | None, top_k: int
    ) -> None:
        self.scores = scores
        order = scores.experts if order is None else order
        taken = torch.arange(1, router_logits.shape[-1] + 1, device=router_logits.device)
        if order is None:  # that of the logits
            self._mass = scores.cumulative_weights
            common = taken.clamp(max=top_k)
        else:
            weights = torch.softmax(router_logits.to(scores.ascending.dtype), dim=-1)
            self._mass = weights.gather(-1, order).cumsum(-1)
            own = torch.zeros_like(weights, dtype=torch.int64)
            own.scatter_(-1, router_logits.topk(top_k, dim=-1).indices, 1)
            common = own.gather(-1, order).cumsum(-1)
            taken = taken[: order.shape[-1]]
        self._overlap = (common / (taken + top_k - common)).expand_as(self._mass)

    def sums(self, count: Tensor) -> Tensor:
        """Return the sums of overlap and mass, where tokens have so many experts: float64 [2]."""
        last = (count - 1).unsqueeze(-1)
        both = [values.gather(-1, last).sum() for values in (self._overlap, self._mass)]
        return torch.stack(both).double()


def _rule_of(config: RoutingConfig) -> tuple[object, ...]:
    """Return what the number of rejections depends on; the bounds are not in it."""
    return config.rule, config.alpha, config.null_kind, config.seed
