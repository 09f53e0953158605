"""Exact counters of selections, kept on the device: no sync, no Python per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.routing.methods.steps import Steps, distinct_experts, step_sizes

Selections = Sequence[tuple[int, Picked]]  # (position among the layers, selection)


class LayerSums:
    """Integers summed per layer on their own device; only :meth:`total` waits."""

    def __init__(self, num_layers: int, width: int) -> None:
        self._shape = num_layers, width
        # By device and the layers counted together there; int64 [layers, width].
        self._parts: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def of(self, device: torch.device, layers: tuple[int, ...]) -> Tensor:
        """Return the running sums of some layers on a device, int64 ``[layers, width]``."""
        key = device, layers
        if key not in self._parts:
            with torch.inference_mode(False):  # so that sums can be updated outside of it
                shape = len(layers), self._shape[1]
                self._parts[key] = torch.zeros(shape, dtype=torch.int64, device=device)
        return self._parts[key]

    def total(self) -> Tensor:
        """Return the sums of all layers, int64 ``[num_layers, width]``, on the CPU."""
        total = torch.zeros(self._shape, dtype=torch.int64)
        for (_, layers), part in self._parts.items():
            total[list(layers)] += part.cpu()
        return total


class RoutingCounters:
    """Histogram of experts per token and usage of each expert, layer by layer.

    Parameters
    ----------
    num_layers, num_experts : int
        Numbers of MoE layers and of experts per layer.
    decode_batch : int or None
        How many rows are decoded together; None counts no distinct experts.
    """

    def __init__(self, num_layers: int, num_experts: int, decode_batch: int | None = None) -> None:
        self.num_experts = num_experts
        self.decode_batch = decode_batch
        # Distinct experts summed over steps; then how many steps had 0, 1, ... tokens.
        self._distinct = LayerSums(num_layers, 1)
        self._sizes = LayerSums(num_layers, (decode_batch or 0) + 1)
        # How many tokens got 0, 1, ... experts; then how many tokens each expert served; last,
        # how many slots were unused.
        self._sums = LayerSums(num_layers, 2 * (num_experts + 1))

    def add(
        self, selections: Selections, weight: Tensor | None = None, steps: Steps | None = None
    ) -> None:
        """Count what the layers selected in one forward pass.

        Parameters
        ----------
        selections : sequence of (int, Selection)
            (layer position, selection for ``[tokens]``).
        weight : Tensor or None
            int64 or bool ``[tokens]``, how often each token counts (0 for padding). With None, or
            if its length differs from the selections', every token counts once.
        steps : Steps or None
            Which tokens are decoded together; None counts no distinct experts.
        """
        alike: dict[tuple[torch.device, torch.Size], list[tuple[int, Picked]]] = {}
        for layer, selection in selections:
            key = selection.indices.device, selection.indices.shape
            alike.setdefault(key, []).append((layer, selection))
        for (device, (tokens, slots)), group in alike.items():
            layers = tuple(layer for layer, _ in group)
            indices = torch.stack([selection.indices for _, selection in group])
            if steps is not None and self.decode_batch is not None and len(steps.of) == tokens:
                here = steps._replace(of=steps.of.to(device))
                found = distinct_experts(indices, here, self.num_experts)
                self._distinct.of(device, layers).add_(found.unsqueeze(-1))
                self._sizes.of(device, layers).add_(step_sizes(here, self.decode_batch))
            columns = [
                torch.stack([selection.counts for _, selection in group]),
                indices.flatten(1).add_(self.num_experts + 1),
            ]
            if weight is None or len(weight) != tokens:
                times = [torch.ones((), dtype=torch.int64, device=device)] * 2
            else:
                weight = weight.to(device, torch.int64)
                times = [weight, weight.repeat_interleave(slots)]
            sums = self._sums.of(device, layers)
            for column, once in zip(columns, times, strict=True):
                sums.scatter_add_(1, column, once.expand_as(column))

    @property
    def histogram(self) -> list[Tensor]:
        """How many tokens got 0, 1, ... experts: one int64 ``[experts + 1]`` per layer."""
        return list(self._sums.total()[:, : self.num_experts + 1].unbind())

    @property
    def usage(self) -> list[Tensor]:
        """How many tokens each expert served: one int64 ``[experts]`` per layer."""
        return list(self._sums.total()[:, self.num_experts + 1 : -1].unbind())

    @property
    def distinct(self) -> list[int]:
        """The distinct experts summed over steps: one number per layer."""
        return [int(found) for found in self._distinct.total()]

    @property
    def sizes(self) -> Tensor:
        """How many steps had 0, 1, ... tokens: int64 ``[layers, decode_batch + 1]``."""
        return self._sizes.total()

    def mean_distinct(self) -> float | None:
        """Return the mean number of distinct experts per layer and step; None before any step."""
        steps = int(self.sizes[:, 1:].sum())
        return sum(self.distinct) / steps if steps else None

    def tokens(self, layer: int) -> int:
        """Return how many tokens the layer has seen."""
        return int(self.histogram[layer].sum())

    def mean(self, layer: int | None = None) -> float | None:
        """Return the mean experts per token, of one layer or all; None before any token."""
        return self.moments(layer)[0]

    def moments(self, layer: int | None = None) -> tuple[float | None, float | None]:
        """Return mean and population standard deviation of the experts per token.

        Both are None before any token.
        """
        chosen = self.histogram if layer is None else [self.histogram[layer]]
        histogram = torch.stack(chosen).sum(0).double()
        total = histogram.sum()
        if total == 0:
            return None, None
        counts = torch.arange(self.num_experts + 1, dtype=torch.float64)
        mean = (histogram * counts).sum() / total
        variance = (histogram * (counts - mean) ** 2).sum() / total
        return float(mean), float(variance.sqrt())


def routing_stats(
    counters: RoutingCounters, top_k: int, *, analyze: bool
) -> dict[str, float | None]:
    """Return statistics of experts per token, under the earlier prototype's names.

    ``sparsity_gain`` is one minus the mean's share of the model's own top-k. With
    ``mode=analyze``, the model has run with its own top-k.
    """
    mean, deviation = counters.moments()
    distinct = {}
    if counters.decode_batch is not None and not analyze:
        distinct = {"distinct_experts": counters.mean_distinct()}
    gain = None if mean is None else 1.0 - mean / top_k
    if analyze:
        return {
            "mean_experts_per_token": None if mean is None else float(top_k),
            "std_experts_per_token": None if mean is None else 0.0,
            "sparsity_gain": gain,
            "bh_would_select_mean": mean,
        }
    return {
        "mean_experts_per_token": mean,
        "std_experts_per_token": deviation,
        "sparsity_gain": gain,
        **distinct,
    }
