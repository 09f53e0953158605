"""``lm-eval-bh league``: every method at the same means, on the same unseen text, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_eval_bh.cli.interrupts import on_interrupt
from lm_eval_bh.cli.options import BatchSize, Device, Dtype, OptionalModel, Window
from lm_eval_bh.cli.printing import say, say_written, show, warn
from lm_eval_bh.cli.tune_command import CHOOSE, CHOOSE_A_ROW, MEASUREMENTS_KEPT
from lm_eval_bh.cli.word_lists import numbers
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import check_output, write_text
from lm_eval_bh.resources import model_path

if TYPE_CHECKING:
    from rich.table import Table

MOST_CALIBRATION, SCORED, GROUPS = 65536, 32768, 6


def league(
    pretrained: OptionalModel = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the tables, and what was measured.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Mean numbers of experts per token, joined by commas."),
    ] = None,
    target_distinct: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead: mean numbers of distinct experts per layer and step, joined by commas."
        ),
    ] = None,
    decode_batch: Annotated[
        int,
        typer.Option(
            min=0, help="Rows that are decoded together, for distinct experts; 0: not counted."
        ),
    ] = 32,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Names joined by commas: a method, its statistic, parameters with values, "
            "such as 'min_w benefit mass 0.2,top_p'; default: all."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text-file",
            "--text",
            help="Text file, one document per paragraph, cut into three parts; default: "
            "WikiText-2.",
        ),
    ] = None,
    unseen: Annotated[
        Path | None, typer.Option(help="Text file to score instead of the third part.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Tokens of unseen text to score, and, up to {MOST_CALIBRATION}, to calibrate on; "
            f"default: {SCORED}, or with --target-distinct {GROUPS} groups of --decode-batch rows.",
        ),
    ] = None,
    length: Window = 512,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Only check a league.json: whether its numbers follow from its sums."),
    ] = None,
) -> None:
    """Compare methods at the same means on unseen text, or check such a comparison."""
    if check is not None:
        _check(check)
        return
    asked = targets if target_distinct is None else target_distinct
    given = {"--model": pretrained, "--output-dir": output_dir, "--targets": asked}
    if missing := [name for name, value in given.items() if value is None]:
        raise ParameterError(
            f"league needs {' and '.join(missing)}: give them, or --check with a file alone."
        )
    assert pretrained is not None
    assert output_dir is not None
    assert asked is not None
    option, by_group = ("targets", False) if target_distinct is None else ("target-distinct", True)
    if targets is not None and by_group:
        raise ParameterError(
            "--targets and --target-distinct are two leagues, as the one resamples documents and "
            "the other groups of them: give one, or a folder to each."
        )
    if by_group and decode_batch < 2:
        raise ParameterError(
            f"--target-distinct needs --decode-batch of at least 2: found {decode_batch}."
        )
    if not (means := numbers(option, asked, float)):
        raise ParameterError("There is no target: give numbers of experts joined by commas.")
    most = tokens or (GROUPS * decode_batch * length if by_group else SCORED)
    check_output(output_dir, "--output-dir", folder=True)
    with on_interrupt(MEASUREMENTS_KEPT):
        from lm_eval_bh.analysis.show.league_page import FILE, write_league
        from lm_eval_bh.policies.cost import DISTINCT, EXPERTS
        from lm_eval_bh.policies.league.contest import ALL, JOURNAL, compete, families_of
        from lm_eval_bh.policies.pretrained import load_pretrained
        from lm_eval_bh.policies.tuning.splits import Splits
        from lm_eval_bh.policies.tuning.subject import Subject

        families = families_of(",".join(methods or [ALL]))
        splits = Splits.of_wikitext() if text is None else Splits.of_file(text)
        splits = splits if unseen is None else splits.confirmed_on(unseen)
        model, tokenizer = load_pretrained(
            model_path(pretrained), pretrained, dtype, device, length
        )
        subject = Subject(
            model,
            tokenizer,
            pretrained,
            splits,
            output_dir,
            {},
            tokens=min(most, MOST_CALIBRATION),
            length=length,
            batch=batch_size,
            most_tokens=most,
            tokens_per_document=CHOOSE_A_ROW * decode_batch if by_group else CHOOSE,
            decode_batch=decode_batch or None,
            by_group=by_group,
            file=JOURNAL,
        )
        found = compete(subject, means, families, cost=DISTINCT if by_group else EXPERTS)
        written = write_text(output_dir / FILE, json.dumps(found, allow_nan=False) + "\n")
        pages = write_league(found, output_dir)
    for table in _tables(found):
        show(table)
    _say_results(found)
    say_written([written, *pages])


def _check(path: Path) -> None:
    from lm_eval_bh.policies.league.league_file import read_league

    found, notes = read_league(path)
    measured = sum(row["failed"] is None for row in found["rows"])
    say(
        f"{path} holds: {measured} measured rows of {found['model']['name']} on "
        f"{len(found['tokens'])} {found['unit']} of {found['text']['name']} follow from their sums."
    )
    _say_results(found)
    for note in notes:
        warn(f"note: {note}")


def _say_results(found: Mapping[str, Any]) -> None:
    from lm_eval_bh.analysis.show.league_page import failures, summary_of

    for target in found["targets"]:
        say(summary_of(found, target))
    for name, reason in failures(found):
        warn(f"not measured: {name}: {reason}")
    for note in found["text"]["notes"]:
        warn(f"note: {note}")


def _tables(found: Mapping[str, Any]) -> list[Table]:
    from rich.table import Table

    from lm_eval_bh.analysis.show.league_page import a_mean, short_rows

    tables = []
    for target in found["targets"]:
        table = Table(title=f"{a_mean(found, target).capitalize()}, by loss")
        rows = short_rows(found, target)
        for number, title in enumerate(rows[0] if rows else ()):
            table.add_column(title, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row.values())
        tables.append(table)
    return tables
