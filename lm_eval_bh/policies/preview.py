"""Previews the selections of a grid of configurations from one unchanged forward pass.

Configurations share work: scores of a layer are sorted once for all rules with the same null model,
and rejections are computed once for all bounds with the same rule and level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.methods.steps import Steps, distinct_experts
from lm_eval_bh.routing.ranked import ranked_scores
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.step_target import served
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
    distinct_experts : float or None
        Mean number of different experts of a layer and step, where ``decode_batch`` is given.
    """

    config: RoutingConfig
    mean_experts: float
    floor_share: float
    ceiling_share: float
    overlap: float
    retained_mass: float
    layer_means: tuple[float, ...]
    distinct_experts: float | None


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
        Token ids without padding; of ``decode_batch`` rows where configurations have one.
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
        if config.method.joint and config.decode_batch is None:
            raise ParameterError(
                f"rule={config.rule} decides for the rows that are decoded together: say by "
                "decode_batch how many these are."
            )
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
        max(grid.asks(router.top_k) for grid, router in zip(layers, routers, strict=True)),
    )
    histogram = torch.stack([grid.histogram.cpu() for grid in layers]).double()
    sums = torch.stack([grid.sums.cpu() for grid in layers])
    distinct = torch.tensor([grid.distinct for grid in layers], dtype=torch.float64)
    distinct /= torch.tensor([grid.steps for grid in layers]).clamp(min=1)
    return [
        _row(config, histogram[:, at], sums[:, at], distinct[:, at])
        for at, config in enumerate(configs)
    ]


def _row(config: RoutingConfig, histogram: Tensor, sums: Tensor, distinct: Tensor) -> GridRow:
    """Return the means over a configuration's layers of ``[layers, ...]``."""
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
        None if config.decode_batch is None else float(distinct[chosen].mean()),
    )


class _LayerGrid:
    """Sums over the tokens of one layer, on the device.

    Attributes
    ----------
    histogram : Tensor
        int64 ``[configs, experts + 1]``, numbers of tokens with 0, 1, ... experts.
    sums : Tensor
        float64 ``[configs, 2]``, sums of overlap and mass.
    distinct, steps : list of int
        Distinct experts summed over steps, and number of steps, of each configuration.
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
        self.distinct, self.steps = [0] * len(configs), [0] * len(configs)
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

    def asks(self, native_k: int) -> int:
        """Return how many experts the router has to rank."""
        joint = [method.asks(native_k) for method in self._methods if method.joint]
        most: int = max(joint + [config.max_k for config in self._configs])
        return most

    def add(self, said: RouterOutput) -> None:
        """Count the selections of each configuration."""
        device, number = said.logits.device, said.logits.shape[-1]
        self.histogram, self.sums = self.histogram.to(device), self.sums.to(device)
        weights = F.pad(torch.softmax(said.logits.float(), dim=-1), (0, 1))  # unused slots: none
        native = said.logits.topk(said.native_k, dim=-1).indices
        own = torch.zeros_like(weights).scatter_(-1, native, 1)
        ranked: dict[object, tuple[Tensor, Tensor]] = {}
        counts: dict[object, Tensor] = {}
        for at, config in enumerate(self._configs):
            experts = self._experts(at, said, ranked, counts)
            count = (experts < number).sum(-1)
            self.histogram[at] += torch.bincount(count, minlength=self.histogram.shape[1])
            common = own.gather(-1, experts).sum(-1)
            overlap = common / (count + said.native_k - common)
            mass = weights.gather(-1, experts).sum()
            self.sums[at] += torch.stack([overlap.sum(), mass]).double()
            if config.decode_batch is not None:
                assert said.step is not None
                steps = Steps(said.step, int(said.step.max()) + 1)
                self.distinct[at] += int(distinct_experts(experts[None], steps, number))
                self.steps[at] += steps.number

    def _experts(
        self,
        at: int,
        said: RouterOutput,
        ranked: dict[object, tuple[Tensor, Tensor]],
        counts: dict[object, Tensor],
    ) -> Tensor:
        """Return what a configuration selects, int64 ``[tokens, max_k]``."""
        config, method = self._configs[at], self._methods[at].to(said.logits.device)
        if method.joint:
            return served(method, said, config.alpha)
        viewed = _viewed(config)
        if viewed not in ranked:
            scores, order = ranked_scores(method, self._nulls[at], self._layer, said)
            if method.follows_router and not method.first_only:  # equal logits have its own order
                order = said.logits.argsort(dim=-1, descending=True, stable=True)
            ranked[viewed] = scores, order
        scores, order = ranked[viewed]
        order = order[:, : config.max_k]
        if not config.adaptive:
            return order
        key = viewed, config.rule, config.alpha
        if key not in counts:
            level = self._levels[config.rule, config.alpha]
            level = None if level is None else level.to(said.logits.device)
            counts[key] = method.count(scores, level)
        count = counts[key].clamp(config.min_k, config.max_k).unsqueeze(-1)
        used = torch.arange(config.max_k, device=order.device) < count
        return torch.where(used, order, method.num_experts)


def _scored(config: RoutingConfig) -> tuple[object, ...]:
    """Return everything that a method depends on except its level."""
    return config.rule, config.null_kind, config.seed, config.min_k, config.max_k


def _viewed(config: RoutingConfig) -> tuple[object, ...]:
    """Return everything that the ranking of a token's experts depends on."""
    method = config.method
    own = (config.rule, config.seed, config.max_k) if method.random else ()
    return config.null_kind, method.tests, method.first_only and config.max_k, *own
