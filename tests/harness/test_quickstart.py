"""A newcomer's view: the output of scripts/quickstart.sh in a copy of the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path, commands) -> Path:
    """Return a copy of the repository that is installed: its commands run this Python."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("lm_eval_bh", "tasks", "kde_models", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(commands)
    startup = sorted((ROOT / "lm_eval_bh" / "harness" / "plugin").glob("startup.*"))
    stamped = (ROOT / "pyproject.toml", ROOT / "constraints.txt", *startup)
    content = b"".join(file.read_bytes() for file in stamped) + os.fsencode(tmp_path)
    (tmp_path / ".venv" / "stamp").write_text(hashlib.sha256(content).hexdigest())
    return tmp_path


@pytest.mark.slow
def test_the_quick_start_shows_the_policy_beside_static_top_k_and_bh(installed):
    earlier = installed / "runs" / "quickstart" / "first" / "earlier"  # of another call
    earlier.mkdir(parents=True)
    done = subprocess.run(
        ["bash", installed / "scripts" / "quickstart.sh", "--limit", "20"],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    shown = done.stdout
    assert "Installing" not in shown
    assert (
        shown.index("$ lm_eval --model hf-bh --model_args pretrained=tiny-olmoe,policy=tiny-olmoe")
        < shown.index("pretrained=tiny-olmoe,rule=topk,max_k=4")
        < shown.index("pretrained=tiny-olmoe,alpha=0.4,max_k=8")
    )
    assert "|bh_demo_wikitext|" in shown  # lm_eval's own table
    assert "B against A: 1 better." in shown  # the policy, against static top-4
    tables = shown.split("$ lm-eval-bh aggregate runs/quickstart/sweep")[1]
    assert "Speed was measured" not in tables  # the sweep did it
    assert "not run" not in tables  # static top-k with as many experts stands beside all
    assert "0.000" not in tables  # an accuracy of nothing right compares nothing
    table = tables.split("wikitext")[-1]
    rows = {line.split("  ")[0].strip(): line for line in table.splitlines()}
    assert {"top-2", "top-4", "top-8"} <= set(rows)
    for level in ("0.40", "0.50"):
        assert "%*)" in rows[f"BH a={level}, max 8"]  # it differs from top-8, significantly
    assert any(row.startswith("min-w target 4") for row in rows)
    figure = "runs/quickstart/sweep/visualizations/bh_comprehensive_comparison.png"
    picture = installed / figure
    assert f"Written to {figure}" in tables
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not earlier.exists()
