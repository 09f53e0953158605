"""``lm-eval-bh path``: tells where what ships lies."""

from __future__ import annotations

from typing import Annotated

import typer

from lm_eval_bh.cli.printing import say
from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.resources import TINY_OLMOE, shipped, tiny_olmoe

NAMES = (TINY_OLMOE, "tasks", "kde_models")


def path(
    name: Annotated[str, typer.Argument(help=f"{TINY_OLMOE}, tasks or kde_models.")] = TINY_OLMOE,
) -> None:
    """Print the path of a shipped file or folder, e.g. for `--model_args pretrained=...`."""
    if name not in NAMES:
        raise ParameterError(
            f"Nothing that ships is called {name!r}: use {TINY_OLMOE}, tasks or kde_models"
            f"{did_you_mean(name, NAMES)}."
        )
    say(tiny_olmoe() if name == TINY_OLMOE else shipped(name))
