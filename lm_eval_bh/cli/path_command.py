"""``lm-eval-bh path``: tells where what ships lies."""

from __future__ import annotations

from typing import Annotated

import typer

from lm_eval_bh.cli.printing import say
from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.resources import MODELS, TINY_OLMOE, shipped

NAMES = (*MODELS, "tasks", "kde_models")
LISTED = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"


def path(
    name: Annotated[str, typer.Argument(help=f"{LISTED}.")] = TINY_OLMOE,
) -> None:
    """Print the path of a shipped file or folder, e.g. for `--model_args pretrained=...`."""
    if name not in NAMES:
        raise ParameterError(
            f"Nothing that ships is called {name!r}: use {LISTED}{did_you_mean(name, NAMES)}."
        )
    say(shipped(f"models/{name}" if name in MODELS else name))
