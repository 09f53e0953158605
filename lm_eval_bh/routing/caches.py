"""The cache of keys and values, whose name differs between releases of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")  # from 5.24 on, and before


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a forward pass, None if there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def returned_cache(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache of a model's output as the keyword argument of its next forward pass."""
    name = next((name for name in NAMES if name in output), None)  # 5.24 gives it by both
    return {} if name is None else {name: output[name]}
