"""Finds the files shipped with the package: tasks, null models, the demo models.

``tasks/`` and ``kde_models/`` are beside the package in a checkout (where people look for them) and
inside it in an installed wheel.
"""

from __future__ import annotations

import os
from pathlib import Path

from lm_eval_bh.errors import DataError

PACKAGE = Path(__file__).resolve().parent
DEFAULT_MODEL = "allenai/OLMoE-1B-7B-0924"
TINY_OLMOE = "tiny-olmoe"
TINY_GLM = "tiny-glm"
MODELS = (TINY_OLMOE, TINY_GLM)  # shipped models, by their names for ``pretrained=``


def shipped(name: str) -> Path:
    """Return the path of a file or folder shipped with the package, e.g. ``"tasks"``.

    Raises
    ------
        DataError: if it is missing because the installation is damaged.
    """
    for root in (PACKAGE, PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise DataError(
        f"The file {name!r}, which is shipped with lm-eval-bh, is missing from {PACKAGE}: "
        "reinstall the package."
    )


def tiny_olmoe() -> Path:
    """Return the folder of the demo model, loadable with ``from_pretrained``."""
    return shipped(f"models/{TINY_OLMOE}")


def tiny_glm() -> Path:
    """Return the folder of the demo model with a sigmoid router."""
    return shipped(f"models/{TINY_GLM}")


def model_path(pretrained: str) -> str:
    """Return the folder of a shipped model, or any other name unchanged."""
    return str(shipped(f"models/{pretrained}")) if pretrained in MODELS else pretrained


def shipped_policies() -> dict[str, Path]:
    """Return the files of the shipped policies, by their names for ``policy=``."""
    return {path.stem: path for path in shipped("kde_models").glob("policies/*.safetensors")}


def cache_folder() -> Path:
    """Return the user's cache folder of this package (in ``XDG_CACHE_HOME``, if set)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm-eval-bh"
