"""The program around the subcommands: start-up, usage, errors, Ctrl-C."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_and_asking_for_help_need_no_torch():
    code = "import sys, lm_eval_bh, lm_eval_bh.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
