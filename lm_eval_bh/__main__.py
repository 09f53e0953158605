"""``python -m lm_eval_bh``: the command, for launchers that start modules."""

from lm_eval_bh.cli import main

main()
