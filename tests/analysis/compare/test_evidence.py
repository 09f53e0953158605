"""Comparisons need evidence: a mean confirmed by results.json, documents by samples."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from lm_eval_bh.analysis.compare.paired import compare
from lm_eval_bh.analysis.compare.two_runs import compare_runs
from lm_eval_bh.analysis.read.averages import counted
from lm_eval_bh.analysis.table.experiments import load_experiments

NAN = math.nan


@pytest.mark.parametrize(
    ("scores", "value", "documents"),
    [
        pytest.param([1, 0, 1, 0], 0.5, [0, 1, 2, 3], id="the mean"),
        pytest.param([1, 0, 1], 0.666667, [0, 1, 2], id="the mean, rounded"),
        pytest.param([1, 0, -1, -1], 0.5, [0, 1], id="-1 is left out"),
        pytest.param([1, 0, -100, -100], 0.5, [0, 1], id="another negative filler"),
        pytest.param([1, 0, NAN, NAN], 0.5, [0, 1], id="NaN, or no score, is left out"),
        pytest.param([1, 0, NAN, -1], 0.5, [0, 1], id="both"),
        pytest.param([-1.5, -0.5, -1, 0], -0.75, [0, 1, 2, 3], id="a mean of negative scores"),
        pytest.param([1, -1, 1, -1], 0.0, [0, 1, 2, 3], id="-1 as a score like any other"),
        pytest.param([1, 0], None, [0, 1], id="nothing says otherwise"),
        pytest.param([1, 0, 1], 0.7, "own way", id="one digit confirms nothing"),
        pytest.param([1, 0, 1, 0], 50.0, "own way", id="percent"),
        pytest.param([1, 1, 0, 0], 0.8, "own way", id="anything else"),
        pytest.param([-1, -0.5, 1], 1.0, "own way", id="two kinds of negative scores"),
        pytest.param([-1, -1, -1], -1.0, "do not count", id="no document counts"),
        pytest.param([1, NAN, 0], NAN, "no score, or one that is not finite", id="NaN itself"),
        pytest.param([1, math.inf], None, "not finite", id="infinite"),
    ],
)
def test_which_documents_a_value_is_the_mean_of(scores, value, documents):
    found = counted(pd.Series(scores, dtype=float), value)
    if isinstance(documents, str):
        assert documents in found
    else:
        assert found.tolist() == documents


def run(folder, lines, values, filters=("none",), task="niah"):
    """Write a run of documents with the lines given, as lm-eval does."""
    folder.mkdir(parents=True)
    metrics = {f"{m},{f}": v for f in filters for m, v in values.items()} if values else {}
    content = {
        "results": {task: {"alias": task, **metrics}},
        "configs": {task: {}},
        "config": {"model": "hf", "model_args": {"pretrained": f"a/{folder.name}"}},
    }
    text = json.dumps(content)
    (folder / "results_2026-01-01T00-00-00.5.json").write_text(text)
    (folder / f"samples_{task}_2026-01-01T00-00-00.5.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    return folder


def lines_of(scores, **more):
    """Return a line for each document; a value of ``more`` that is None leaves its key out."""
    found = []
    for i, of_document in enumerate(scores):
        line = {
            "doc_id": i,
            "doc": {"text": f"d{i}"},
            "arguments": [[f"p{i}"]],
            "target": "t",
            "resps": [["x"]],
            "filter": "none",
            "metrics": list(of_document),
            "doc_hash": f"d{i}",
            "prompt_hash": f"p{i}",
            "target_hash": "t",
        }
        line |= {name: value(i) if callable(value) else value for name, value in more.items()}
        found.append({k: v for k, v in line.items() if v is not None} | of_document)
    return found


def ruler(right):
    """RULER: a document counts for its own length, and has -1 for all others."""
    short = [{"4096": float(i < right), "8192": -1.0, "16384": -1.0} for i in range(20)]
    return short + [{"4096": -1.0, "8192": float(i % 2), "16384": -1.0} for i in range(20)]


def test_a_task_s_own_aggregation_is_honoured_or_named(tmp_path):
    a = run(tmp_path / "a", lines_of(ruler(18)), {"4096": 0.9, "8192": 0.5, "16384": -1})
    b = run(tmp_path / "b", lines_of(ruler(16)), {"4096": 0.8, "8192": 0.7, "16384": -1})
    found = compare_runs(a, b)
    rows = found.table.set_index("metric")
    assert rows.loc["4096", ["a", "b", "documents"]].tolist() == [0.9, 0.8, 20]
    assert rows.loc["4096", "note"] == "20 of 40 documents; the task leaves out the others"
    assert (
        "its own way (its documents give -0.25, results.json has 0.7) in B"
        in (rows.loc["8192", "sentence"])
    )
    assert "do not count" in rows.loc["16384", "reason"]
    assert rows["p_value"].notna().tolist() == [True, False, False]
    assert [sentence for _, sentence in found.notes] == [
        "niah 4096: 20 of 40 documents; the task leaves out the others."
    ]


def test_documents_without_a_score_are_those_that_the_task_leaves_out(tmp_path):
    scores = [{"em": 1.0} if i % 3 else {} for i in range(12)]
    a = run(tmp_path / "a", lines_of(scores), {"em": 1.0})
    b = run(tmp_path / "b", lines_of(scores), {"em": 1.0})
    [row] = compare_runs(a, b).table.to_dict(orient="records")
    assert (row["documents"], row["a"]) == (8, 1.0)


def test_a_perplexity_is_confirmed_too(tmp_path):
    losses = [{"word_perplexity": [-float(i + 5), 4]} for i in range(10)]
    right = math.exp(9.5 / 4)
    for value, reason in ((right, None), (round(right, 4), None), (2.0, "its own way")):
        a = run(tmp_path / f"{value}" / "a", lines_of(losses), {"word_perplexity": value})
        b = run(tmp_path / f"{value}" / "b", lines_of(losses), {"word_perplexity": right})
        [row] = compare_runs(a, b).table.to_dict(orient="records")
        assert reason in row["reason"] if reason else pd.isna(row["reason"])


def test_metrics_that_are_left_out_are_named(tmp_path):
    scores = [{"acc": float(i % 2), "brier_score": [i % 2, [0.4, 0.6]]} for i in range(10)]
    values = {"acc": 0.5, "acc_stderr": 0.1, "brier_score": 0.3}
    a = run(tmp_path / "a", lines_of(scores), values)
    b = run(tmp_path / "b", lines_of(scores), values | {"bleu": 3.0})
    rows = compare_runs(a, b).table.set_index("metric")
    assert rows.index.tolist() == ["acc", "brier_score", "bleu"]
    assert rows.loc["brier_score", "sentence"] == (
        "niah brier_score: not compared, only the task has it, not single documents."
    )
    assert rows.loc["bleu", "reason"] == "only B has it"


def test_a_metric_that_results_json_lacks_is_compared_with_a_note(tmp_path):
    scores = [{"acc": float(i % 2)} for i in range(10)]
    a, b = (run(tmp_path / n, lines_of(scores), v) for n, v in (("a", {"acc": 0.5}), ("b", {})))
    found = compare_runs(a, b)
    assert pd.isna(found.table["reason"].item())
    assert "results.json of B has no value for it" in found.table["note"].item()
    assert len(found.notes) == 1


SCORES = [{"acc": float(i % 3 > 0)} for i in range(12)]
NO_HASHES = {"doc_hash": None, "prompt_hash": None, "target_hash": None}


@pytest.mark.parametrize(
    ("a", "b", "reason", "note"),
    [
        ({}, {}, None, None),
        (NO_HASHES, NO_HASHES, None, None),
        (NO_HASHES, {}, None, None),
        ({}, {"doc_hash": "other"}, "the documents differ", None),
        (NO_HASHES, NO_HASHES | {"doc": {"text": "other"}}, "the documents differ", None),
        (NO_HASHES, {"doc": {"text": "other"}}, "the documents differ", None),
        (NO_HASHES | {"doc": None}, {}, "do not identify their documents", None),
        (NO_HASHES | {"doc": None}, NO_HASHES | {"doc": None}, "do not identify", None),
        ({}, {"prompt_hash": "other"}, None, "the prompts differ"),
        (NO_HASHES, NO_HASHES | {"arguments": [["other"]]}, None, "the prompts differ"),
        (NO_HASHES | {"arguments": None}, {}, None, "do not contain the prompts"),
        ({"prompt_hash": None, "arguments": None}, {}, None, "do not contain the prompts"),
    ],
)
def test_missing_evidence_is_not_agreement(a, b, reason, note, tmp_path):
    runs = [
        run(tmp_path / name, lines_of(SCORES, **more), {"acc": 8 / 12})
        for name, more in (("a", a), ("b", b))
    ]
    found = compare_runs(*runs)
    [row] = found.table.to_dict(orient="records")
    assert reason in row["reason"] if reason else pd.isna(row["reason"])
    assert [note in sentence for _, sentence in found.notes] == [True] * bool(note)
    assert note in row["note"] if note else pd.isna(row["note"])


def two_filters(order):
    """Return samples of earlier releases of lm-eval: one line per filter, without its name."""
    plain = {"filter": None, "metrics": None}
    strict = lines_of([{"exact_match": float(i % 2)} for i in range(12)], **plain)
    flexible = lines_of([{"exact_match": 1.0} for _ in range(12)], **plain)
    lines = strict + flexible
    return sorted(lines, key=lambda line: line["doc_id"]) if order == "by document" else lines


@pytest.mark.parametrize("order", ["by document", "by filter"])
def test_filters_without_names_have_those_of_results_json(order, tmp_path):
    filters = {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0}
    runs = []
    for name in "ab":
        runs.append(run(tmp_path / name, two_filters(order), {}))
        file = next(runs[-1].glob("results*"))
        content = json.loads(file.read_text())
        content["results"]["niah"] |= filters
        file.write_text(json.dumps(content))
    found = compare_runs(*runs)
    values = zip(found.table["filter"], found.table["a"], found.table["reason"], strict=True)
    assert [(name, value) for name, value, reason in values if pd.isna(reason)] == [
        ("strict-match", 0.5),
        ("flexible-extract", 1.0),
    ]
    assert all("do not name their filters" in sentence for _, sentence in found.notes)


def test_lines_that_no_filter_is_known_for_are_left_out_with_a_note(tmp_path):
    runs = [run(tmp_path / name, two_filters("by filter"), {"exact_match": 0.5}) for name in "ab"]
    found = compare_runs(*runs)
    [row] = found.table.to_dict(orient="records")
    assert (row["filter"], row["a"]) == ("none", 0.5)
    assert "up to 2 lines per document" in row["note"]
    assert "only the first line of each is compared" in found.notes[0][1]


def test_documents_that_are_logged_twice_are_noted(tmp_path):
    lines = lines_of(SCORES)
    twice = [*lines, lines[1] | {"acc": 0.0}]
    a = run(tmp_path / "a", twice, {"acc": 8 / 12})
    b = run(tmp_path / "b", [*lines, lines[1]], {"acc": 8 / 12})
    [(_, sentence)] = compare_runs(a, b).notes
    assert "of A, documents logged more than once with different scores: 1" in sentence


def change_samples(folder, change):
    for file in folder.rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for number, line in enumerate(lines):
            change(number, line)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_value(key, value):
    def change(content):
        for values in content["results"].values():
            if key in values:
                values[key] = value

    return change


@pytest.mark.parametrize(
    ("key", "metric"),
    [
        ("acc,none", "acc"),
        ("acc_norm,none", "acc_norm"),
        ("word_perplexity,none", "word_perplexity"),
        ("perplexity,none", "target_perplexity"),
    ],
)
def test_aggregate_tests_no_value_that_the_results_do_not_confirm(key, metric, write):
    write("top4", rule="topk", alpha=None, max_k=4)
    write("bh", change=change_value(key, 0.123456))
    table = compare(load_experiments([write.folder]), resamples=99).set_index("metric")
    assert "its own way" in table.loc[metric, "reason"]
    assert pd.isna(table.loc[metric, "p_value"])
    others = table[table.index != metric]
    assert others["reason"].isna().sum() == 3


def test_aggregate_leaves_out_what_the_task_leaves_out(write):
    for name, rule in (("top4", "topk"), ("bh", "bh")):
        write(name, rule=rule, alpha=None if rule == "topk" else 0.4, right=(1, 0, -1, -1))
        change_samples(
            write.folder / name,
            lambda number, line: line.update({"acc": -1} if number > 1 and "acc" in line else {}),
        )
    for file in write.folder.rglob("results_*.json"):
        content = json.loads(file.read_text())
        change_value("acc_norm,none", 0.5)(content)
        file.write_text(json.dumps(content))
    table = compare(load_experiments([write.folder]), resamples=99).set_index("metric")
    assert table.loc["acc_norm", ["documents", "value"]].tolist() == [2, 0.5]


def drop_hashes(number, line):
    for part in ("doc", "prompt", "target"):
        del line[f"{part}_hash"]


@pytest.mark.parametrize(
    ("doc", "reason"),
    [
        (lambda side: {"doc": {"q": "same"}, "arguments": []}, None),
        (lambda side: {"doc": {"q": side}, "arguments": []}, "the documents differ"),
        (lambda side: {}, "do not identify their documents"),
    ],
)
def test_aggregate_without_hashes(doc, reason, write):
    for name, rule in (("top4", "topk"), ("bh", "bh")):
        write(name, rule=rule, alpha=None if rule == "topk" else 0.4)

        def change(number, line, name=name):
            drop_hashes(number, line)
            line.update(doc(name))

        change_samples(write.folder / name, change)
    table = compare(load_experiments([write.folder]), resamples=99)
    for found in table["reason"]:
        assert reason in found if reason else pd.isna(found)
