"""``lm-eval-bh tune``: finds the policy that loses least, and confirms it on unseen text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_eval_bh.cli.interrupts import on_interrupt
from lm_eval_bh.cli.options import (
    NULL,
    THREE_TEXTS,
    BatchSize,
    Device,
    Dtype,
    Model,
    NullFrom,
    NullScope,
    Statistic,
    TunePreset,
    Window,
    share_of,
)
from lm_eval_bh.cli.printing import say, say_written, show, warn
from lm_eval_bh.cli.tune_preview import preview as preview_grid
from lm_eval_bh.cli.tuned_tasks import compare_tasks
from lm_eval_bh.cli.word_lists import words
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import check_output
from lm_eval_bh.resources import model_path

if TYPE_CHECKING:
    from rich.table import Table

CHOOSE, CHOOSE_A_ROW = 1024, 64  # tokens of a document to choose on
MEASUREMENTS_KEPT = "what was measured is kept; run the same command again to continue"


# Options that only a preview reads are in its panel of the help and in that of null models.
PREVIEW = "With --preview"


def tune(
    context: typer.Context,
    pretrained: Model,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the policy, the page and the measurements.")
    ] = None,
    target_experts: Annotated[
        float | None, typer.Option(help="Goal: this mean number of experts per token.")
    ] = None,
    target_distinct: Annotated[
        float | None,
        typer.Option(help="Mean number of distinct experts per layer and step of --decode-batch."),
    ] = None,
    decode_batch: Annotated[
        int,
        typer.Option(
            min=2,
            help="Rows that are decoded together, for --target-distinct; given with --preview, it "
            "shows their distinct experts.",
        ),
    ] = 32,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="Goal: the fewest experts that raise the perplexity by at most this: 1% or 0.01."
        ),
    ] = None,
    preset: Annotated[
        TunePreset,
        typer.Option(help="winner skips the search and takes what won on tiny-olmoe."),
    ] = "search",
    text: Annotated[Path | None, typer.Option("--text-file", "--text", help=THREE_TEXTS)] = None,
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
        list[str] | None,
        typer.Option(help="Tasks of lm-eval whose accuracy must not fall, joined by commas."),
    ] = None,
    accuracy_margin: Annotated[
        float, typer.Option(min=0, max=1, help="Loss of accuracy on --tasks that does not matter.")
    ] = 0.01,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each of --tasks.")] = None,
    length: Window = 512,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = None,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="Only show what a grid of rules, levels and max_k would select, from one pass of "
            "the unchanged model.",
        ),
    ] = False,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            help="Preview of rules, joined by commas; default: topk,bh.", rich_help_panel=PREVIEW
        ),
    ] = None,
    alphas: Annotated[
        list[str] | None,
        typer.Option(
            help="Preview of levels, joined by commas; default: 0.3,0.4,0.5,0.6.",
            rich_help_panel=PREVIEW,
        ),
    ] = None,
    max_k: Annotated[
        list[str] | None,
        typer.Option(
            help="Preview of largest numbers of experts; default: 8,16,32,64.",
            rich_help_panel=PREVIEW,
        ),
    ] = None,
    min_k: Annotated[
        int,
        typer.Option(help="Smallest number of experts in the preview.", rich_help_panel=PREVIEW),
    ] = 1,
    statistic: Statistic = "logit",
    null_scope: NullScope = "layer",
    null_from: NullFrom = "all",
    null_model: Annotated[
        str,
        typer.Option(
            "--null-model",
            "--kde",
            help="Null model of the preview: a file, or auto.",
            rich_help_panel=NULL,
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(help="Also write the preview to this JSON file.", rich_help_panel=PREVIEW),
    ] = None,
) -> None:
    """Find the policy that loses least at a mean number of experts, and confirm it on unseen text.

    With --preview, show what a grid of configurations would select instead.
    """
    if preview:
        if any(one is not None for one in (target_experts, target_distinct, max_loss, output_dir)):
            raise ParameterError(
                "--preview has no goal and no folder: leave out --target-experts, "
                "--target-distinct, --max-loss and --output-dir, or --preview."
            )
        source = context.get_parameter_source("decode_batch")
        given = source is not None and source.name == "COMMANDLINE"
        preview_grid(
            pretrained,
            rules=rules,
            alphas=alphas,
            max_k=max_k,
            min_k=min_k,
            decode_batch=decode_batch if given else None,
            statistic=statistic,
            null_scope=null_scope,
            null_from=null_from,
            null_model=null_model,
            output=output,
            text=text,
            tokens=tokens,
            length=length,
            batch=batch_size,
            dtype=dtype,
            device=device,
        )
        return
    _refuse_without_preview(context)
    if output_dir is None:
        raise ParameterError("tune needs --output-dir: name a folder for the policy.")
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


def _refuse_without_preview(context: typer.Context) -> None:
    """Raise a :class:`ParameterError` for an option that only a preview reads."""
    for option in context.command.params:
        panel = getattr(option, "rich_help_panel", None)
        source = context.get_parameter_source(str(option.name))
        if panel in (PREVIEW, NULL) and source is not None and source.name == "COMMANDLINE":
            raise ParameterError(f"{option.opts[0]} needs --preview: tune tries rules by itself.")


def _tasks(given: list[str]) -> list[str]:
    """Return the tasks that are asked for, before anything is measured."""
    from lm_eval_bh.harness.sweep.task_names import expand_tasks

    if not words(given):
        raise ParameterError("--tasks names no task: give names joined by commas, or leave it out.")
    return expand_tasks(tuple(words(given)))


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
