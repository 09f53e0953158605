"""``lm-eval-bh policy``: writes a policy from any configuration of hf-bh, or shows one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lm_eval_bh.cli.examples import examples
from lm_eval_bh.cli.former_names import Command, Commands
from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.options import (
    Device,
    Dtype,
    ModelArgs,
    OptionalModel,
    Overwrite,
    joined_arguments,
)
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import check_output

policy = typer.Typer(cls=Commands)


@policy.callback(invoke_without_command=True, epilog=examples("policy"))
def write(
    context: typer.Context,
    model: OptionalModel = None,
    model_args: ModelArgs = None,
    output: Annotated[Path | None, typer.Option(help="A .safetensors file to write.")] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Write the policy of a configuration, with all that it calibrates and solves.

    The subcommands show a policy, export it to other engines, and verify it there.
    """
    if context.invoked_subcommand is not None:
        return
    if (model_args is None and model is None) or output is None:
        raise ParameterError(
            "policy needs --output and --model or --model-args to write one: "
            "or use `policy show FILE`."
        )
    arguments = joined_arguments(model_args, pretrained=model, dtype=dtype, device=device)
    with on_interrupt(NOTHING_HALF_WRITTEN):
        check_output(output, "--output")
        if output.exists() and not overwrite:
            raise ParameterError(f"--output {output} exists: use --overwrite to replace it.")
        from lm_eval_bh.harness.model import BHLM

        loaded = BHLM.create_from_arg_string(arguments)
        loaded.integration.policy(model_args=arguments).save(output)
    say(f"Written to {output}")


@policy.command("show", cls=Command, epilog=examples("policy show"))
def show_policy(file: Annotated[Path, typer.Argument(help="A policy file.")]) -> None:
    """Print what a policy decides, for which model, and where it comes from."""
    from rich.table import Table

    from lm_eval_bh.routing.policy import Policy

    table = Table(show_header=False, title=f"Policy {file.name}")
    for name, value in Policy.load(file).describe().items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, each in parts:
            if each is not None:
                table.add_row(f"{name} {part}".strip(), str(each))
    show(table)
