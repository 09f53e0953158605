"""Previews the selections of a grid of configurations from one unchanged forward pass.

Configurations share work: scores of a layer are sorted once for all rules with the same null model,
and rejections are computed once for all bounds with the same rule and level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.ranked import ranked_scores
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.tables.calibration import listen
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.routing.tables.null_model import NullModel


@dataclass(frozen=True)
class GridRow:
    """The selections of one configuration, over tokens and layers.

    Attributes
    ----------
    config : RoutingConfig
        The configuration.
    mean_experts : float
        Mean experts per token in the configuration's layers, like all following values.
    floor_share, ceiling_share : float
        Shares of tokens with ``min_k`` and with ``max_k`` experts; if these are equal, all tokens
        count as at the ceiling and none as at the floor.
    overlap : float
        Mean Jaccard overlap with the experts that the unchanged model selects.
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
    """Run the unchanged model once, and preview the selections of every configuration.

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
        If the model or the text is unsuitable.
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
                f"{asked} needs passes with the rule applied, but this is one pass of "
                "the unchanged model: give levels."
            )
    layers = [_LayerGrid(layer, router, configs, nulls) for layer, router in enumerate(routers)]
    listen(
        model,
        [router.module for router in routers],
        batches,
        lambda layer, said: layers[layer].add(said),
        progress,
        max(config.max_k for config in configs),
    )
    histogram = torch.stack([grid.histogram.cpu() for grid in layers]).double()
    sums = torch.stack([grid.sums.cpu() for grid in layers])
    return [_row(config, histogram[:, at], sums[:, at]) for at, config in enumerate(configs)]


def _row(config: RoutingConfig, histogram: Tensor, sums: Tensor) -> GridRow:
    """Return the means over a configuration's layers of ``[layers, N + 1]`` and ``[layers, 2]``."""
    chosen = config.select_layers(len(histogram))
    tokens = histogram[chosen].sum(-1, keepdim=True)
    shares = histogram[chosen] / tokens
    # No matrix product, whose last bit depends on the number of layers.
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
        int64 ``[configs, experts + 1]``, numbers of tokens with 0, 1, ... experts.
    sums : Tensor
        float64 ``[configs, 2]``, sums of overlap and mass.
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
        self._layer, self._configs = layer, configs
        self._nulls = [nulls[config.null_kind] if config.needs_null else None for config in configs]
        experts = router.num_experts
        # One method for all levels, since scores do not depend on the level.
        made: dict[object, Method] = {}
        for config, null in zip(configs, self._nulls, strict=True):
            if _scored(config) not in made:
                made[_scored(config)] = fitted_method(config, null, layer, experts)
        self._methods = [made[_scored(config)] for config in configs]
        self._levels = {
            (config.rule, config.alpha): method.level(config.alpha)
            for config, method in zip(configs, self._methods, strict=True)
        }

    def add(self, said: RouterOutput) -> None:
        """Count the selections of each configuration."""
        device = said.logits.device
        self.histogram, self.sums = self.histogram.to(device), self.sums.to(device)
        views: dict[object, _View] = {}
        counts: dict[object, Tensor] = {}
        for at, (config, null) in enumerate(zip(self._configs, self._nulls, strict=True)):
            method = self._methods[at].to(device)
            viewed = _viewed(config)
            if viewed not in views:
                views[viewed] = _View(said, *ranked_scores(method, null, self._layer, said), method)
            if config.adaptive:
                key = viewed, config.rule, config.alpha
                if key not in counts:
                    level = self._levels[config.rule, config.alpha]
                    level = None if level is None else level.to(device)
                    counts[key] = method.count(views[viewed].ranked, level)
                count = counts[key].clamp(config.min_k, config.max_k)
            else:
                count = torch.full(said.logits.shape[:1], config.max_k, device=device)
            self.histogram[at] += torch.bincount(count, minlength=self.histogram.shape[1])
            self.sums[at] += views[viewed].sums(count)


class _View:
    """The experts of a batch of tokens in one order."""

    def __init__(self, said: RouterOutput, ranked: Tensor, order: Tensor, method: Method) -> None:
        self.ranked = ranked
        top_k = said.native_k
        weights = torch.softmax(said.logits.float(), dim=-1)
        native = said.logits.topk(top_k, dim=-1).indices
        if method.follows_router and not method.first_only:  # the router's order of equal logits
            order = said.logits.argsort(dim=-1, descending=True, stable=True)
        taken = torch.arange(1, order.shape[-1] + 1, device=order.device)
        own = torch.zeros_like(weights, dtype=torch.int64).scatter_(-1, native, 1)
        common = own.gather(-1, order).cumsum(-1)
        self._mass = weights.gather(-1, order).cumsum(-1)
        self._overlap = common / (taken + top_k - common)

    def sums(self, count: Tensor) -> Tensor:
        """Return the sums of overlap and mass for these numbers of experts: float64 [2]."""
        last = (count - 1).unsqueeze(-1)
        both = [values.gather(-1, last).sum() for values in (self._overlap, self._mass)]
        return torch.stack(both).double()


def _scored(config: RoutingConfig) -> tuple[object, ...]:
    """Return everything that a method depends on except its level."""
    return config.rule, config.null_kind, config.seed, config.min_k, config.max_k


def _viewed(config: RoutingConfig) -> tuple[object, ...]:
    """Return everything that the ranking of a token's experts depends on."""
    method = config.method
    own = (config.rule, config.seed, config.max_k) if method.random else ()
    return config.null_kind, method.tests, method.first_only and config.max_k, *own
