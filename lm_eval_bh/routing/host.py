"""Tensors on a CPU as NumPy sees them: for a few tokens calls cost more than the arithmetic does.

NumPy's calls take a third of the time of torch's, and its sort of rows of 64 a 50th.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
# NumPy has no bfloat16, and is slow with the other; zero has the same bits.
_BITS = dict.fromkeys(HALF, torch.int16)


def on_host(tensor: Tensor) -> bool:
    """Whether NumPy may compute on it: it lies on a CPU, needs no gradient, is not compiled."""
    return (
        tensor.is_cpu
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


def exact(values: Tensor) -> Tensor:
    """Return floating-point numbers that need no gradient, as float32 or float64."""
    if values.requires_grad:
        values = values.detach()
    return values.float() if values.dtype in HALF else values


def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors on a CPU, ``[rows, columns]``, hold neither NaN nor infinite values."""
    widths = {tensor.shape[-1] for tensor in tensors}
    if len(widths) > 1:
        return all(map(all_finite, tensors))
    finite = np.isfinite(exact(tensors[0] if len(tensors) == 1 else torch.cat(tensors)).numpy())
    return bool(np.count_nonzero(finite) == finite.size)  # in half the time of all()


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """Return an array that shares the memory of a tensor; a half is its bits, as int16."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    kind = _BITS.get(tensor.dtype)
    array: NDArray[Any] = (tensor if kind is None else tensor.view(kind)).numpy()
    return array


def tensor_of(bits: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Return a tensor that shares the memory of an array that :func:`bits_of` has made."""
    tensor = torch.from_numpy(bits)
    return tensor.view(dtype) if dtype in _BITS else tensor
