"""The command aggregate, on folders written by lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest

from lm_eval_bh.analysis.compare.paired import COMPARISON, compare
from lm_eval_bh.analysis.table.columns import COLUMNS
from lm_eval_bh.analysis.table.experiments import load_experiments

WIKITEXT = "bh_wikitext"
TABLES = {"bh_routing_results", "bh_routing_layers", "bh_routing_comparisons"}


def test_aggregate_writes_tables_comparisons_and_the_figure(run, runs, tmp_path):
    output = tmp_path / "output"
    code, out, err = run("aggregate", runs, "--output-dir", output, "--resamples", 99)
    assert (code, err) == (0, "")
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert files == {
        *(f"{name}.{suffix}" for name in TABLES for suffix in ("csv", "json")),
        "bh_routing_results.md",
        "bh_routing_results.tex",
        "visualizations/bh_comprehensive_comparison.png",
    }
    loaded = load_experiments([runs])
    assert list(pd.read_csv(output / "bh_routing_results.csv")) == list(COLUMNS)
    assert len(pd.read_csv(output / "bh_routing_layers.csv")) == len(loaded.layers)
    layers = json.loads((output / "bh_routing_layers.json").read_text())
    assert layers[0]["histogram"] == loaded.layers.iloc[0]["histogram"]
    compared = pd.read_csv(output / "bh_routing_comparisons.csv")
    assert list(compared) == list(COMPARISON)
    assert compared["p_value"].to_numpy() == pytest.approx(
        compare(loaded, resamples=99)["p_value"].to_numpy(float), nan_ok=True
    )
    # On the terminal: name, experts, quality, and static top-k at the same mean.
    row = loaded.frame.query("task == @WIKITEXT and adaptive").iloc[0]
    (line,) = [part for part in out.split(WIKITEXT)[1].splitlines() if row["strategy"] in part]
    assert f"{row['avg_experts']:.2f}" in line
    assert f"{row['perplexity']:.2f}" in line
    assert f"{row['matched_perplexity']:.4g}" in out
    for path in files:
        assert path.split("/")[-1] in out.replace("\n", "")


def test_aggregate_writes_beside_the_runs_unless_told(run, runs):
    code, *_ = run("aggregate", runs, "--no-figure", "--resamples", 99)
    assert code == 0
    assert (runs / "bh_routing_results.csv").is_file()
    again, *_ = run("aggregate", runs, "--no-figure", "--resamples", 99)
    assert again == 0  # its own files are no runs
    assert not (runs / "visualizations").exists()


def test_broken_files_are_listed_skipped_and_told_by_the_exit_code(run, write, runs):
    broken = write("broken", alpha=0.5, change=lambda content: content.pop("results"))
    code, _, err = run("aggregate", runs, "--no-figure", "--resamples", 99)
    assert code == 3
    assert f"left out: {broken}" in err.replace("\n", "")
    assert len(pd.read_csv(runs / "bh_routing_results.csv")) == 9
    code, _, err = run("plot", runs, "--panel", "heatmap")
    assert code == 3
    assert str(broken) in err


@pytest.mark.parametrize("command", ["aggregate", "plot", "report", "patterns"])
def test_where_nothing_can_be_read_older_files_stay(run, write, tmp_path, command):
    broken = write("broken", change=lambda content: content.pop("results"))
    older = tmp_path / "output" / "bh_routing_results.csv"
    older.parent.mkdir()
    older.write_text("of last week")
    option = ("--output", older.with_suffix(".png")) if command == "plot" else ("--output-dir",)
    code, out, err = run(command, broken.parent, *option, *([older.parent] * (len(option) == 1)))
    assert (code, out) == (3, "")
    assert f"left out: {broken}" in err
    assert "No run could be read, so nothing was written" in err
    assert [path.read_text() for path in older.parent.iterdir()] == ["of last week"]


def test_the_tables_change_together_or_not_at_all(run, write, runs, monkeypatch):
    """An error while drawing also stops the tables, so that all files are of one aggregation."""
    assert run("aggregate", runs, "--no-figure", "--resamples", 99)[0] == 0
    before = {path: path.read_bytes() for path in runs.glob("bh_routing_*")}
    write("another", alpha=0.5)
    (runs / "visualizations").mkdir()
    (runs / "visualizations" / "bh_comprehensive_comparison.png").mkdir()
    code, _, err = run("aggregate", runs, "--resamples", 99)
    assert code == 1
    assert "bh_comprehensive_comparison.png" in err
    assert {path: path.read_bytes() for path in runs.glob("bh_routing_*")} == before
    assert not list(runs.glob(".*.tmp"))


def test_what_cannot_be_compared_is_refused_or_kept_apart(run, write, runs):
    other = write("other", alpha=0.5, change=lambda content: content.update(max_length=32))
    code, _, err = run("aggregate", runs)
    assert code == 1
    assert str(other) in err
    assert "max_length 64 and 32" in err
    assert not (runs / "bh_routing_results.csv").exists()
    code, out, _ = run("aggregate", runs, "--keep-groups", "--no-figure", "--resamples", 99)
    assert code == 0
    assert f"{WIKITEXT}, group 2" in out
    assert run("plot", runs, "--panel", "heatmap")[0] == 0
    drawn = {path.name for path in (runs / "visualizations").iterdir()}
    assert drawn == {"heatmap_group1.png", "heatmap_group2.png"}


def test_the_margin_decides_what_is_equivalent(run, runs):
    for margin, equivalent in (("0.001", False), ("0.9", True)):
        run("aggregate", runs, "--no-figure", "--margin", margin, "--resamples", 99)
        compared = json.loads((runs / "bh_routing_comparisons.json").read_text())
        rows = [row for row in compared if row["task"] == WIKITEXT and "BH" in row["strategy"]]
        assert [row["equivalent"] for row in rows] == [equivalent]


def test_the_commands_need_no_torch(runs):
    unwanted = {"torch", "transformers", "lm_eval"}
    if int(pd.__version__.split(".")[0]) >= 3:  # before, tables in LaTeX load pyplot by themselves
        unwanted.add("matplotlib.pyplot")
    code = (
        "import sys\nfrom lm_eval_bh.cli import main\n"
        f"for arguments in (['aggregate', '--no-figure'], ['plot', '--panel', 'heatmap']):\n"
        f"    sys.argv = ['lm-eval-bh', *arguments, {str(runs)!r}]\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code\n"
        f"print({unwanted} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "set()"
