"""``lm-eval-bh import-kde``: converts the null models of the earlier prototype."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lm_eval_bh.cli.printing import say
from lm_eval_bh.files import check_output


def import_kde(
    folder: Annotated[
        Path, typer.Argument(help="Folder of distribution_model_layer_<i>.pkl files.")
    ],
    output: Annotated[Path, typer.Option(help="Null model file to write.")],
    model: Annotated[
        str | None, typer.Option(help="Name of the model that the tables belong to.")
    ] = None,
) -> None:
    """Convert the pickles of the earlier prototype, without executing anything in them."""
    from lm_eval_bh.routing.tables.null_model import NullModel

    check_output(output, "--output")
    null = NullModel.from_pickles(folder, model=model)
    null.save(output)
    say(f"{null.num_layers} layers written to {output}")
