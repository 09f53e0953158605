"""The command ``lm-eval-bh``: one file a subcommand, listed in ``app``."""

from __future__ import annotations

import sys

from lm_eval_bh.cli.interrupts import INTERRUPTED, NOTHING_HALF_WRITTEN

__all__ = ["main"]


def main() -> None:
    """Run the command and exit; see :func:`lm_eval_bh.cli.app.main`.

    Ctrl-C ends it with one line from here on, while the libraries of the command line load.
    """
    try:
        from lm_eval_bh.cli.app import main as program

        program()
    except KeyboardInterrupt:
        print(f"lm-eval-bh: interrupted: {NOTHING_HALF_WRITTEN}.", file=sys.stderr)
        sys.exit(INTERRUPTED)
