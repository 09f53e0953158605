"""``lm-eval-bh route-diff``: how two routing logs of the same texts differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.options import share_of
from lm_eval_bh.cli.printing import say, say_written, show, warn
from lm_eval_bh.errors import ParameterError, RoutingError
from lm_eval_bh.files import check_output, figure_format, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from lm_eval_bh.analysis.compare.route_diff import RouteDiff

SHOWN = 5  # swaps


def route_diff(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A run of log_routing=full, or an imported trace.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one to compare with it.")],
    output: Annotated[Path | None, typer.Option(help="Also write all numbers: a .json.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw them: a .png, .pdf or .svg file.")
    ] = None,
    fail_above: Annotated[
        str | None,
        typer.Option(
            help="Exit code 1 if more pairs of a token and a layer differ: 1% or 0.01.",
        ),
    ] = None,
) -> None:
    """Compare which experts served the same tokens in two routing logs.

    Tokens are the same where their ids and those of all tokens before them are.
    """
    most = None if fail_above is None else share_of(fail_above, "--fail-above", or_none_at_all=True)
    if output is not None:
        if output.suffix.lower() != ".json":
            raise ParameterError(f"--output {output} must end in .json.")
        check_output(output, "--output")
    if figure is not None:
        figure_format(figure)
        check_output(figure, "--figure")
    with on_interrupt(NOTHING_HALF_WRITTEN):
        from lm_eval_bh.analysis.compare.route_diff import diff_routes
        from lm_eval_bh.logged_rows import read_logged_rows

        logs = read_logged_rows(a), read_logged_rows(b)
        found = diff_routes(*logs)
        for letter, path, log in zip("AB", (a, b), logs, strict=True):
            say(f"{letter}: {path}, {len(log.token_ids):,} tokens")
        show(_table(found))
        for sentence in _sentences(found):
            say(sentence)
        for note in _notes(found):
            warn(f"note: {note}")
        if output is not None:
            content = {"a": str(a), "b": str(b), **found.as_dict()}
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
            say_written([write_text(output, text)])
        if figure is not None:
            from lm_eval_bh.analysis.show.route_figure import draw_routes

            draw_routes(found, (str(a), str(b)), figure)
            say_written([figure])
    if most is not None and found.share > most:
        raise RoutingError(
            f"{100 * found.share:.3g} % of the pairs of a token and a layer have other experts, "
            f"and --fail-above allows {100 * most:g} %: look at the layers above."
        )


def _table(found: RouteDiff) -> Table:
    """Return one row a layer, and one for all."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("layer", "differ (%)", "Jaccard", "experts A", "experts B", "weight (%)"):
        table.add_column(name, justify="right")
    rows = [(str(row["layer"]), row) for row in found.layers.to_dict(orient="records")]
    for name, row in [*rows, ("all", found.layers.mean())]:
        table.add_row(
            name,
            f"{100 * row['differ']:.3g}",
            f"{row['jaccard']:.4f}",
            f"{row['experts_a']:.2f}",
            f"{row['experts_b']:.2f}",
            "" if row["weight_a"] != row["weight_a"] else f"{100 * row['weight_a']:.3g}",
        )
    return table


def _sentences(found: RouteDiff) -> list[str]:
    from lm_eval_bh.analysis.show.route_figure import swap_name

    differ = int((found.layers["differ"] > 0).sum())
    said = [
        f"Other experts: {found.tokens_differ:,} of {found.tokens:,} tokens "
        f"({100 * found.tokens_differ / found.tokens:.3g} %), {differ} of {len(found.layers)} "
        f"layers, {found.pairs_differ:,} of {found.pairs:,} pairs of a token and a layer "
        f"({100 * found.share:.3g} %)."
    ]
    most = [
        f"{swap_name(row.layer, row.a, row.b)} ({row.times} times)"
        for row in found.swaps.head(SHOWN).itertuples()
    ]
    if most:
        said.append(f"Most often: {'; '.join(most)}.")
    for name, some in (
        ("with the same experts in all layers", found.losses["layers_differ"] == 0),
        ("with other experts in some layer", found.losses["layers_differ"] > 0),
    ):
        rows = found.losses[some]
        if len(rows):
            tokens = rows["tokens"].sum()
            of_a, of_b = ((rows[key] * rows["tokens"]).sum() / tokens for key in _LOSSES)
            said.append(
                f"Loss of the {tokens:,} tokens {name}: {of_a:.4f} nats in A, {of_b:.4f} in B "
                f"({of_b - of_a:+.4f})."
            )
    return said


_LOSSES = ("loss_a", "loss_b")


def _notes(found: RouteDiff) -> list[str]:
    said = []
    if any(found.left_out):
        said.append(
            f"{found.left_out[0]:,} tokens of A and {found.left_out[1]:,} of B were left out, "
            "whose text so far the other log does not have."
        )
    if found.by_text:
        said.append(
            f"{found.by_text:,} rows were found by their token ids, since the other log names its "
            "documents otherwise."
        )
    if found.other_layers:
        layers = ", ".join(map(str, found.other_layers))
        said.append(f"One log alone has the layers {layers}: they were left out.")
    return said
