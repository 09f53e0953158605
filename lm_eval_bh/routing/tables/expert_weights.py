"""Tables computed from the model's weights, without text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.patching.experts import slot_outputs
from lm_eval_bh.routing.router_reader import RouterReader
from lm_eval_bh.routing.routers import Router, find_routers, router_weight
from lm_eval_bh.routing.tables.measurement import Array, Measurement, experts_beside

TOKENS = 1024  # random hidden states
NORMS = ("post_attention_layernorm", "pre_feedforward_layernorm")  # before the experts


class OfWeights(Measurement):
    """A table computed from the weights layer by layer."""

    @torch.no_grad()
    def run(self, batches: Sequence[Tensor], progress: bool) -> None:
        """Compute every layer's row."""
        routers = find_routers(self.model)
        beside = [experts_beside(self.model, router.module) for router in routers]
        self._rows = [self.row(*both) for both in zip(routers, beside, strict=True)]

    def row(self, router: Router, experts: Any) -> Tensor:
        """Return a layer's row."""
        raise NotImplementedError(f"{type(self).__name__} has to define row.")

    def result(self) -> Array:
        """Return the rows, float64."""
        return np.stack([row.double().cpu().numpy() for row in self._rows])


class Perturbations(OfWeights):
    """Frobenius norms of the change of a layer's output at top-k: ``[layers, native k]``.

    On random normal hidden states; arXiv:2509.02753.
    """

    name = "perturbations"

    def row(self, router: Router, experts: Any) -> Tensor:
        """Return the norms for k = 1 to the native k, where it is 0."""
        weight = router_weight(router.module)
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(TOKENS, weight.shape[1], generator=draw).to(weight)
        said = _asked(router, hidden)
        outputs = slot_outputs(experts, hidden, said.indices)
        weights = said.weights.to(outputs.dtype).unsqueeze(-1)
        native = (weights * outputs).sum(1)
        found = []
        for k in range(1, said.indices.shape[1] + 1):
            first = weights[:, :k]
            if router.normalizes:
                first = first * (weights.sum(1, keepdim=True) / first.sum(1, keepdim=True))
            found.append((native - (first * outputs[:, :k]).sum(1)).norm())
        return torch.stack(found)


class Spectra(OfWeights):
    """How much an expert can magnify its input, ``[layers, experts]``; arXiv:2609.05228.

    The geometric mean over two paths: the norm of the up projection times that of the gate, and the
    norm of the gate times that of the down projection; both inputs are scaled by the norm before
    the experts. The public summaries name the two paths; that the norms are spectral is assumed.
    For experts without a gate the two paths are one.
    """

    name = "spectra"

    def row(self, router: Router, experts: Any) -> Tensor:
        """Return a layer's row."""
        scale = self._scale(router)
        down = _spectral(experts.down_proj)
        if not experts.has_gate:
            return _spectral(_inputs(experts.up_proj, experts) * scale) * down
        gate, up = (
            _spectral(half) for half in (_inputs(experts.gate_up_proj, experts) * scale).chunk(2, 1)
        )
        return ((up * gate) * (gate * down)).sqrt()

    def _scale(self, router: Router) -> Tensor | float:
        """Return the weight of the norm before the experts, 1 if none is found."""
        above = router.name.rsplit(".", 2)[0]
        layer = (
            self.model.get_submodule(above) if above in dict(self.model.named_modules()) else None
        )
        for name in NORMS:
            weight = getattr(getattr(layer, name, None), "weight", None)
            if isinstance(weight, Tensor):
                return weight.double()
        return 1.0


class Responses(OfWeights):
    """Norms of the experts' outputs for the router directions that prefer them.

    ``[layers, experts]``; an expert's direction is its row of the router's projection minus the
    mean of all rows, scaled to a root mean square of 1; arXiv:2609.05228.
    """

    name = "responses"

    def row(self, router: Router, experts: Any) -> Tensor:
        """Return a layer's row."""
        weight = router_weight(router.module).float()
        centred = weight - weight.mean(0)
        hidden = centred / centred.square().mean(-1, keepdim=True).sqrt()
        own = torch.arange(len(hidden), device=hidden.device).unsqueeze(-1)
        outputs = slot_outputs(experts, hidden.to(experts.down_proj.dtype), own)
        norms: Tensor = outputs[:, 0].norm(dim=-1)
        return norms


def _asked(router: Router, hidden: Tensor) -> RouterOutput:
    """Return a router's output for hidden states ``[tokens, hidden]``."""
    forward = type(router.module).forward
    try:
        try:
            output = forward(router.module, hidden)
        except (ValueError, IndexError):  # it takes [batch, length, hidden]
            output = forward(router.module, hidden[None])
    except (TypeError, RuntimeError) as error:
        raise ModelError(
            f"The router {router.name} does not run on hidden states alone ({error}): use a method "
            "that is calibrated on text."
        ) from error
    return RouterReader(router, 1)(router.module, (hidden,), output)


def _inputs(stack: Tensor, experts: Any) -> Tensor:
    """Return projections ``[experts, out, in]``, float64, regardless of how they are stored."""
    return (stack.transpose(1, 2) if experts.is_transposed else stack).double()


def _spectral(stack: Tensor) -> Tensor:
    """Return the largest singular value of each matrix, float64 ``[experts]``."""
    return torch.stack([torch.linalg.matrix_norm(matrix.double(), 2) for matrix in stack])
