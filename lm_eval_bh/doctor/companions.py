"""Checks that companions of torch, which vLLM installs for example, fit this torch."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from importlib.util import find_spec

from lm_eval_bh.doctor.finding import PROBLEM, Finding

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def check_companions() -> Iterator[Finding]:
    """Yield companions that cannot be loaded, which also breaks transformers.

    Text models need none of them.
    """
    for name in COMPANIONS:
        if find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            torch = importlib.metadata.version("torch")
            yield Finding(
                name,
                f"{importlib.metadata.version(name)} does not fit torch {torch}: {reason}",
                PROBLEM,
                f"pip uninstall {name}, which text models do not need",
            )
