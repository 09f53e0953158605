"""The command ``lm-eval-bh``: one file a subcommand, listed in ``app``."""

from lm_eval_bh.cli.app import app, main

__all__ = ["app", "main"]
