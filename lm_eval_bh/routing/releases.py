"""Differences between releases of transformers from 5.19, which vLLM needs, to 5.24."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor

NAMES = ("cache", "past_key_values")  # argument of the cache: since 5.24, and before
# Router classes that return (logits, weights, indices) since a release.
TRIPLES = {
    "AriaTextTopKRouter": "5.21",
    "GraniteMoeTopKRouter": "5.21",
    "GraniteMoeHybridTopKRouter": "5.21",
    "GraniteMoeSharedTopKRouter": "5.21",
}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a forward pass, None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def returned_cache(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache of a model's output as the keyword argument of its next forward pass."""
    name = next((name for name in NAMES if name in output), None)  # 5.24 has both
    return {} if name is None else {name: output[name]}


def after_expert(module: Any, out: Tensor) -> Tensor:
    """Apply a family's function to each expert's output; there is none before 5.20."""
    normed: bool = getattr(module, "has_post_expert_norm", False)
    return module.post_expert_norm(out) if normed else out


def unsupported(router: str) -> str:
    """Return why routers of a class are unsupported, as the end of a sentence."""
    if router in TRIPLES:
        return (
            f"this family needs transformers {TRIPLES[router]} or later, and this is "
            f"{transformers.__version__}."
        )
    return "routers of this family are not supported."
