"""``lm-eval-bh doctor``: looks at the installation, the machine and a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.examples import examples
from lm_eval_bh.cli.former_names import Commands
from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.errors import ParameterError

if TYPE_CHECKING:
    from rich.table import Table

    from lm_eval_bh.doctor.finding import Finding


doctor = typer.Typer(cls=Commands)


@doctor.callback(invoke_without_command=True, epilog=examples("doctor"))
def check(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--pretrained",
            help="Also check this model, by its name on the hub or folder.",
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Also check whether this policy fits the model.")
    ] = None,
) -> None:
    """Check versions, lm_eval, devices, the hub, caches, and a model.

    For a model, doctor names its routers, and the null model and policy that it would use. doctor
    downloads and writes nothing. Exit code 1: something will not work.
    """
    if context.invoked_subcommand is not None:
        return
    if policy is not None and model is None:
        raise ParameterError("--policy needs --model, the model that the policy is for.")
    with on_interrupt(NOTHING_HALF_WRITTEN):
        findings = list(_findings(model, policy))
    show(_table(findings))
    for finding in findings:
        if finding.remedy:
            say(f"{finding.state}: {finding.subject}: {finding.remedy}.")
    counted = Counter(finding.state for finding in findings)
    say(", ".join(f"{counted[state]} {state}" for state in ("ok", "note", "problem")))
    if counted["problem"]:
        raise typer.Exit(1)


def _findings(model: str | None, policy: Path | None) -> Iterator[Finding]:
    from lm_eval_bh.doctor.companions import check_companions
    from lm_eval_bh.doctor.harness_check import check_harness
    from lm_eval_bh.doctor.machine import check_caches, check_devices, check_hub
    from lm_eval_bh.doctor.versions import check_versions

    yield from check_versions()
    broken = list(check_companions())
    yield from broken
    if broken:  # nothing else of transformers can be loaded before that is mended
        return
    for check in (check_harness, check_devices, check_hub, check_caches):
        yield from check()
    if model is not None:
        from lm_eval_bh.doctor.outlook import check_model

        yield from check_model(model, policy)


def _table(findings: list[Finding]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "what", "found"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(finding.state, finding.subject, finding.found)
    return table
