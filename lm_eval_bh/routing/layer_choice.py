"""Choices of layers: ``all``, ``last4``, ``first2``, ``0-7``, ``3``, or several by ``+``."""

from __future__ import annotations

import re
from typing import Any

from lm_eval_bh.errors import ParameterError

_LAYERS = r"(all|(first|last)[1-9]\d{0,8}|\d{1,9}(-\d{1,9})?)"


def check_layers(value: Any) -> str:
    """Return a choice of layers as text; ValueError if it is invalid."""
    if isinstance(value, bool) or not re.fullmatch(rf"{_LAYERS}(\+{_LAYERS})*", str(value)):
        raise ValueError
    return str(value)


def chosen_layers(layers: str, num_layers: int) -> list[int]:
    """Return the sorted positions of a choice among ``num_layers`` MoE layers.

    Raises
    ------
    ParameterError
        If the choice reaches beyond the last layer.
    """
    chosen: set[int] = set()
    for part in layers.split("+"):
        if part == "all":
            chosen.update(range(num_layers))
        elif match := re.fullmatch(r"(first|last)(\d+)", part):
            count = int(match[2])
            _check_layer(count - 1, num_layers, layers)
            chosen.update(
                range(count) if match[1] == "first" else range(num_layers - count, num_layers)
            )
        elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            _check_layer(max(first, last), num_layers, layers)
            chosen.update(range(min(first, last), max(first, last) + 1))
    return sorted(chosen)


def _check_layer(layer: int, num_layers: int, pattern: str) -> None:
    if not 0 <= layer < num_layers:
        raise ParameterError(
            f"layers={pattern!r} reaches beyond the model's {num_layers} MoE layers: "
            f"the first is 0, the last {num_layers - 1}."
        )
