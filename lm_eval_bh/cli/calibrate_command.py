"""``lm-eval-bh calibrate``: fits a null model, and shows how well it fits other text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.options import (
    NULL,
    TRAINING_TEXT,
    BatchSize,
    Device,
    Dtype,
    KernelName,
    Model,
    NullFrom,
    NullScope,
    Statistic,
    Window,
)
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.cli.word_lists import words
from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.files import check_output, figure_format
from lm_eval_bh.resources import model_path

if TYPE_CHECKING:
    from rich.table import Table

    from lm_eval_bh.routing.tables.null_health import LayerHealth
    from lm_eval_bh.routing.tables.null_model import NullModel


def calibrate(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; default: the cache that null_model=auto reads."),
    ] = None,
    text_file: Annotated[
        Path | None, typer.Option("--text-file", "--text", help=TRAINING_TEXT)
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens to fit on; calibrate holds out an eighth as many for the check."
        ),
    ] = 65536,
    window: Window = 512,
    batch_size: BatchSize = 8,
    trim: Annotated[
        int,
        typer.Option(
            min=0,
            help="Leave out this many of each token's largest and smallest logits.",
            rich_help_panel=NULL,
        ),
    ] = 0,
    kernel: Annotated[
        KernelName, typer.Option(help="Kernel of the density estimate.", rich_help_panel=NULL)
    ] = "gaussian",
    statistic: Statistic = "logit",
    null_scope: NullScope = "layer",
    null_from: NullFrom = "all",
    tables: Annotated[
        list[str] | None,
        typer.Option(
            help="Further tables that methods need, joined by commas, such as ratios for naee.",
            rich_help_panel=NULL,
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the check: a .png, .pdf or .svg file.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Fit a null model to the router logits of a model, and check it on held-out text."""
    with on_interrupt(NOTHING_HALF_WRITTEN):
        from lm_eval_bh.policies.pretrained import calibrate_pretrained
        from lm_eval_bh.routing.tables.find import cached_null
        from lm_eval_bh.routing.tables.null_kind import NullKind

        measured = _known(words(tables or []))
        kind = NullKind(statistic, null_scope, trim, null_from, tables=measured)
        check_output(output or cached_null("new"), "--output")
        if figure is not None:
            figure_format(figure)
            check_output(figure, "--figure")
            if output is not None and figure.resolve() == output.resolve():
                raise ParameterError(
                    f"--figure and --output name the same file, {output}: use two names."
                )
        fitted, health, path = calibrate_pretrained(
            model_path(model),
            name=model,
            text=text_file,
            output=output,
            tokens=tokens,
            length=window,
            batch=batch_size,
            kind=kind,
            kernel=kernel,
            dtype=dtype,
            device=device,
        )
    if not health:
        say(
            f"The fit took all tokens of the text (--tokens {tokens}), so no check was possible: "
            "lower --tokens to keep some for it."
        )
    else:
        show(_table(model, fitted, health))
        say(f"Checked on {health[0].tokens} held-out tokens.")
    say(f"Written to {path}")
    if figure is not None and health:
        from lm_eval_bh.analysis.show.health_figure import draw_health

        rows = [dataclasses.asdict(row) for row in health]
        draw_health(rows, f"Null model of {model}, {statistic}, {kind.null_scope}", figure)
        say(f"Written to {figure}")


def _known(names: list[str]) -> tuple[str, ...]:
    """Return the names of tables in order; a :class:`ParameterError` says which is unknown."""
    from lm_eval_bh.routing.methods.scores import STATISTICS
    from lm_eval_bh.routing.tables.measurement import TABLES

    known = sorted(TABLES.keys() - {row.table for row in STATISTICS.values()})
    for name in names:
        if name not in known:
            raise ParameterError(
                f"--tables has no table {name!r}{did_you_mean(name, known)}; "
                f"use {', '.join(known)}."
            )
    return tuple(sorted(set(names)))


def _table(model: str, fitted: NullModel, health: list[LayerHealth]) -> Table:
    """Return how well each layer fits."""
    from rich.table import Table

    table = Table(
        title=f"Null model of {model}: {fitted.num_layers} layers, {fitted.header.tokens} tokens"
    )
    for column in ("layer", "bandwidth", "KS distance from uniform", "p = 0 (%)", "p = 1 (%)"):
        table.add_column(column, justify="right")
    widths = fitted.header.bandwidth
    for row in health:
        table.add_row(
            str(row.layer),
            "" if widths is None else f"{widths[row.layer]:.4f}",
            f"{row.ks_distance:.4f}",
            f"{100 * row.ceiling_share:.3f}",
            f"{100 * row.floor_share:.3f}",
        )
    return table
