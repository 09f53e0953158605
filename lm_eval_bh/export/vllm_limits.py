"""Refuses vLLM settings under which no policy was verified, before weights load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lm_eval_bh.errors import PolicyError
from lm_eval_bh.export.vllm_names import FORCE_VARIABLE

TESTED = ("0.32",)  # releases in which tests ran
READ = ("0.33",)  # releases whose interface was read and is the same


def check_engine(version: str, vllm_config: Any = None, *, joint: bool = False) -> list[str]:
    """Return the doubts that ``LM_EVAL_BH_FORCE=1`` overrides.

    Parameters
    ----------
    version : str
        Release of vLLM.
    vllm_config : VllmConfig, optional
        Configuration of the engine; without it, only the release is checked.
    joint : bool
        Whether tokens that are decoded together are decided together.

    Raises
    ------
    PolicyError
        If policies were not verified with these settings.
    """
    doubts = list(_doubts(version, vllm_config, joint))
    if doubts and os.environ.get(FORCE_VARIABLE) != "1":
        raise PolicyError(
            f"No policy was compared with hf-bh under {doubts[0]}: change that, or set "
            f"{FORCE_VARIABLE}=1 and run lm-eval-bh policy verify."
        )
    return doubts


def _doubts(version: str, vllm_config: Any, joint: bool) -> Iterator[str]:
    if ".".join(version.split(".")[:2]) not in TESTED + READ:
        yield f"vLLM {version} (tested: {', '.join(TESTED)}; read: {', '.join(READ)})"
    if vllm_config is None:
        return
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            yield f"{name}={size}"
    if parallel.enable_expert_parallel:
        yield "expert parallelism"
    if (quantization := vllm_config.model_config.quantization) is not None:
        yield f"quantization={quantization}"
    if joint and vllm_config.speculative_config is not None:
        yield "a method of a step and speculative decoding"
