"""Logs identify their documents by lm-eval's own hash, however they were chosen."""

from __future__ import annotations

import pytest
from lm_eval.loggers import EvaluationTracker

from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.errors import DataError
from lm_eval_bh.harness.logs.evaluated_documents import EvaluatedDocuments

TASK = "bh_demo_lambada"


@pytest.fixture
def saved(evaluate, tmp_path):
    """Return a function that evaluates documents of a task, and saves what the command saves."""

    def run(name, documents, alpha=0.4, log_samples=True):
        tracker = EvaluationTracker(output_path=str(tmp_path / name))
        logs = tmp_path / name / "logs"
        results = evaluate(
            "hf-bh",
            f"pretrained=tiny-olmoe,alpha={alpha},log_routing=samples,log_dir={logs}",
            [TASK],
            samples={TASK: documents},
            log_samples=log_samples,
            evaluation_tracker=tracker,
        )
        samples = results.pop("samples", {})
        tracker.save_results_aggregated(results, samples)
        for task, some in samples.items():
            tracker.save_results_samples(task, some)
        return results["config"]["bh"]["documents"][TASK], samples.get(TASK)

    return run


def test_chosen_documents_are_those_of_the_harness(saved, tmp_path):
    digest, samples = saved("one", [3, 5, 8])
    loaded = load_experiments([tmp_path])
    (row,) = loaded.frame.to_dict("records")
    log = loaded.internal_routing(row["run_id"], TASK)
    assert [sample["sample_id"] for sample in log["samples"]] == [0, 1, 2]
    assert [s["doc_hash"] for s in log["samples"]] == [s["doc_hash"] for s in samples]
    documents = loaded.documents(row["run_id"], TASK)
    assert list(documents.index) == [3, 5, 8]
    # A document's loglikelihood is its loss times its tokens: they were joined by the right ids.
    losses = [sample["loss"] for sample in log["samples"]]
    assert (documents["tokens"] * losses).tolist() == pytest.approx(
        (-documents["loglikelihood"]).tolist()
    )
    assert row["perplexity"] > 1
    again, _ = saved("again", [3, 5, 8], alpha=0.5)
    assert again == digest


def test_runs_on_other_documents_are_not_compared(saved, tmp_path):
    """Neither has samples, and both have as many documents: only the digest tells them apart."""
    saved("one", [0, 1, 2], log_samples=False)
    saved("other", [5, 6, 7], alpha=0.5, log_samples=False)
    with pytest.raises(DataError, match=f"documents of {TASK}"):
        load_experiments([tmp_path])


class Request:
    def __init__(self, doc_id, doc, task_name="task"):
        self.doc_id, self.doc, self.task_name = doc_id, doc, task_name


def noted(*documents):
    found = EvaluatedDocuments()
    found.add(Request(place, document) for place, document in documents)
    return found


def test_the_digest_is_of_the_documents_and_not_of_their_order():
    one = noted((0, {"a": 1}), (1, {"a": 2}))
    assert one.digests() == noted((1, {"a": 2}), (1, {"a": 2}), (0, {"a": 1})).digests()
    assert one.digests() != noted((0, {"a": 1})).digests()
    assert one.digests() != noted((0, {"a": 1}), (1, {"a": 3})).digests()
    halves = [noted((0, {"a": 1})), noted((1, {"a": 2}))]
    together = EvaluatedDocuments()
    together.collect([{"documents": half.hashes, "cached_requests": 0} for half in halves])
    assert together.digests() == one.digests()


def test_what_a_cache_has_answered_is_unknown():
    one = noted((0, {"a": 1}))
    assert one.digests(cached_requests=1) == {}
    one.collect([{"documents": {}, "cached_requests": 3}])
    assert one.digests() == {}
