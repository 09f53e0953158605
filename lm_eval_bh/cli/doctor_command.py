"""``lm-eval-bh doctor``: looks at the installation, the machine and a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.errors import ParameterError

if TYPE_CHECKING:
    from rich.table import Table

    from lm_eval_bh.doctor.finding import Finding


def doctor(
    pretrained: Annotated[
        str | None, typer.Option(help="Also say what this model would get: hub name or folder.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Also say whether this policy fits the model.")
    ] = None,
) -> None:
    """Check versions, lm_eval, devices, the hub, caches, and what a model would get.

    Nothing is downloaded or written. Exit code 1: something will not work.
    """
    if policy is not None and pretrained is None:
        raise ParameterError("--policy needs --pretrained, the model to hold it against.")
    with on_interrupt(NOTHING_HALF_WRITTEN):
        findings = list(_findings(pretrained, policy))
    show(_table(findings))
    for finding in findings:
        if finding.remedy:
            say(f"{finding.state}: {finding.subject}: {finding.remedy}.")
    counted = Counter(finding.state for finding in findings)
    say(", ".join(f"{counted[state]} {state}" for state in ("ok", "note", "problem")))
    if counted["problem"]:
        raise typer.Exit(1)


def _findings(pretrained: str | None, policy: Path | None) -> Iterator[Finding]:
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
    if pretrained is not None:
        from lm_eval_bh.doctor.outlook import check_model

        yield from check_model(pretrained, policy)


def _table(findings: list[Finding]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "what", "found"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(finding.state, finding.subject, finding.found)
    return table
