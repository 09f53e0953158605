"""The script of faults, at its smallest: one sweep that is killed twice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "faults.py"


@pytest.mark.slow
def test_faults_lose_nothing_and_are_told_of(commands):
    done = subprocess.run(
        [commands / "python", SCRIPT, "--kills", "1", "--only", "again"],
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "again" in line]
    (row,) = [row for row in rows if "│" in row]
    _, _, tried, finished, *counts, _ = (cell.strip() for cell in row.split("│"))
    assert tried == "1"
    assert finished
    assert counts == ["0", "0", "0"]
