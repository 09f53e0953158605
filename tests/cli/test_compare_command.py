"""The command compare: what it prints and writes."""

from __future__ import annotations

import json

import pandas as pd

from lm_eval_bh.analysis.compare.two_runs import COLUMNS


def test_compare_prints_tables_and_verdicts(run, runs, tmp_path):
    code, out, err = run(
        "compare", runs / "top4", runs / "top2", "--resamples", 99, "--output", tmp_path / "c.json"
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    a, b = runs / "top4", runs / "top2"
    assert lines[:2] == [f"A: some/model, top-4 ({a})", f"B: some/model, top-2 ({b})"]
    sentences = [line for line in lines if line.startswith("bh_wikitext word_perplexity")]
    assert len(sentences) == 1
    assert "% worse than A [" in sentences[0]
    written = json.loads((tmp_path / "c.json").read_text())
    assert [row["sentence"] for row in written["rows"] if row["task"] == "bh_wikitext"] == sentences
    assert written["settings"]["margin"] == 0.01
    assert all(list(row) == list(COLUMNS) for row in written["rows"])
    assert lines[-2].startswith("B against A: ")


def test_compare_writes_csv_of_one_task(run, runs, tmp_path):
    output = tmp_path / "c.csv"
    code, _, _ = run(
        "compare", runs / "top4", runs / "bh", "--tasks", "bh_lambada", "--output", output
    )
    assert code == 0
    table = pd.read_csv(output)
    assert list(table) == list(COLUMNS)
    assert set(table["task"]) == {"bh_lambada"}


def test_broken_samples_are_told_by_the_exit_code(run, runs):
    (broken,) = (runs / "bh").glob("samples_bh_lambada*")
    broken.write_text("{}\n")
    code, out, err = run("compare", runs / "top4", runs / "bh", "--resamples", 99)
    assert code == 3
    assert f"left out: Line 1 of {broken} is damaged" in err
    assert "bh_lambada: not compared, the samples of B could not be read." in out
    assert "bh_wikitext word_perplexity: " in out
