"""``lm-eval-bh tune``: finds the policy that loses least, and confirms it on unseen text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_eval_bh.cli.interrupts import on_interrupt
from lm_eval_bh.cli.options import BatchSize, Device, Dtype, Length, Pretrained, share_of
from lm_eval_bh.cli.printing import say, say_written, show, warn
from lm_eval_bh.cli.tuned_tasks import compare_tasks
from lm_eval_bh.cli.word_lists import words
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import check_output
from lm_eval_bh.resources import model_path

if TYPE_CHECKING:
    from rich.table import Table

CHOOSE, CHOOSE_A_ROW = 1024, 64  # tokens of a document to choose on
MEASUREMENTS_KEPT = "what was measured is kept; run the same command again to continue"


def tune(
    pretrained: Pretrained,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the policy, the page, and what was measured.")
    ],
    target_experts: Annotated[
        float | None, typer.Option(help="Mean number of experts a token.")
    ] = None,
    target_distinct: Annotated[
        float | None,
        typer.Option(help="Mean number of distinct experts a layer and step of --decode-batch."),
    ] = None,
    decode_batch: Annotated[
        int, typer.Option(min=2, help="Rows that are decoded together, for --target-distinct.")
    ] = 32,
    max_loss: Annotated[
        str | None,
        typer.Option(help="Fewest experts within this loss of perplexity: 1% or 0.01."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="search, or winner: the recipe that won on tiny-olmoe, no search.")
    ] = "search",
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one document per paragraph, cut into three parts; default: "
            "WikiText-2, to calibrate on its training, choose on its validation and confirm on its "
            "test text."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 65536,
    tokens_per_document: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Tokens of each document to choose on; default: {CHOOSE}, or with "
            f"--target-distinct {CHOOSE_A_ROW} for each row of --decode-batch.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval whose accuracy must not fall, joined by commas."),
    ] = None,
    accuracy_margin: Annotated[
        float, typer.Option(min=0, max=1, help="Loss of accuracy on --tasks that does not matter.")
    ] = 0.01,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each of --tasks.")] = None,
    length: Length = 512,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Find the policy that loses least at a mean number of experts, and confirm it."""
    loss = None if max_loss is None else share_of(max_loss, "--max-loss")
    if sum(goal is not None for goal in (target_experts, target_distinct, loss)) != 1:
        raise ParameterError(
            "tune needs one goal: use --target-experts, --target-distinct or --max-loss."
        )
    rows = None if target_distinct is None else decode_batch
    check_output(output_dir, "--output-dir", folder=True)
    with on_interrupt(MEASUREMENTS_KEPT):
        asked = [] if tasks is None else _tasks(tasks)
        from lm_eval_bh.analysis.show.tuning_page import (
            findings_of,
            verdict_of,
            write_tuning_page,
        )
        from lm_eval_bh.policies.pretrained import load_pretrained
        from lm_eval_bh.policies.tuning.run import POLICY
        from lm_eval_bh.policies.tuning.run import tune as find
        from lm_eval_bh.policies.tuning.splits import Splits
        from lm_eval_bh.policies.tuning.subject import Subject

        splits = Splits.of_wikitext() if text is None else Splits.of_file(text)
        model, tokenizer = load_pretrained(
            model_path(pretrained), pretrained, dtype, device, length
        )
        subject = Subject(
            model,
            tokenizer,
            pretrained,
            splits,
            output_dir,
            {
                "target_experts": target_experts,
                "target_distinct": target_distinct,
                "max_loss": loss,
                "preset": preset,
            },
            tokens=tokens,
            length=length,
            batch=batch_size,
            tokens_per_document=tokens_per_document or CHOOSE_A_ROW * (rows or 0) or CHOOSE,
            decode_batch=rows,
            by_group=rows is not None,
        )
        _, account = find(
            subject,
            target_experts=target_experts,
            target_distinct=target_distinct,
            max_loss=loss,
            preset=preset,
        )
        if asked:
            account["tasks"] = compare_tasks(
                output_dir / POLICY,
                pretrained,
                asked,
                native=subject.native,
                nearest=round(account["confirmation"]["mean_experts"]),
                margin=accuracy_margin,
                limit=limit,
                batch_size=batch_size,
                dtype=dtype,
                device=device,
            )
        pages = write_tuning_page(account, output_dir)
    show(_table(account))
    for sentence in (verdict_of(account), *findings_of(account)):
        say(sentence)
    say_written([output_dir / POLICY, *pages])
    for note in splits.notes:
        warn(f"note: {note}")


def _tasks(text: str) -> list[str]:
    """Return the tasks that are asked for, before anything is measured."""
    from lm_eval_bh.harness.sweep.task_names import expand_tasks

    if not words(text):
        raise ParameterError("--tasks names no task: give names joined by commas, or leave it out.")
    return expand_tasks(tuple(words(text)))


def _table(account: dict[str, Any]) -> Table:
    from rich.table import Table

    from lm_eval_bh.analysis.show.tuning_page import tried_rows

    cost = account["cost"]["words"]
    table = Table(title=f"Policies on validation text, against static top-k at the same {cost}")
    for column in ("policy", cost, "perplexity", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in tried_rows(account):
        table.add_row(*row)
    return table
