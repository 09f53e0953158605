"""scripts/gpu_day.sh: on little data and a CPU, so that it works when a GPU is available."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_day.sh"


def gpu_day(*options, python=sys.executable):
    return subprocess.run(
        ["bash", SCRIPT, *map(str, options)],
        env=os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_every_step_runs_and_the_page_holds_their_numbers(commands, tmp_path):
    from lm_eval_bh.routing.methods import METHODS

    output = tmp_path / "day"
    options = ["--device", "cpu", "--small", "--output", output]
    done = gpu_day(*options, python=commands / "python")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((output / "gpu_day.json").read_text())
    codes = {step["name"]: step["exit_code"] for step in content["steps"]}
    ran = ["suite", "bench_routing", "full_size", "bench_steps", "speed"]
    assert list(codes) == [*ran, "vllm", "vllm_speed"]
    assert {codes[name] for name in ran} == {0}
    assert content["bench_routing"]["dtype"] == content["full_size"]["dtype"] == "bfloat16"
    assert len(content["speed"]["configurations"]) == 4
    results = content["bench_routing"]["results"]
    parts = {r["part"] for r in results if (r["row"], r["wanted_k"]) == ("ours", 4)}
    assert parts == {"router", "MoE layer", "2-layer stack"}
    steps = content["bench_steps"]
    joint = {name for name, method in METHODS.items() if method.joint and not method.tests}
    assert steps["decision_share"].keys() == joint
    page = (output / "gpu_day.md").read_text()
    for cell, (ratio, low, high) in steps["cells"].items():
        distinct, k = cell.split("/")
        assert f"| {distinct} | {k} | {ratio:.2f} | {low:.2f} to {high:.2f} |" in page
    assert "Every step that ran ended well." in page
    for title in ("## bench_routing", "## full_size", "## bench_steps", "## speed"):
        assert title in page
    assert "7 rounds in shuffled order" in page


def test_a_failed_step_is_named_with_the_end_of_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    page = importlib.import_module("gpu_day_page")
    rows = ["suite\t0\t5\tpytest", "speed\t1\t2\tbench", "full_size\t124\t300\tslow"]
    rows.append("vllm\t\t\tnone")
    (tmp_path / "steps.tsv").write_text("\n".join(rows) + "\n")
    for name in ("suite", "speed", "full_size"):
        lines = ["first", *["line"] * 20, f"the end of {name}"]
        (tmp_path / f"{name}.log").write_text("\n".join(lines))
    page.main(tmp_path, device="cpu")
    text = (tmp_path / "gpu_day.md").read_text()
    assert "**Failed: speed, full_size.**" in text
    assert "the end of speed" in text
    assert "the end of suite" not in text
    assert "first" not in text
    assert "took too long" in text
    assert "left out" in text
    content = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [step["exit_code"] for step in content["steps"]] == [0, 1, 124, None]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--fast"], "'--fast' is unknown"),
        (["--device"], "--device needs a value"),
        (["--device", "abacus"], "give another --device"),
    ],
)
def test_bad_usage_ends_with_a_sentence_and_nothing_is_written(options, sentence, tmp_path):
    done = gpu_day("--output", tmp_path / "day", *options)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "day").exists()
