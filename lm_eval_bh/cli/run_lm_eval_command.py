"""``lm-eval-bh lm-eval``: the stock command, where no start-up file registers ``hf-bh``."""

from __future__ import annotations

import sys

import typer


def run_lm_eval(context: typer.Context) -> None:
    """Run `lm_eval` with the same arguments, where site-packages may hold no start-up files."""
    from lm_eval.__main__ import cli_evaluate

    from lm_eval_bh.harness.plugin.registration import register

    register()
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
