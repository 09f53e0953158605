"""``lm-eval-bh compare``: any two runs of lm-eval, document by document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.options import AccuracyMargin, Confidence, Margin, Resamples, Seed, finish
from lm_eval_bh.cli.printing import say, say_written, show
from lm_eval_bh.cli.word_lists import words
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import check_output, write_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from lm_eval_bh.analysis.compare.two_runs import TwoRuns

FORMATS = (".json", ".csv")


def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="Folder or results file of lm_eval: the baseline.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one to compare with it.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", "--task", help="Compare only these tasks, joined by commas; default: all."
        ),
    ] = None,
    margin: Margin = 0.01,
    accuracy_margin: AccuracyMargin = 0.01,
    confidence: Confidence = 0.95,
    power: Annotated[
        float, typer.Option(help="Chance that the documents needed show a difference.")
    ] = 0.8,
    resamples: Resamples = 9999,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option(help="Also write the table: a .json or .csv file.")
    ] = None,
) -> None:
    """Compare two runs of lm_eval --log_samples, of any models, on the documents that both have.

    Exit code 3: samples were broken or incomplete; the command lists them and compares the others.
    """
    from lm_eval_bh.analysis.compare.two_runs import compare_runs

    if output is not None:
        if output.suffix.lower() not in FORMATS:
            raise ParameterError(f"--output {output} must end in .json or .csv.")
        check_output(output, "--output")
    settings = {
        "margin": margin,
        "accuracy_margin": accuracy_margin,
        "confidence": confidence,
        "power": power,
        "resamples": resamples,
        "seed": seed,
    }
    found = compare_runs(a, b, tasks=words(tasks or ()), **settings)  # type: ignore[arg-type]
    for letter, path, name in zip("AB", (a, b), found.names, strict=True):
        say(f"{letter}: {name} ({path})")
    for name, rows in found.table.groupby("task", sort=False):
        if rows["reason"].isna().any():
            show(_table(str(name), rows, confidence))
        for sentence in rows["sentence"]:
            say(sentence)
    counted = Counter(found.table["verdict"].fillna("not compared"))
    say(f"B against A: {', '.join(f'{times} {word}' for word, times in counted.items())}.")
    if output is not None:
        say_written([write_text(output, _text(found, settings, output))])
    finish(found.problems, found.notes)


def _table(task: str, rows: pd.DataFrame, confidence: float) -> Table:
    """Return one row per metric and filter that was compared."""
    from rich import box
    from rich.table import Table

    from lm_eval_bh.analysis.compare.verdicts import change_of, interval_of, size_of
    from lm_eval_bh.analysis.table.missing import is_missing

    table = Table(
        title=task, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("metric", overflow="fold", min_width=len("perplexity"))
    change = f"B against A\n[{100 * confidence:g} % interval]"
    for name in ("A", "B", change, "p", "p of\nmargin", "documents\nneeded"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, row in rows[rows["reason"].isna()].iterrows():
        value = change_of(row)
        table.add_row(
            row["metric"] + ("" if row["filter"] == "none" else f",{row['filter']}"),
            _number(row["a"]),
            _number(row["b"]),
            f"{'-' if value < 0 else '+'}{size_of(row, value)}\n{interval_of(row)}",
            f"{row['p_adjusted']:.2g}",
            f"{row['equivalence_p_adjusted']:.2g}",
            f"{row['documents_needed']:,}" if not is_missing(row["documents_needed"]) else "",
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _text(found: TwoRuns, settings: dict[str, float], output: Path) -> str:
    from lm_eval_bh.analysis.table.table_files import plain

    if output.suffix.lower() == ".csv":
        return str(found.table.to_csv(index=False, lineterminator="\n"))
    rows = [
        {name: plain(value) for name, value in row.items()}
        for row in found.table.to_dict(orient="records")
    ]
    content = {
        "a": found.names[0],
        "b": found.names[1],
        "settings": settings,
        "rows": rows,
        "notes": [sentence for _, sentence in found.notes],
        "left_out": [sentence for _, sentence in found.problems],
    }
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
