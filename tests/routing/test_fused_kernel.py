"""The fused kernel, run by Triton's interpreter, or on the card that LM_EVAL_BH_DEVICE names."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("fused_kernel_cases.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux only")
def test_the_kernel_does_what_its_cases_say():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if os.environ.get("LM_EVAL_BH_DEVICE", "cpu") == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", str(CASES)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.split(" passed")[0].split()[-1]) > 50
