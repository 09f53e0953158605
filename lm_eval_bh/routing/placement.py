"""The device and dtype of a model, checked before its weights load."""

from __future__ import annotations

from typing import Any

import torch

from lm_eval_bh.errors import ParameterError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16", "float64")
LM_EVAL_DEFAULT = "cuda:0"  # default of lm_eval's --device
# Devices that lm-eval takes without an index; others need type and index.
WITHOUT_INDEX = ("cpu", "cuda", "mps")
KINDS = (*WITHOUT_INDEX, "npu", "xpu", "hpu")


def placement(device: Any = None, dtype: Any = "auto", unset: str | None = None) -> dict[str, Any]:
    """Return device and dtype as lm-eval and transformers expect them.

    For an unknown device, lm-eval would silently run on the CPU.

    Parameters
    ----------
    device : str or None
        Such as ``cpu``, ``cuda`` or ``cuda:1``; None takes CUDA if available, else the CPU.
    dtype : str, torch.dtype or None
        "auto", or a floating-point type in which models compute, or its name.
    unset : str or None
        A device that counts as None on a machine without CUDA: the caller's default when the user
        named none.

    Returns
    -------
    dict
        With the keys ``device`` and ``dtype``.

    Raises
    ------
    ParameterError
        If the machine lacks the device, or models cannot compute in the type.
    """
    unnamed = device == unset and not torch.cuda.is_available()
    return {"device": _usable_device(None if unnamed else device), "dtype": _usable_dtype(dtype)}


def _usable_device(device: Any) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = str(device).partition(":")
    if kind not in KINDS or not (index.isdecimal() or str(device) == kind):
        raise ParameterError(
            f"device must be cpu, cuda or, for example, cuda:1, not {str(device)!r}"
            f"{did_you_mean(kind, KINDS)}."
        )
    try:
        found = torch.device(str(device))
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ParameterError(
            f"device={str(device)!r} cannot be used ({reason}); use cpu, or leave it out for cuda "
            "if this machine has it."
        ) from error
    if found.type == "cpu" or (found.index is None and found.type in WITHOUT_INDEX):
        return found.type
    return f"{found.type}:{found.index or 0}"


def _usable_dtype(dtype: Any) -> Any:
    known = [getattr(torch, name) for name in DTYPES]
    if dtype in (None, "auto", *known) or getattr(torch, str(dtype), None) in known:
        return dtype
    raise ParameterError(f"dtype must be auto, {', '.join(DTYPES)}, not {str(dtype)!r}.")
