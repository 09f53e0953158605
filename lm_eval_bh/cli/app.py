"""The command ``lm-eval-bh``: subcommands read arguments and call who does the work."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lm_eval_bh.cli import finished_runs
from lm_eval_bh.cli.sweep import sweep
from lm_eval_bh.cli.word_lists import numbers, words
from lm_eval_bh.errors import BHError, DataError, ParameterError
from lm_eval_bh.files import figure_format, replacing
from lm_eval_bh.resources import TINY_OLMOE, shipped, tiny_olmoe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Tools around `lm_eval --model hf-bh`: "
        "adaptive expert selection for mixture-of-experts models."
    ),
)

for command in (
    sweep,
    finished_runs.aggregate,
    finished_runs.plot,
    finished_runs.report,
    finished_runs.patterns,
):
    app.command()(command)

Pretrained = Annotated[str, typer.Option(help=f"Hub name or folder of the model, or {TINY_OLMOE}.")]


@app.command()
def calibrate(
    pretrained: Pretrained,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; default: the cache that null_model=auto reads."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Plain text, a document a paragraph; default: WikiText-2 train."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to fit on; an eighth as many are held out for the check.")
    ] = 65536,
    length: Annotated[int, typer.Option(help="Window length in tokens.")] = 512,
    batch_size: int = 8,
    trim: Annotated[
        int, typer.Option(help="Leave out the largest and smallest logits of every token, so many.")
    ] = 0,
    kernel: Annotated[
        str, typer.Option(help="gaussian, epanechnikov, tophat or linear.")
    ] = "gaussian",
    statistic: Annotated[
        str, typer.Option(help="logit, or contribution: log of weight times output norm.")
    ] = "logit",
    null_scope: Annotated[
        str,
        typer.Option(
            "--null-scope", "--null", help="What one distribution is of: layer, expert or model."
        ),
    ] = "layer",
    figure: Annotated[
        Path | None, typer.Option(help="Draw the check too, as an image file.")
    ] = None,
    dtype: str = "auto",
    device: Annotated[
        str | None, typer.Option(help="Default: cuda where there is one, else cpu.")
    ] = None,
) -> None:
    """Fit a null model to the router logits of a model, and check it on held-out text."""
    from lm_eval_bh.policies.pretrained import calibrate_pretrained
    from lm_eval_bh.routing.nulls.null_kind import NullKind

    kind = NullKind(statistic, null_scope, trim)
    if figure is not None:
        figure_format(figure)  # before minutes of work
    fitted, health, path = calibrate_pretrained(
        str(tiny_olmoe()) if pretrained == TINY_OLMOE else pretrained,
        name=pretrained,
        text=text,
        output=output,
        tokens=tokens,
        length=length,
        batch=batch_size,
        kind=kind,
        kernel=kernel,
        dtype=dtype,
        device=device,
    )
    table = Table(
        title=f"Null model of {pretrained}: {fitted.num_layers} layers, "
        f"{fitted.header.tokens} tokens"
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
    if health:
        Console().print(table)
        typer.echo(f"Checked on {health[0].tokens} held-out tokens. Written to {path}")
    else:
        typer.echo(
            f"The text ends within the {tokens} tokens to fit on, so that none were left to check "
            f"on: lower --tokens to have some. Written to {path}"
        )
    if figure is not None and health:
        from lm_eval_bh.analysis.show.health_figure import draw_health

        rows = [dataclasses.asdict(row) for row in health]
        draw_health(rows, f"Null model of {pretrained}, {statistic}, {kind.null_scope}", figure)
        typer.echo(f"Drawn to {figure}")


@app.command()
def analyze(
    pretrained: Pretrained,
    rules: Annotated[str, typer.Option(help="Selection rules, joined by commas.")] = "topk,bh",
    alphas: Annotated[str, typer.Option(help="Levels, joined by commas.")] = "0.3,0.4,0.5,0.6",
    max_k: Annotated[str, typer.Option(help="Most experts, joined by commas.")] = "8,16,32,64",
    min_k: int = 1,
    statistic: str = "logit",
    null_scope: Annotated[
        str, typer.Option("--null-scope", "--null", help="layer, expert or model.")
    ] = "layer",
    null_model: Annotated[
        str, typer.Option("--null-model", "--kde", help="Null model file, or auto.")
    ] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(help="Plain text, a document a paragraph; default: WikiText-2 test."),
    ] = None,
    tokens: int = 65536,
    length: Annotated[int, typer.Option(help="Window length in tokens.")] = 512,
    batch_size: int = 8,
    dtype: str = "auto",
    device: Annotated[
        str | None, typer.Option(help="Default: cuda where there is one, else cpu.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the table as JSON.")] = None,
) -> None:
    """Say what every rule, level and max_k would select, from one pass of the unchanged model."""
    from lm_eval_bh.policies.pretrained import analyze_pretrained
    from lm_eval_bh.routing.config import grid_of
    from lm_eval_bh.routing.rules.registry import RULES

    configs = grid_of(
        words(rules),
        numbers("alphas", alphas, float),
        numbers("max-k", max_k, int),
        min_k=min_k,
        statistic=statistic,
        null_scope=null_scope,
    )
    rows, seen = analyze_pretrained(
        str(tiny_olmoe()) if pretrained == TINY_OLMOE else pretrained,
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
    table = Table(title=f"What {pretrained} would select on {seen} tokens")
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
    Console().print(table)
    typer.echo(
        "The model ran as it is. At work a rule changes the hidden states, and with them the "
        "router logits of the layers above: the mean is then another one."
    )
    if output is not None:
        plain = [dataclasses.asdict(row) for row in rows]
        for values in plain:
            if RULES[values["config"]["rule"]].fixed_count:
                values["config"]["alpha"] = None  # it has none
        content = {"tokens": seen, "rows": plain}
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"Written to {output}")


@app.command("import-kde")
def import_kde(
    folder: Annotated[
        Path, typer.Argument(help="Folder of distribution_model_layer_<i>.pkl files.")
    ],
    output: Annotated[Path, typer.Option(help="Null model file to write.")],
    model: Annotated[
        str | None, typer.Option(help="Name of the model that the tables belong to.")
    ] = None,
) -> None:
    """Convert the earlier prototype's pickles, without executing anything in them."""
    from lm_eval_bh.routing.nulls.null_model import NullModel

    null_model = NullModel.from_pickles(folder, model=model)
    null_model.save(output)
    typer.echo(f"{null_model.num_layers} layers written to {output}")


@app.command()
def path(
    name: Annotated[str, typer.Argument(help=f"{TINY_OLMOE}, tasks or kde_models.")] = TINY_OLMOE,
) -> None:
    """Print where a shipped file or folder lies, e.g. for `--model_args pretrained=...`."""
    if name not in (TINY_OLMOE, "tasks", "kde_models"):
        raise ParameterError(
            f"Nothing that ships is called {name!r}: ask for {TINY_OLMOE}, tasks or kde_models."
        )
    typer.echo(tiny_olmoe() if name == TINY_OLMOE else shipped(name))


@app.command(
    "lm-eval",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def run_lm_eval(context: typer.Context) -> None:
    """Run `lm_eval` with the same arguments, where site-packages may hold no start-up files."""
    from lm_eval.__main__ import cli_evaluate

    from lm_eval_bh.harness.plugin.registration import register

    register()
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()


def main() -> None:
    """Run the command; an error of ours ends it with one sentence and exit code 1."""
    try:
        app()
    except BHError as error:
        typer.echo(f"lm-eval-bh: error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        typer.echo(f"lm-eval-bh: error: {DataError(error)}", err=True)
        sys.exit(1)
