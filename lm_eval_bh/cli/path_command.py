"""``lm-eval-bh doctor path``: where the files lie that ship with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from lm_eval_bh.cli.options import ShippedName
from lm_eval_bh.cli.printing import say
from lm_eval_bh.resources import MODELS, shipped


def path(
    name: Annotated[ShippedName, typer.Argument(help="What to find.")] = "tiny-olmoe",
) -> None:
    """Print the path of a shipped file or folder, e.g. for `--model_args pretrained=...`."""
    say(shipped(f"models/{name}" if name in MODELS else name))
