"""``lm-eval-bh tune --preview``: what a grid of configurations would select, from one pass."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.cli.word_lists import numbers, words
from lm_eval_bh.files import check_output, replacing
from lm_eval_bh.resources import model_path

if TYPE_CHECKING:
    from rich.table import Table

    from lm_eval_bh.policies.preview import GridRow

RULES, ALPHAS, MAX_K = ("topk", "bh"), ("0.3,0.4,0.5,0.6",), ("8,16,32,64",)


def preview(
    pretrained: str,
    *,
    rules: Sequence[str] | None,
    alphas: Sequence[str] | None,
    max_k: Sequence[str] | None,
    min_k: int,
    decode_batch: int | None,
    statistic: str,
    null_scope: str,
    null_from: str,
    output: Path | None,
    **how: Any,
) -> None:
    """Print what each rule, level and max_k would select, from one pass of the unchanged model.

    ``how`` says on which text, in which windows and where the model runs.
    """
    with on_interrupt(NOTHING_HALF_WRITTEN):
        from lm_eval_bh.policies.pretrained import analyze_pretrained
        from lm_eval_bh.routing.parameter_grid import grid_of

        configs = grid_of(
            words(rules or RULES),
            numbers("alphas", alphas or ALPHAS, float),
            numbers("max-k", max_k or MAX_K, int),
            decode_batch=decode_batch,
            min_k=min_k,
            statistic=statistic,
            null_scope=null_scope,
            null_from=null_from,
        )
        if output is not None:
            check_output(output, "--output")
        rows, seen = analyze_pretrained(model_path(pretrained), configs, name=pretrained, **how)
    show(_table(f"What {pretrained} would select on {seen} tokens", rows))
    say(
        "The model ran unchanged. When a rule selects the experts, it changes the hidden states "
        "and so the router logits of the layers above, and the mean number of experts differs."
    )
    if decode_batch is not None:
        say(f"Distinct experts are of a layer and a step of {decode_batch} rows.")
    if output is not None:
        content = {"tokens": seen, "rows": [_plain(row) for row in rows]}
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"Written to {output}")


def _plain(row: GridRow) -> dict[str, object]:
    """Return a row as JSON knows it; a rule without a level has a null alpha."""
    config = row.config.as_dict() | ({} if row.config.method.alpha else {"alpha": None})
    return dataclasses.asdict(row) | {"config": config}


def _table(title: str, rows: list[GridRow]) -> Table:
    from rich import box
    from rich.table import Table

    # It has to fit into 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names: tuple[str, ...] = ("rule", "alpha", "max_k", "mean\nexperts")
    names += ("at\nmin_k\n(%)", "at\nmax_k\n(%)", "overlap\nwith top-k", "softmax\nmass kept")
    names += ("distinct\nexperts",) * any(row.distinct_experts is not None for row in rows)
    for column in names:
        table.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
    for row in rows:
        distinct = [] if row.distinct_experts is None else [f"{row.distinct_experts:.1f}"]
        table.add_row(
            row.config.rule,
            f"{row.config.alpha:g}" if row.config.method.alpha else "",
            str(row.config.max_k),
            f"{row.mean_experts:.2f}",
            f"{100 * row.floor_share:.1f}",
            f"{100 * row.ceiling_share:.1f}",
            f"{row.overlap:.3f}",
            f"{row.retained_mass:.3f}",
            *distinct,
        )
    return table
