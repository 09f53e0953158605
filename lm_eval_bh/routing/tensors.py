"""Converts what users may give in place of a tensor."""

from __future__ import annotations

from typing import Any

import torch

from lm_eval_bh.errors import ParameterError


def numbers_of(values: Any, name: str) -> torch.Tensor:
    """Return a tensor from a tensor, an array, or nested lists of numbers.

    Raises
    ------
    ParameterError
        If it is anything else, or lists differ in length.
    """
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ParameterError(
            f"{name} must be a tensor, an array or lists of equal length: found {values!r:.60}."
            if not hasattr(values, "dtype")
            else f"{name} must be of floating-point numbers: found an array of {values.dtype}."
        ) from error
