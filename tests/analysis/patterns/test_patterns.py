"""Routing patterns: on tables made by hand, and against other people's code."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lm_eval_bh.analysis.patterns.clusters import cluster
from lm_eval_bh.analysis.patterns.complexity import complexity, spearman, spearman_of_table
from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import Piece
from lm_eval_bh.analysis.patterns.specialisation import (
    entropy,
    independent_tokens,
    lift,
    shuffled_documents,
    specialisation,
)
from lm_eval_bh.analysis.patterns.token_classes import CLASSES, classify, vocabulary
from lm_eval_bh.errors import DataError
from lm_eval_bh.resources import tiny_olmoe


def piece(rows) -> Piece:
    """Return a piece of rows (task, document, layer, token, experts)."""
    task, document, layer, token, experts = zip(*rows, strict=True)
    return Piece(
        Path("log"),
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
    assert counts.token_table().to_dict("list") == {
        "token_id": [0, 1, 5],
        "token_class": ["x", "y", "unknown"],
        "occurrences": [1, 1, 1],
        "mean_experts": [1.5, 2.0, 1.5],
    }
    documents, served = counts.document_table()
    assert documents.to_dict("list") == {
        "task": ["a", "b"],
        "document": [7, 7],
        "tokens": [2, 1],
        "mean_experts": [1.75, 1.5],
    }
    assert served.tolist() == [[1, 2, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 1, 1]]
    assert counts.class_table().to_dict("list") == {
        "task": ["a", "a", "b"],
        "token_class": ["x", "y", "unknown"],
        "tokens": [1, 1, 1],
        "mean_experts": [1.5, 2.0, 1.5],
    }


@given(st.permutations(ROWS), st.integers(1, 5))
def test_counts_do_not_depend_on_order_or_pieces(rows, cut):
    whole, parts = counted(ROWS), counted(rows[:cut])
    parts.add(piece(rows[cut:]))
    assert (whole.tokens == parts.tokens).all()
    assert (whole.served == parts.served).all()
    assert whole.token_table().equals(parts.token_table())
    for one, other in zip(whole.document_table(), parts.document_table(), strict=True):
        assert np.array_equal(one, other)


def test_documents_beyond_the_limit_are_counted_but_not_kept():
    counts = Counts(["a"], [0], 2, ["unknown"], np.array([], dtype=np.int64), 1)
    counts.add(piece([(0, 0, 0, 3, (0,)), (0, 1, 0, 3, (1,))]))
    assert counts.tokens.sum() == 2
    assert counts.document_table()[0]["document"].tolist() == [0]


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
    # Tables with the same margins but without information, as if classes were shuffled.
    null = stats.random_table(table.sum(1), table.sum(0)).rvs(4000, random_state=0).astype(int)
    found, _, p = independent_tokens(null[:, 0], null.sum(1))
    assert found.mean() == pytest.approx(3 / (2 * tokens.sum()), rel=0.05)
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("served", [[0, 0], [40, 60]])
def test_an_expert_that_serves_all_or_nothing_tells_nothing(served):
    found, corrected, p = independent_tokens(np.array(served), np.array([40, 60]))
    assert (found, corrected, p) == (pytest.approx(0, abs=1e-12), 0, 1)


def test_documents_that_differ_are_no_experts_of_a_task():
    # Every document has its own rate, independent of its task.
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


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=40),
    st.booleans(),
)
def test_correlation_of_counted_pairs_is_that_of_the_pairs(pairs, equal):
    pairs = [(x, x) for x, _ in pairs] if equal else pairs
    table = np.zeros((6, 6), dtype=np.int64)
    for pair in pairs:
        table[pair] += 1
    expected = spearman(*zip(*pairs, strict=True))
    found = spearman_of_table(table)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, abs=1e-7)
        else:
            assert found[name] == value


def with_losses(rows, losses) -> Counts:
    counts = Counts(["a", "b"], [0, 2], 4, ["x", "y", "unknown"], np.array([0, 1, 0]), 100)
    counts.add(replace(piece(rows), loss=np.array(losses)))
    return counts


def test_losses_of_tokens_are_counted_by_task_layer_and_experts():
    tables = with_losses(ROWS, [np.nan, 1.01, np.nan, 1.01, 1e9, -1e-7]).loss_tables()
    found = {key: np.argwhere(table).tolist() for key, table in tables.items()}
    assert found == {
        ("a", 0): [[50, 1]],
        ("a", 2): [[50, 3]],
        ("b", 0): [[1023, 1]],
        ("b", 2): [[0, 2]],
    }
    assert counted(ROWS).loss_tables() == {}
    with pytest.raises(DataError, match="found a loss of -2 nats"):
        with_losses(ROWS, [-2.0] * 6)


def test_experts_go_with_the_loss_of_tokens_in_one_layer_only():
    rng = np.random.default_rng(0)
    rows, losses = [], []
    for _ in range(400):
        loss = rng.exponential(3.0)
        hard, drawn = (4 if loss > 2 else 1), int(rng.integers(1, 5))
        for layer, count in ((0, hard), (2, drawn)):
            rows.append((0, 0, layer, 0, tuple(range(count))))
            losses.append(loss)
    counts = with_losses(rows, losses)
    documents = pd.DataFrame({"task": ["a"], "mean_experts": 2.0, "loss": np.nan, "loss_unit": ""})
    table = complexity(documents, counts.token_table(), counts.loss_tables())
    some = table[table["against"] == "loss of the token"].set_index("layer")
    assert some["n"].tolist() == [400, 400]
    assert some["spearman"][0] > 0.8
    assert some["low"][2] < 0 < some["high"][2]


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
            "loss_unit": ["nats per token"] * 12 + [None] * 12,
        }
    )
    tokens = pd.DataFrame({"occurrences": [*range(5, 25), 1], "mean_experts": [*range(20), 99]})
    table = complexity(documents, tokens.assign(mean_experts=-tokens["mean_experts"]), {})
    unknown = table[table["against"] == "loss of the token"]
    assert unknown["task"].tolist() == ["a", "b"]
    assert unknown["reason"].str.startswith("no run logged the loss of tokens").all()
    table = table.drop(unknown.index).reset_index()
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
    found = cluster(usage, pd.Series(truth), seed=3)
    assert adjusted_rand_score(truth, found.labels) == 1
    assert max(found.silhouettes, key=found.silhouettes.get) == 3
    assert found.agreement == pytest.approx(1)
    assert found.remark == "reasonable structure"
    assert np.bincount(found.labels).tolist() == [30, 20, 10]  # the largest is the first
    assert (cluster(usage, pd.Series(truth), seed=3).labels == found.labels).all()


def test_noise_has_no_structure():
    usage = np.random.default_rng(0).random((200, 64)).astype(np.float32)
    found = cluster(usage, pd.Series(np.arange(200) % 2), seed=0)
    assert found.remark == "no substantial structure"
    assert abs(found.agreement) < 0.05


@pytest.mark.parametrize("usage", [np.ones((9, 4)), np.ones((50, 4))], ids=["few", "alike"])
def test_what_cannot_be_clustered(usage):
    assert cluster(usage.astype(np.float32), pd.Series(["a"] * len(usage))) is None


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
