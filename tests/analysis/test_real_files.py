"""On files that lm-eval and hf-bh wrote: our numbers are theirs."""

from __future__ import annotations

import math

import pytest

from lm_eval_bh.analysis.compare.paired import compare
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.schema import read_internal_routing

pytestmark = pytest.mark.slow

WIKITEXT = "bh_demo_wikitext"


@pytest.fixture(scope="module")
def loaded(real_runs):
    return load_experiments([real_runs])


def test_three_runs_of_three_tasks(loaded):
    assert loaded.problems == loaded.notes == []
    assert len(loaded.frame) == 9
    assert loaded.frame["strategy"].tolist() == ["top-8 (hf)", *["BH a=0.40, max 8"] * 2] * 3
    assert set(loaded.frame["model"]) == {"tiny-olmoe"}
    assert len(loaded.layers) == 2 * 3 * 4


def test_documents_add_up_to_the_harness_metrics(loaded):
    for _, row in loaded.frame.iterrows():
        documents = loaded.documents(row["run_id"], row["task"])
        assert len(documents) == row["documents"] == 4
        for name, unit in (
            ("word_perplexity", "words"),
            ("byte_perplexity", "bytes"),
            ("target_perplexity", "targets"),
        ):
            if unit in documents:
                loss = -documents["loglikelihood"].sum() / documents[unit].sum()
                assert row[name] == pytest.approx(math.exp(loss))
        if "acc" in documents:
            assert row["acc"] == documents["acc"].mean()


def test_every_token_of_a_short_document_is_scored_once(loaded):
    row = loaded.frame[loaded.frame["task"] == WIKITEXT].iloc[1]
    documents = loaded.documents(row["run_id"], WIKITEXT)
    assert documents["tokens"].sum() == row["tokens"]  # they fit into one window each
    assert row["perplexity"] == pytest.approx(
        math.exp(-documents["loglikelihood"].sum() / row["tokens"])
    )
    assert loaded.frame["perplexity"].notna().sum() == 6  # also of the stock model


def test_internal_routing_agrees_with_the_summary(loaded):
    row = loaded.frame[loaded.frame["task"] == WIKITEXT].iloc[1]
    log = read_internal_routing(loaded.internal_routing_file(row["run_id"], WIKITEXT))
    counts = [
        count
        for sample in log["samples"]
        for layer in sample["layers"]
        for count in layer["expert_counts"]
    ]
    assert row["avg_experts"] == pytest.approx(sum(counts) / len(counts))
    assert row["ceiling_hit_rate"] == pytest.approx(100 * counts.count(8) / len(counts))


def test_the_same_routing_twice_is_the_same(loaded):
    repeated = loaded.frame[loaded.frame["adaptive"]]
    assert repeated["configuration"].nunique() == 1
    assert repeated["output_determinism"].tolist() == [100.0] * 6
    assert repeated["expert_overlap_score"].tolist() == [1.0] * 6


def test_bh_is_compared_with_the_stock_model(loaded):
    table = compare(loaded, resamples=500)
    assert table["reason"].isna().all()
    assert set(table["baseline"]) == {"top-8 (hf)"}
    assert sorted(zip(table["task"], table["metric"], strict=True)) == [
        ("bh_demo_hellaswag", "acc_norm"),
        ("bh_demo_lambada", "acc"),
        ("bh_demo_lambada", "perplexity"),
        (WIKITEXT, "perplexity"),
    ]
