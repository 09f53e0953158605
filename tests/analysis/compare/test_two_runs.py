"""Any two runs of lm-eval, compared: against scipy, statsmodels and counts by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.weightstats import ttost_paired

from lm_eval_bh.analysis.compare.power import detectable, documents_needed
from lm_eval_bh.analysis.compare.two_runs import COLUMNS, compare_runs
from lm_eval_bh.errors import DataError, ParameterError

DOCUMENTS = 60
DATES = itertools.count()


def aggregated(metric, scores):
    """Return what lm-eval writes of a task: means, ratios of totals, or BLEU of a corpus."""
    if not isinstance(scores[0], list):
        return sum(scores) / len(scores)
    if metric == "bleu":
        return 12.5
    total, size = (sum(part) for part in zip(*scores, strict=True))
    ratio = -total / size
    return ratio / math.log(2) if metric == "bits_per_byte" else math.exp(ratio)


def logged(folder, scores, *, task="qa", higher=True, model="dense/one", prompts="p", **more):
    """Write a run as lm-eval does; scores are of a metric, or of (metric, filter)."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {key if isinstance(key, tuple) else (key, "none"): v for key, v in scores.items()}
    filters = list(dict.fromkeys(name for _, name in scores))
    number = len(next(iter(scores.values())))
    ids = more.get("ids", range(number))
    lines = []
    for name in filters:
        of_filter = {metric: v for (metric, other), v in scores.items() if other == name}
        for place, doc_id in enumerate(ids):
            values = {metric: v[place] for metric, v in of_filter.items()}
            line = {
                "doc_id": doc_id,
                "resps": [["x"]],
                "filter": name,
                "metrics": list(values),
                "doc_hash": f"{more.get('data', 'd')}{doc_id}",
                "prompt_hash": f"{prompts}{doc_id}",
                "target_hash": "t",
            }
            lines.append(json.dumps(line | values) + "\n")
    metrics = list(dict.fromkeys(metric for metric, _ in scores))
    values = {f"{metric},{name}": aggregated(metric, v) for (metric, name), v in scores.items()}
    content = {
        "results": {task: {"alias": task, "sample_len": number} | values | more.get("values", {})},
        "configs": {task: {}},
        "n-samples": {task: {"original": 500, "effective": number}},
        "higher_is_better": {task: dict.fromkeys(metrics, higher)},
        "config": {"model": "hf", "model_args": {"pretrained": model}},
        "model_name": model,
        "date": next(DATES),
    }
    time = more.get("time", "2026-01-01T00-00-00.5")
    (folder / f"results_{time}.json").write_text(json.dumps(content))
    if more.get("samples", True):
        (folder / f"samples_{task}_{time}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def right():
    """Return two models' correct answers to the same questions, float [documents] each."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=DOCUMENTS)
    return tuple(
        (rng.normal(skill, 0.7, DOCUMENTS) > difficulty).astype(float) for skill in (0.0, 0.8)
    )


def test_right_and_wrong_of_two_dense_models(tmp_path, right):
    a = logged(tmp_path / "a", {"acc": right[0].tolist()})
    b = logged(tmp_path / "b", {"acc": right[1].tolist()}, model="dense/two")
    found = compare_runs(a, b, accuracy_margin=0.3)
    assert (found.names, found.problems, found.notes) == (("dense/one", "dense/two"), [], [])
    assert {name: str(kind) for name, kind in found.table.dtypes.items()} == COLUMNS
    (row,) = found.table.to_dict(orient="records")
    only_a, only_b = ((right[i] > right[1 - i]).sum() for i in (0, 1))
    assert (row["only_a"], row["only_b"], row["documents"]) == (only_a, only_b, DOCUMENTS)
    assert row["a"] == pytest.approx(right[0].mean())
    assert row["difference"] == pytest.approx((right[1] - right[0]).mean())
    both = np.array([[(right[0] * right[1]).sum(), only_a], [only_b, 0]])
    assert row["p_value"] == pytest.approx(mcnemar(both, exact=True).pvalue)
    assert row["equivalence_p"] == pytest.approx(ttost_paired(right[1], right[0], -0.3, 0.3)[0])
    low, high = stats.bootstrap(
        (right[1] - right[0],), np.mean, method="percentile", random_state=np.random.default_rng(9)
    ).confidence_interval
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high), abs=0.02)
    assert row["p_value"] == row["p_adjusted"] < 0.05
    assert row["verdict"] == "better"
    assert "B is 0.3 better than A" in row["sentence"]


def test_perplexities_are_ratios_of_totals(tmp_path):
    rng = np.random.default_rng(1)
    words = rng.integers(50, 400, DOCUMENTS)
    losses = [words * (3 + rng.normal(0, 0.3, DOCUMENTS)), words * 0.02]
    losses[1] = losses[0] + losses[1] + rng.normal(0, 1, DOCUMENTS)
    runs = [
        logged(
            tmp_path / name,
            {
                "word_perplexity": [[-x, int(w)] for x, w in zip(loss, words, strict=True)],
                "byte_perplexity": [[-x, int(5 * w)] for x, w in zip(loss, words, strict=True)],
                "bits_per_byte": [[-x, int(5 * w)] for x, w in zip(loss, words, strict=True)],
            },
            higher=False,
        )
        for name, loss in zip("ab", losses, strict=True)
    ]
    (row,) = compare_runs(*runs).table.to_dict(orient="records")  # one, for they are one loss
    assert row["metric"] == "word_perplexity"
    assert row["a"] == pytest.approx(math.exp(losses[0].sum() / words.sum()))
    assert row["ratio"] == pytest.approx(math.exp((losses[1] - losses[0]).sum() / words.sum()))
    assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
    assert row["verdict"] == "worse"
    assert f"B is {100 * (row['ratio'] - 1):.3g} % worse than A [+" in row["sentence"]
    # The same numbers seen from B: everything is reversed.
    (other,) = compare_runs(runs[1], runs[0]).table.to_dict(orient="records")
    assert other["ratio"] == pytest.approx(1 / row["ratio"])
    assert (other["verdict"], other["p_value"]) == ("better", pytest.approx(row["p_value"]))


def test_every_filter_and_every_scale(tmp_path):
    rng = np.random.default_rng(2)
    strict, flexible = rng.integers(0, 2, (2, DOCUMENTS)).astype(float)
    length = rng.uniform(0, 40, DOCUMENTS)
    scores = {
        ("exact_match", "strict-match"): strict.tolist(),
        ("exact_match", "flexible-extract"): flexible.tolist(),
        ("length", "strict-match"): length.tolist(),
        ("bleu", "strict-match"): [[1, 2]] * DOCUMENTS,  # of whole tasks only
    }
    a = logged(tmp_path / "a", scores, higher=None)
    longer = (length * rng.normal(1.1, 0.02, DOCUMENTS)).tolist()
    b = logged(tmp_path / "b", scores | {("length", "strict-match"): longer}, higher=None)
    table = compare_runs(a, b).table.set_index(["metric", "filter"])
    assert set(table.index) == set(scores)
    assert "only the task has" in table["reason"].loc[("bleu", "strict-match")]
    same = table.loc[("exact_match", "flexible-extract")]
    assert (same["difference"], same["p_value"], same["only_a"]) == (0, 1, 0)
    assert same["equivalence_p"] == pytest.approx(0.99**DOCUMENTS)
    assert same.isna()[["documents_needed", "detectable"]].all()
    row = table.loc[("length", "strict-match")]
    assert row["test"] == "paired t"
    assert row["p_value"] == pytest.approx(stats.ttest_rel(longer, length).pvalue)
    assert row["margin"] == pytest.approx(0.01 * max(longer))
    assert row["equivalence_p"] == pytest.approx(
        ttost_paired(np.array(longer), length, -row["margin"], row["margin"])[0]
    )
    assert row["verdict"] == "higher"  # nobody says which is better


def test_p_values_are_adjusted_over_all_rows(tmp_path):
    rng = np.random.default_rng(3)
    runs = [
        logged(
            tmp_path / name,
            {f"m{i}": rng.normal(shift * i, 1, DOCUMENTS).tolist() for i in range(4)},
        )
        for name, shift in (("a", 0), ("b", 0.15))
    ]
    table = compare_runs(*runs, margin=0.1).table
    for name in ("p_value", "equivalence_p"):
        adjusted = table[name.replace("_value", "") + "_adjusted"]
        assert adjusted.to_list() == pytest.approx(stats.false_discovery_control(table[name]))


def test_equivalent_is_said_of_what_is_shown_to_be(tmp_path):
    rng = np.random.default_rng(4)
    one = rng.uniform(0.3, 0.7, DOCUMENTS)
    for name, other, verdict in (
        ("same", one + rng.normal(0, 0.005, DOCUMENTS), "equivalent"),
        ("less", one - 0.005 + rng.normal(0, 0.001, DOCUMENTS), "equivalent"),
        ("noisy", one + rng.normal(0, 0.2, DOCUMENTS), "undecided"),
    ):
        a = logged(tmp_path / name / "a", {"f1": one.tolist()})
        b = logged(tmp_path / name / "b", {"f1": other.tolist()})
        (row,) = compare_runs(a, b).table.to_dict(orient="records")
        assert row["verdict"] == verdict
        assert ("though not the same" in row["sentence"]) == (name == "less")
        assert ("measured size needs" in row["sentence"]) == (name == "noisy")


def test_the_documents_needed_have_the_power():
    """Simulated: 80 % of t tests detect the difference, and fewer with 20 % fewer documents."""
    rng = np.random.default_rng(5)
    needed = documents_needed(0.05, 0.2, 0.05, 0.8)
    assert needed == 128  # G*Power's and R's pwr.t.test(d = .25, type = "paired"): 127.5
    draws = rng.normal(0.05, 0.2, (4000, needed))
    seen = (stats.ttest_1samp(draws, 0, axis=1).pvalue <= 0.05).mean()
    assert seen == pytest.approx(0.8, abs=0.03)
    assert detectable(0.2, needed, 0.05, 0.8) == pytest.approx(0.05, rel=0.01)
    assert documents_needed(0.0, 0.2, 0.05, 0.8) is None
    assert documents_needed(0.1, 0.0, 0.05, 0.8) == 2
    assert documents_needed(50.0, 0.1, 0.05, 0.8) == 2
    assert documents_needed(1e-6, 1.0, 0.05, 0.8) > 1e12
    for size in (0.4, 0.8, 1.5, 3.0):  # the fewest with that power
        n = documents_needed(size, 1.0, 0.05, 0.9)
        powers = [
            1 - stats.nct.cdf(t, m - 1, size * m**0.5) + stats.nct.cdf(-t, m - 1, size * m**0.5)
            for m, t in ((m, stats.t.ppf(0.975, m - 1)) for m in (n - 1, n) if m > 1)
        ]
        assert powers[-1] >= 0.9
        assert all(power < 0.9 for power in powers[:-1])


def test_only_shared_documents_count(tmp_path, right):
    a = logged(tmp_path / "a", {"acc": right[0].tolist()})
    some = right[1][20:].tolist()
    b = logged(tmp_path / "b", {"acc": some}, ids=range(20, DOCUMENTS), prompts="chat")
    found = compare_runs(a, b)
    (row,) = found.table.to_dict(orient="records")
    assert row["documents"] == DOCUMENTS - 20
    assert row["a"] == pytest.approx(right[0][20:].mean())
    assert "A has 60 documents and B 40" in found.notes[0][1]
    assert "the prompts differ" in found.notes[1][1]
    b = logged(tmp_path / "other", {"acc": right[1].tolist()}, data="other")
    assert "the documents differ" in compare_runs(a, b).table["reason"].item()


def test_what_cannot_be_compared_says_why(tmp_path, right):
    a = logged(tmp_path / "a", {"acc": right[0].tolist()})
    silent = logged(tmp_path / "silent", {"acc": right[1].tolist()}, samples=False)
    table = compare_runs(a, silent).table
    assert table["sentence"].item().startswith("qa: not compared, there are no samples of B")
    other = logged(tmp_path / "other", {"em": right[1].tolist()})
    table = compare_runs(a, other).table
    assert dict(zip(table["metric"], table["reason"], strict=True)) == {
        "acc": "only A has it",
        "em": "only B has it",
    }
    holes = [math.nan, *right[1][1:].tolist()]
    holed = logged(tmp_path / "holed", {"acc": holes})
    assert "no score, or one that is not finite" in compare_runs(a, holed).table["reason"].item()
    words = [
        logged(tmp_path / f"words{n}", {"word_perplexity": [[-9.0, n + i] for i in range(9)]})
        for n in (1, 2)
    ]
    assert "the words of the documents differ" in compare_runs(*words).table["reason"].item()


def test_a_damaged_file_is_a_problem_not_an_end(tmp_path, right):
    a = logged(tmp_path / "a", {"acc": right[0].tolist()})
    b = logged(tmp_path / "b", {"acc": right[1].tolist()})
    path = next(b.glob("samples_*"))
    path.write_text(path.read_text()[:300])
    found = compare_runs(a, b)
    assert found.table["reason"].tolist() == ["the samples of B could not be read"]
    assert [name for name, _ in found.problems] == [path]
    assert pd.isna(found.table["p_adjusted"]).all()


def test_which_runs_are_meant_must_be_clear(tmp_path, right):
    a = logged(tmp_path / "a", {"acc": right[0].tolist()})
    logged(a, {"acc": right[1].tolist()}, time="2026-01-02T00-00-00.5")
    b = logged(tmp_path / "b", {"acc": right[1].tolist()}, task="other")
    with pytest.raises(DataError, match=r"has 2 runs of qa: give the one to compare"):
        compare_runs(a, b)
    files = sorted(a.glob("results_*"))
    assert len(compare_runs(*files).table) == 1
    with pytest.raises(DataError, match="no task in common"):
        compare_runs(files[0], b)
    with pytest.raises(ParameterError, match="the same run"):
        compare_runs(files[0], files[0])
    with pytest.raises(ParameterError, match="'qs' in common: use qa"):
        compare_runs(*files, tasks=["qs"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no results_\*\.json"):
        compare_runs(tmp_path / "empty", b)
    for wrong in ({"power": 1.0}, {"margin": 0}, {"resamples": 0}):
        with pytest.raises(ParameterError, match=next(iter(wrong))):
            compare_runs(*files, **wrong)


def test_what_lm_eval_itself_wrote(real_runs):
    found = compare_runs(real_runs / "stock", real_runs / "bh", resamples=99)
    assert found.names == ("tiny-olmoe", "tiny-olmoe, BH a=0.40, max 8")
    assert set(zip(found.table["task"], found.table["metric"], strict=True)) == {
        ("bh_demo_wikitext", "word_perplexity"),
        ("bh_demo_lambada", "perplexity"),
        ("bh_demo_lambada", "acc"),
        ("bh_demo_hellaswag", "acc"),
        ("bh_demo_hellaswag", "acc_norm"),
    }
    assert found.table["reason"].isna().all()
    results = json.loads(next((real_runs / "bh").rglob("results_*.json")).read_text())["results"]
    for _, row in found.table.iterrows():
        assert row["b"] == pytest.approx(results[row["task"]][f"{row['metric']},none"])
    assert (found.table["documents"] == 4).all()
    twins = compare_runs(real_runs / "bh", real_runs / "again", resamples=99).table
    assert (twins["difference"] == 0).all()
