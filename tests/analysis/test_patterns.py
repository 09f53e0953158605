"""Routing patterns: on tables made by hand, against other people's code, and on real logs."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

from lm_eval_bh.analysis.patterns import write_patterns
from lm_eval_bh.analysis.patterns.clusters import cluster
from lm_eval_bh.analysis.patterns.complexity import complexity, spearman
from lm_eval_bh.analysis.patterns.findings import find_patterns, usage_of
from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import Piece, pieces_of, read_samples, read_token_log
from lm_eval_bh.analysis.patterns.specialisation import (
    entropy,
    independent_tokens,
    lift,
    shuffled_documents,
    specialisation,
)
from lm_eval_bh.analysis.patterns.token_classes import CLASSES, classify, vocabulary
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.cli.app import app
from lm_eval_bh.cli.patterns_command import find_tokenizer
from lm_eval_bh.errors import DataError
from lm_eval_bh.resources import tiny_olmoe

TABLES = ("complexity", "classes", "tokens", "specialisation", "documents", "clusters")


def piece(rows) -> Piece:
    """Return a piece of rows (task, document, layer, token, experts)."""
    task, document, layer, token, experts = zip(*rows, strict=True)
    return Piece(
        *(np.array(column, dtype=np.int64) for column in (task, document, layer, token)),
        count=np.array([len(some) for some in experts], dtype=np.int64),
        experts=np.array([expert for some in experts for expert in some], dtype=np.int64),
    )


def counted(rows, class_of=(0, 1, 0)) -> Counts:
    counts = Counts(["a", "b"], [0, 2], 4, ["x", "y", "unknown"], np.array(class_of), 100)
    counts.add(piece(rows))
    return counts


# Task a: one document of tokens 0 and 1; task b: one of token 5, which the tokenizer does not know.
ROWS = [
    (0, 7, 0, 0, (0, 1)),
    (0, 7, 0, 1, (1,)),
    (0, 7, 2, 0, (3,)),
    (0, 7, 2, 1, (0, 1, 2)),
    (1, 7, 0, 5, (2,)),
    (1, 7, 2, 5, (2, 3)),
]


def test_counts_by_hand():
    counts = counted(ROWS)
    assert counts.tokens.tolist() == [[[1, 1, 0], [1, 1, 0]], [[0, 0, 1], [0, 0, 1]]]
    assert counts.served[0, 0].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert counts.served[0, 1].tolist() == [[0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert counts.served[1, :, 2].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert counts.occurrences.tolist() == [1, 1, 0, 0, 0, 1]
    assert counts.experts_of.tolist() == [3, 4, 0, 0, 0, 3]
    assert counts.documents == [(0, 7), (1, 7)]
    tasks, length, served = counts.document_counts()
    assert tasks.tolist() == [0, 1]
    assert length.tolist() == [2, 1]
    assert served.tolist() == [[1, 2, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 1, 1]]
    assert usage_of(counts)[0].tolist() == [0.5, 1, 0, 0, 0.5, 0.5, 0.5, 0.5]


@given(st.permutations(ROWS), st.integers(1, 5))
def test_counts_do_not_depend_on_order_or_pieces(rows, cut):
    whole, parts = counted(ROWS), counted(rows[:cut])
    parts.add(piece(rows[cut:]))
    assert (whole.tokens == parts.tokens).all()
    assert (whole.served == parts.served).all()
    assert (usage_of(whole) == usage_of(parts)).all()
    assert (whole.occurrences == parts.occurrences).all()


def test_documents_beyond_the_limit_are_counted_but_not_kept():
    counts = Counts(["a"], [0], 2, ["unknown"], np.array([], dtype=np.int64), 1)
    counts.add(piece([(0, 0, 0, 3, (0,)), (0, 1, 0, 3, (1,))]))
    assert counts.tokens.sum() == 2
    assert counts.documents == [(0, 0)]


tables = arrays(np.int64, (2, 5), elements=st.integers(0, 30)).filter(
    lambda table: (table.sum(-1) > 0).all()
)


@given(tables)
def test_information_is_that_of_scikit_learn_and_scipy(table):
    from scipy import stats
    from sklearn.metrics import mutual_info_score

    served, tokens = table[0], table.sum(0)
    found, corrected, p = independent_tokens(served, tokens)
    assert found == pytest.approx(
        mutual_info_score(None, None, contingency=table.astype(float)), abs=1e-12
    )
    assert 0 <= corrected <= found
    occurring = table[:, tokens > 0]
    if occurring.shape[1] > 1:
        test = stats.chi2_contingency(occurring, correction=False, lambda_="log-likelihood")
        assert p == pytest.approx(test.pvalue, abs=1e-9)
    assert entropy(tokens) == pytest.approx(stats.entropy(tokens))


def test_correction_takes_away_what_chance_gives():
    from scipy import stats

    served, tokens = np.array([30, 60, 90, 20]), np.array([100, 200, 300, 400])
    table = np.stack([served, tokens - served])
    # Tables of the same margins where nothing tells anything, as if classes were shuffled.
    null = stats.random_table(table.sum(1), table.sum(0)).rvs(4000, random_state=0).astype(int)
    found, _, p = independent_tokens(null[:, 0], null.sum(1))
    assert found.mean() == pytest.approx(3 / (2 * tokens.sum()), rel=0.05)
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("served", [[0, 0], [40, 60]])
def test_an_expert_that_serves_all_or_nothing_tells_nothing(served):
    found, corrected, p = independent_tokens(np.array(served), np.array([40, 60]))
    assert (found, corrected, p) == (pytest.approx(0, abs=1e-12), 0, 1)


def test_documents_that_differ_are_no_experts_of_a_task():
    # Every document has a rate of its own, but the tasks have nothing to do with it.
    rng = np.random.default_rng(0)
    tokens = np.full(40, 200)
    served = rng.binomial(200, rng.beta(2, 2, (40, 300)).T.reshape(300, 40).T)
    kinds = np.arange(40) % 2
    tested = shuffled_documents(served, tokens, kinds, draws=199)
    assert (tested.p_value <= 0.05).mean() == pytest.approx(0.05, abs=0.03)
    assert tested.corrected.mean() < 0.5 * tested.information.mean()
    table = np.stack([served[kinds == kind].sum(0) for kind in (0, 1)], axis=-1)
    naive = independent_tokens(table, np.full(table.shape, 20 * 200))
    assert np.array_equal(naive.information, tested.information)
    assert (naive.p_value <= 0.05).mean() > 0.5  # what the shuffles are there for


def test_an_expert_of_a_task_is_found():
    tokens, kinds = np.full(20, 50), np.repeat([0, 1, 2], [8, 8, 4])
    served = np.where(kinds == 1, 40, 5)[:, None] + np.arange(20)[:, None] % 3
    tested = shuffled_documents(served, tokens, kinds)
    assert tested.p_value[0] == pytest.approx(1 / 500)
    assert tested.corrected[0] > 0.8 * tested.information[0] > 0


def test_lift_by_hand():
    assert lift(np.array([30, 10]), np.array([40, 160])).tolist() == [3.75, 0.3125]
    assert lift(np.array([0, 0]), np.array([4, 6])).tolist() == [1, 1]


def test_specialisation_by_hand():
    rows = [(0, 0, 0, 0, (0, 3))] * 10 + [(0, 0, 0, 1, (1, 3))] * 10
    rows += [(t, d, 2, k, e) for t, d, _, k, e in rows]
    table = specialisation(counted(rows))
    assert set(table["of"]) == {"token class"}  # there is one task
    first = table[table["layer"] == 0].set_index("expert")
    assert first["tokens"].tolist() == [10, 10, 0, 20]
    assert first["most"].tolist()[:2] == ["x", "y"]
    assert first["lift"].tolist()[:2] == [2, 2]
    assert first["information"].tolist() == pytest.approx([math.log(2), math.log(2), 0, 0])
    assert first["corrected"][0] == pytest.approx(math.log(2) - 1 / 40)
    assert first["share"][0] == pytest.approx(1 - 1 / 40 / math.log(2))
    assert first["entropy"].tolist() == pytest.approx([0, 0, 0, math.log(2)])
    assert first["normalized_entropy"][3] == pytest.approx(1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=10, max_size=40))
def test_correlation_is_scipys(pairs):
    from scipy import stats

    x, y = np.array(pairs, dtype=float).T
    found = spearman(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert found["spearman"] is None
        assert found["reason"] == "one of the two does not vary"
        return
    expected = stats.spearmanr(x, y)
    assert found["spearman"] == pytest.approx(expected.statistic)
    assert found["p_value"] == pytest.approx(expected.pvalue)
    assert -1 <= found["low"] <= found["spearman"] <= found["high"] <= 1


def test_interval_of_a_correlation_holds_what_it_promises():
    rng, rho = np.random.default_rng(0), 0.5
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's, of a bivariate normal
    inside = 0
    for _ in range(400):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 60).T
        found = spearman(x, y)
        inside += found["low"] <= truth <= found["high"]
    assert inside / 400 == pytest.approx(0.95, abs=0.03)


def test_complexity_by_hand():
    documents = pd.DataFrame(
        {
            "task": ["a"] * 12 + ["b"] * 12,
            "mean_experts": np.arange(24.0),
            "loss": [*np.arange(12.0), *[np.nan] * 12],
            "loss_unit": ["nats a token"] * 12 + [None] * 12,
        }
    )
    tokens = pd.DataFrame({"occurrences": [*range(5, 25), 1], "mean_experts": [*range(20), 99]})
    table = complexity(documents, tokens.assign(mean_experts=-tokens["mean_experts"]))
    assert table["task"].tolist() == ["a", "b", "all"]
    assert table["spearman"].tolist() == pytest.approx([1, np.nan, -1], nan_ok=True)
    assert table["n"].tolist() == [12, 0, 20]  # the token that occurs once does not count
    assert table["reason"][1].startswith("no loss was logged")


def test_planted_clusters_are_found():
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [30, 20, 10])
    centres = rng.random((3, 64))
    usage = (centres[truth] + 0.05 * rng.standard_normal((60, 64))).astype(np.float32)
    found = cluster(usage, truth, seed=3)
    assert adjusted_rand_score(truth, found.labels) == 1
    assert max(found.silhouettes, key=found.silhouettes.get) == 3
    assert found.agreement == pytest.approx(1)
    assert found.remark == "reasonable structure"
    assert np.bincount(found.labels).tolist() == [30, 20, 10]  # the largest is the first
    assert (cluster(usage, truth, seed=3).labels == found.labels).all()


def test_noise_has_no_structure():
    usage = np.random.default_rng(0).random((200, 64)).astype(np.float32)
    found = cluster(usage, np.arange(200) % 2, seed=0)
    assert found.remark == "no substantial structure"
    assert abs(found.agreement) < 0.05


@pytest.mark.parametrize("usage", [np.ones((9, 4)), np.ones((50, 4))], ids=["few", "alike"])
def test_what_cannot_be_clustered(usage):
    assert cluster(usage.astype(np.float32), np.zeros(len(usage), dtype=np.int64)) is None


@pytest.mark.parametrize(
    ("raw", "decoded", "kind"),
    [
        ("Ġthe", " the", "word start"),
        ("▁the", "the", "word start"),
        ("ing", "ing", "continuation"),
        ("Ġ19", " 19", "number"),
        ("Ġ@-@", " @-@", "punctuation"),
        (".", ".", "punctuation"),
        ("Ċ", "\n", "white space"),
        ("Ġ", " ", "white space"),
        ("é", "\ufffd", "part of a character"),
    ],
)
def test_token_classes(raw, decoded, kind):
    assert classify(raw, decoded, special=False) == kind
    assert classify(raw, decoded, special=True) == "special"


def test_vocabulary_of_the_demo_model():
    texts, classes = vocabulary(tiny_olmoe() / "tokenizer.json")
    assert len(texts) == len(classes) == 4096
    assert set(classes) <= set(CLASSES)
    assert classes[0] == "special"
    assert classes[texts.index(" the")] == "word start"


def test_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json could not be read"):
        vocabulary(tmp_path / "tokenizer.json")


def test_no_logs(write):
    write("bh")
    with pytest.raises(DataError, match="log_routing=samples"):
        write_patterns(load_experiments([write.folder]), write.folder)


def test_a_damaged_log_is_left_out(write):
    write("bh", log=True, alpha=0.3)
    write("other", log=True, alpha=0.4)
    next((write.folder / "logs" / "run-1").glob("*lambada*")).write_text("{")
    loaded = load_experiments([write.folder], force=True)
    assert [found.strategy for found in find_patterns(loaded)] == ["BH a=0.40, max 4"]
    assert any("lambada" in sentence for _, sentence in loaded.problems)


def test_files_of_a_written_log(write, tmp_path):
    write("bh", log=True)
    write("top", log=True, rule="topk")
    paths = write_patterns(load_experiments([write.folder]), tmp_path)
    folder = tmp_path / "patterns"
    assert sorted(paths) == sorted(folder.iterdir())
    assert len(paths) == 6 + 2 * 3 + 1
    documents = pd.read_csv(folder / "documents.csv")
    assert len(documents) == 2 * 3 * 4
    assert set(documents["loss"]) == {2.0}
    assert documents["cluster"].notna().all()
    tokens = pd.read_csv(folder / "tokens.csv")
    assert set(tokens["token_class"]) == {"unknown"}
    assert set(pd.read_csv(folder / "specialisation.csv")["of"]) == {"task"}
    text = (folder / "patterns.md").read_text()
    assert "fewer than 10 to correlate" in text
    assert "## How to read this" in text


def test_command_line(write, tmp_path):
    write("bh", log=True)
    words = ["patterns", str(write.folder), "--output-dir", str(tmp_path)]
    tokenizer = ["--tokenizer", str(tiny_olmoe() / "tokenizer.json")]
    done = CliRunner().invoke(app, [*words, *tokenizer])
    assert done.exit_code == 0, done.output
    assert "patterns.md" in done.output
    assert "special" in set(pd.read_csv(tmp_path / "patterns" / "tokens.csv")["token_class"])


def test_one_task_without_a_tokenizer(write, tmp_path):
    write("bh", log=True, tasks=("bh_wikitext",))
    write_patterns(load_experiments([write.folder]), tmp_path)
    assert pd.read_csv(tmp_path / "patterns" / "specialisation.csv").empty


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"pretrained": "tiny-olmoe"}, tiny_olmoe() / "tokenizer.json"),
        ({"pretrained": str(tiny_olmoe())}, tiny_olmoe() / "tokenizer.json"),
        (f"pretrained=some/model,tokenizer={tiny_olmoe()}", tiny_olmoe() / "tokenizer.json"),
        ({"pretrained": "some/model"}, None),
        ({"pretrained": "/not/there"}, None),
        ({}, None),
    ],
)
def test_tokenizer_of_a_run(arguments, found, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"config": {"model_args": arguments}}))
    assert find_tokenizer(file) == found


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """Return the folder of a run that logged every token, and everything of the first documents."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from lm_eval_bh.resources import shipped

    folder = tmp_path_factory.mktemp("full")
    log = f"log_routing=full,log_samples=12,log_dir={folder / 'logs'}"
    tracker = EvaluationTracker(output_path=str(folder))
    results = lm_eval.simple_evaluate(
        model="hf-bh",
        model_args=f"pretrained=tiny-olmoe,alpha=0.4,{log}",
        tasks=["bh_demo_lambada", "bh_demo_hellaswag"],
        task_manager=TaskManager(include_path=str(shipped("tasks")), include_defaults=False),
        limit=12,
        batch_size=8,
        bootstrap_iters=0,
        device="cpu",
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for task, some in samples.items():
        tracker.save_results_samples(task, some)
    return folder


@pytest.mark.slow
def test_both_logs_of_a_real_run_say_the_same(full_run):
    tasks = ["bh_demo_hellaswag", "bh_demo_lambada"]
    manifest = next(full_run.rglob("routing.json"))
    files = [manifest.parent / name for name in json.loads(manifest.read_text())["files"]]
    parquet, logs = ([f for f in files if f.suffix == end] for end in (".parquet", ".json"))
    counts = [
        Counts(tasks, range(4), 64, ["unknown"], np.array([], dtype=np.int64), 100)
        for _ in range(2)
    ]
    for some in read_token_log(parquet, tasks, tasks):
        counts[0].add(some)
    for log in logs:
        place = next(i for i, task in enumerate(tasks) if task.removeprefix("bh_") in log.name)
        for some in pieces_of(read_samples(log), place):
            counts[1].add(some)
    assert counts[0].tokens.sum() > 1000
    for name in ("tokens", "served", "occurrences", "experts_of", "documents"):
        assert np.array_equal(*(getattr(one, name) for one in counts)), name
    for one, other in zip(*(some.document_counts() for some in counts), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slow
def test_patterns_of_a_real_run(full_run):
    loaded = load_experiments([full_run])
    (found,) = find_patterns(loaded, tokenizer=tiny_olmoe() / "tokenizer.json")
    lambada = loaded.frame[loaded.frame["task"] == "bh_demo_lambada"].iloc[0]
    documents = found.documents[found.documents["task"] == "bh_demo_lambada"]
    assert len(documents) == 12
    assert documents["tokens"].sum() == lambada["tokens"]  # it has one request a document
    assert np.average(documents["mean_experts"], weights=documents["tokens"]) == pytest.approx(
        lambada["mean_experts"]
    )
    assert documents["loss"].notna().all()
    assert found.tokens["occurrences"].sum() == found.documents["tokens"].sum()
    assert found.classes["tokens"].sum() == found.documents["tokens"].sum()
    texts, classes = vocabulary(tiny_olmoe() / "tokenizer.json")
    row = found.tokens[found.tokens["text"] == " the"].iloc[0]
    assert (row["token_id"], row["token_class"]) == (texts.index(" the"), "word start")
    punctuation = found.classes[found.classes["token_class"] == "punctuation"]["tokens"].sum()
    assert 0 < punctuation < 0.3 * found.documents["tokens"].sum()
    assert len(found.specialisation) == 2 * 4 * 64
    assert found.specialisation["share"].between(0, 1).all()
    assert Counter(classes)["word start"] > 1000
    assert len(found.cluster_table()) == found.clusters.labels.max() + 1


@pytest.mark.slow
def test_losses_of_the_harness_stand_in_for_missing_samples(full_run):
    loaded = load_experiments([full_run])
    loaded.internal_routing_file = lambda run_id, task: None  # as with log_samples=0
    (found,) = find_patterns(loaded)
    units = found.documents.groupby("task")["loss_unit"].unique()
    assert units["bh_demo_lambada"].tolist() == ["nats a token"]
    assert pd.isna(units["bh_demo_hellaswag"]).all()
    reasons = found.complexity.set_index("task")["reason"]
    assert reasons["bh_demo_hellaswag"].startswith("no loss was logged")
