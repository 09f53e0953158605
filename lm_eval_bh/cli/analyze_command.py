"""``lm-eval-bh analyze``: what a grid of configurations would select, from one pass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Length,
    NullFrom,
    NullScope,
    Pretrained,
    Statistic,
)
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.cli.word_lists import numbers, words
from lm_eval_bh.files import check_output, replacing
from lm_eval_bh.resources import model_path

if TYPE_CHECKING:
    from rich.table import Table

    from lm_eval_bh.policies.preview import GridRow


def analyze(
    pretrained: Pretrained,
    rules: Annotated[str, typer.Option(help="Selection rules, joined by commas.")] = "topk,bh",
    alphas: Annotated[str, typer.Option(help="Levels, joined by commas.")] = "0.3,0.4,0.5,0.6",
    max_k: Annotated[
        str, typer.Option(help="Largest numbers of experts, joined by commas.")
    ] = "8,16,32,64",
    min_k: Annotated[int, typer.Option(help="Smallest number of experts.")] = 1,
    statistic: Statistic = "logit",
    null_scope: NullScope = "layer",
    null_from: NullFrom = "all",
    null_model: Annotated[
        str, typer.Option("--null-model", "--kde", help="Null model file, or auto.")
    ] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one document per paragraph; default: WikiText-2's test text."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to read.")] = 65536,
    length: Length = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the table, to this JSON file.")
    ] = None,
) -> None:
    """Show what each rule, level and max_k would select, from one pass of the unchanged model."""
    with on_interrupt(NOTHING_HALF_WRITTEN):
        from lm_eval_bh.policies.pretrained import analyze_pretrained
        from lm_eval_bh.routing.parameter_grid import grid_of

        configs = grid_of(
            words(rules),
            numbers("alphas", alphas, float),
            numbers("max-k", max_k, int),
            min_k=min_k,
            statistic=statistic,
            null_scope=null_scope,
            null_from=null_from,
        )
        if output is not None:
            check_output(output, "--output")
        rows, seen = analyze_pretrained(
            model_path(pretrained),
            configs,
            name=pretrained,
            null_model=null_model,
            text=text,
            tokens=tokens,
            length=length,
            batch=batch_size,
            dtype=dtype,
            device=device,
        )
    show(_table(f"What {pretrained} would select on {seen} tokens", rows))
    say(
        "The model ran unchanged. At work, a rule changes the hidden states and with them the "
        "router logits of the layers above, so the mean number of experts differs."
    )
    if output is not None:
        content = {"tokens": seen, "rows": [_plain(row) for row in rows]}
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"Written to {output}")


def _plain(row: GridRow) -> dict[str, object]:
    """Return a row as JSON knows it; a rule without a level has a null alpha."""
    config = row.config.as_dict() | ({} if row.config.adaptive else {"alpha": None})
    return dataclasses.asdict(row) | {"config": config}


def _table(title: str, rows: list[GridRow]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    names = ("rule", "alpha", "max_k", "mean experts", "floor (%)", "ceiling (%)")
    for column in (*names, "overlap with its top-k", "softmax mass"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for row in rows:
        table.add_row(
            row.config.rule,
            f"{row.config.alpha:g}" if row.config.adaptive else "",
            str(row.config.max_k),
            f"{row.mean_experts:.2f}",
            f"{100 * row.floor_share:.1f}",
            f"{100 * row.ceiling_share:.1f}",
            f"{row.overlap:.3f}",
            f"{row.retained_mass:.3f}",
        )
    return table
