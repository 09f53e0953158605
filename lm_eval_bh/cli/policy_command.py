"""``lm-eval-bh policy``: writes a policy from any configuration of hf-bh, or shows one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import check_output

policy = typer.Typer()


@policy.callback(invoke_without_command=True)
def write(
    context: typer.Context,
    model_args: Annotated[
        str | None,
        typer.Option(help="As lm_eval takes them: pretrained=tiny-olmoe,alpha=0.4,max_k=8."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write, *.safetensors.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write the policy of a configuration, with what it calibrates and solves; or show one."""
    if context.invoked_subcommand is not None:
        return
    if model_args is None or output is None:
        raise ParameterError("policy needs --model-args and --output: or use `policy show FILE`.")
    with on_interrupt(NOTHING_HALF_WRITTEN):
        check_output(output, "--output")
        if output.exists() and not force:
            raise ParameterError(f"--output {output} exists: use --force to replace it.")
        from lm_eval_bh.harness.model import BHLM

        model = BHLM.create_from_arg_string(model_args)
        model.integration.policy(model_args=model_args).save(output)
    say(f"Written to {output}")


@policy.command("show")
def show_policy(file: Annotated[Path, typer.Argument(help="A policy file.")]) -> None:
    """Print what a policy decides, for which model, and where it is from."""
    from rich.table import Table

    from lm_eval_bh.routing.policy import Policy

    table = Table(show_header=False, title=f"Policy {file.name}")
    for name, value in Policy.load(file).describe().items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, each in parts:
            if each is not None:
                table.add_row(f"{name} {part}".strip(), str(each))
    show(table)
