"""The gain ``affine``: restores the mean and deviation of a layer's routed output.

Fewer experts change the distribution of a layer's output, on which everything after it was trained.
A scale and a shift per channel restore it. They act on the output and not on weights, so no
engine's router can apply them: only hf-bh has this gain.

Kim, Soro and Hwang 2026, "Distribution-consistent inference for dynamic sparse mixture-of-experts",
arXiv:2609.09241. The abstract leaves open what is aligned: here it is the sum of a layer's routed
experts, on calibration text, layer by layer, so that each fit sees the output of the corrected
layers below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_bh.routing.heard import calibration_batches
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.patching.hook import RouterHook
from lm_eval_bh.routing.patching.patch import Patch
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.tables.listening import listen
from lm_eval_bh.routing.tables.measurement import experts_beside

Array = NDArray[np.float64]
FLAT = 1e-12  # a channel with a smaller deviation is not scaled


class AffineHook:
    """A forward hook of a layer's experts: scales and shifts their summed output."""

    def __init__(self, patch: Patch, table: Array) -> None:
        self.patch, self._table = patch, torch.from_numpy(table)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return the corrected output ``[tokens, hidden]``."""
        exact = torch.promote_types(output.dtype, torch.float32)
        if self._table.device != output.device or self._table.dtype != exact:
            self._table = self._table.to(output.device, exact)
        scale, shift = self._table
        aligned: Tensor = output.to(exact) * scale + shift
        return aligned.to(output.dtype)


class Routed(Protocol):
    """The model to correct, which can run with and without the rule."""

    model: nn.Module
    routers: list[Router]
    affine: Array | None

    @property
    def layers(self) -> list[int]:
        """The layers that the rule applies to."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


def align(
    model: nn.Module,
    patch: Patch,
    hooks: Iterable[tuple[Router, RouterHook]],
    table: Array | None,
) -> None:
    """Add a hook beside each router's, where a correction was fitted."""
    for router, hook in hooks if table is not None else ():
        assert table is not None
        experts = experts_beside(model, router.module)
        experts.register_forward_hook(AffineHook(patch, table[hook.layer]))


def fit_affine(routed: Routed, tokenizer: Any, texts: Sequence[str] | None) -> Array:
    """Return scales and shifts, float64 ``[layers, 2, hidden]``; 1 and 0 in unrouted layers.

    It takes one pass over the text on which parameters are solved, and one more per layer; see
    :func:`~lm_eval_bh.routing.target.solve`.
    """
    batches = calibration_batches(routed.model, tokenizer, texts)
    layers, modules = routed.layers, [router.module for router in routed.routers]
    native = _moments(routed, modules, layers, batches)
    width = len(native[layers[0]][0])
    found = np.tile(np.stack([np.ones(width), np.zeros(width)]), (len(modules), 1, 1))
    for layer in layers:
        routed.affine = found
        with routed:
            mean, deviation = _moments(routed, modules, [layer], batches)[layer]
        wanted_mean, wanted = native[layer]
        scale = np.where(deviation > FLAT, wanted / np.maximum(deviation, FLAT), 1.0)
        found[layer] = scale, wanted_mean - scale * mean
    return found


def _moments(
    routed: Routed, modules: Sequence[nn.Module], layers: Sequence[int], batches: Sequence[Tensor]
) -> dict[int, tuple[Array, Array]]:
    """Return mean and deviation of the routed output of some layers, over all tokens."""
    sums: dict[int, Tensor] = {}
    tokens = dict.fromkeys(layers, 0)

    def note(layer: int) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor) -> None:
            values = output.double()
            both = torch.stack([values.sum(0), values.square().sum(0)]).cpu()
            sums[layer] = sums[layer] + both if layer in sums else both
            tokens[layer] += len(values)

        return add

    def ignore(layer: int, said: RouterOutput) -> None: ...

    handles = [
        experts_beside(routed.model, modules[layer]).register_forward_hook(note(layer))
        for layer in layers
    ]
    try:
        listen(routed.model, modules, batches, ignore, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer in layers:
        mean, square = (sums[layer] / tokens[layer]).numpy()
        found[layer] = mean, np.sqrt(np.maximum(square - mean**2, 0))
    return found
