"""The command ``lm-eval-bh``: one file a subcommand, listed in ``app``."""

from __future__ import annotations

import sys

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, code_of, sigterm_interrupts

__all__ = ["main"]


def main() -> None:
    """Run the command and exit; see :func:`lm_eval_bh.cli.app.main`.

    Ctrl-C and SIGTERM end it with one line from here on, while the libraries of the command line
    load.
    """
    try:
        with sigterm_interrupts():
            from lm_eval_bh.cli.app import main as program

            program()
    except KeyboardInterrupt as stop:
        print(f"lm-eval-bh: interrupted: {NOTHING_HALF_WRITTEN}.", file=sys.stderr)
        sys.exit(code_of(stop))
