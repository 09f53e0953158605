"""The command ``lm-eval-bh``: subcommands read arguments and call who does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lm_eval_bh import analysis_cli
from lm_eval_bh.errors import BHError, DataError, ParameterError
from lm_eval_bh.report_cli import add_commands
from lm_eval_bh.resources import TINY_OLMOE, shipped, tiny_olmoe
from lm_eval_bh.sweep_cli import sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Tools around `lm_eval --model hf-bh`: "
        "adaptive expert selection for mixture-of-experts models."
    ),
)

app.command()(sweep)
app.command()(analysis_cli.aggregate)
app.command()(analysis_cli.plot)

Pretrained = Annotated[str, typer.Option(help=f"Hub name or folder of the model, or {TINY_OLMOE}.")]


@app.command()
def calibrate(
    pretrained: Pretrained,
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default the cache that kde=auto reads.")
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
    dtype: str = "auto",
    device: Annotated[
        str | None, typer.Option(help="Default: cuda where there is one, else cpu.")
    ] = None,
) -> None:
    """Fit a null model to the router logits of a model, and check it on held-out text."""
    from lm_eval_bh.routing.pretrained import calibrate_pretrained

    null, health, path = calibrate_pretrained(
        str(tiny_olmoe()) if pretrained == TINY_OLMOE else pretrained,
        name=pretrained,
        text=text,
        output=output,
        tokens=tokens,
        length=length,
        batch=batch_size,
        trim=trim,
        kernel=kernel,
        dtype=dtype,
        device=device,
    )
    table = Table(
        title=f"Null model of {pretrained}: {null.num_layers} layers, {null.header.tokens} tokens"
    )
    for column in ("layer", "bandwidth", "KS distance from uniform", "p = 0 (%)", "p = 1 (%)"):
        table.add_column(column, justify="right")
    for row, width in zip(health, null.header.bandwidth or [], strict=True):
        table.add_row(
            str(row.layer),
            f"{width:.4f}",
            f"{row.ks_distance:.4f}",
            f"{100 * row.ceiling_share:.3f}",
            f"{100 * row.floor_share:.3f}",
        )
    Console().print(table)
    typer.echo(f"Checked on {health[0].tokens} held-out tokens. Written to {path}")


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
    from lm_eval_bh.routing.null import NullModel

    null = NullModel.from_pickles(folder, model=model)
    null.save(output)
    typer.echo(f"{null.num_layers} layers written to {output}")


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

    from lm_eval_bh.harness.plugin import register

    register()
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()


add_commands(app)


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
