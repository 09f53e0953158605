"""Every evaluation has its own logs, whatever happened to the previous one."""

from __future__ import annotations

import functools
import json
import textwrap

import lm_eval
import lm_eval.evaluator
import pyarrow.parquet as pq
import pytest
from lm_eval.tasks import TaskManager
from routing_runs import ARGS, LIMIT, counters, instances

from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.resources import shipped
from lm_eval_bh.schema import MANIFEST, read_internal_routing, read_manifest


def model(folder):
    arguments = f"{ARGS},log_routing=full,log_dir={folder},log_samples=2"
    return BHLM.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 2})


def evaluate(lm, tasks, limit=2, **options):
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    return lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, **options
    )


def logged(results, folder):
    """Return everything that one evaluation has logged, except times."""
    bh = results["config"]["bh"]
    run = folder / bh["run_id"]
    manifest = read_manifest(run)
    samples = {
        name: read_internal_routing(run / name) | {"run_id": None}
        for name in manifest["files"]
        if not name.startswith("tokens")
    }
    tokens = pq.read_table(run / "tokens").to_pydict()
    summary = bh["summary"]
    sizes = {
        name: summary[name]
        for name in ("tokens", "computed_tokens", "padding_tokens", "expert_rows_computed")
    }
    return counters(results), sizes, samples, tokens, results["results"]


def interrupt(monkeypatch, owner, name, calls):
    """Interrupt the given call of a function, counted from 1, like Ctrl-C."""
    real, left = getattr(owner, name), [calls]

    @functools.wraps(real)  # generate() looks at the signature of what it calls
    def stop(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, name, stop)


MOMENTS = {
    "in the first pass": lambda lm: (lm.model, "forward", 1),
    "in log-likelihoods": lambda lm: (lm.model, "forward", 3),
    "while losses are noted": lambda lm: (lm.log, "add_losses", 1),
    "while the log is written": lambda lm: (lm.log, "flush", 1),
    "between two kinds of requests": lambda lm: (lm, "loglikelihood_rolling", 1),
    "in rolling log-likelihoods": lambda lm: (lm, "_loglikelihood_tokens", 4),
    "before the first prompt": lambda lm: (lm.model, "generate", 1),
    "while decoding": lambda lm: (lm.model, "prepare_inputs_for_generation", 2),
    "after generation": lambda lm: (lm, "tok_decode", 2),
    "after the last request": lambda lm: (lm_eval.evaluator, "_process_results", 1),
}


@pytest.fixture(scope="module")
def fresh(tasks, tmp_path_factory):
    """Return what an evaluation of two tasks logs with a fresh model."""
    folder = tmp_path_factory.mktemp("fresh")
    return logged(evaluate(model(folder), tasks[:2]), folder)


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_was_interrupted_leaves_no_trace_in_the_next(moment, tasks, fresh, tmp_path):
    wikitext, lambada, hellaswag, generation = tasks
    lm = model(tmp_path)
    begin = lm.begin_evaluation
    with pytest.MonkeyPatch.context() as monkeypatch:
        # The log that is to be interrupted is there once the evaluation has begun.
        monkeypatch.setattr(
            lm, "begin_evaluation", lambda: begin() or interrupt(monkeypatch, *MOMENTS[moment](lm))
        )
        with pytest.raises(KeyboardInterrupt):
            evaluate(lm, [lambada, hellaswag, wikitext, generation])
    interrupted = lm.log.run_id
    results = evaluate(lm, [wikitext, lambada])
    assert results["config"]["bh"]["run_id"] != interrupted
    assert logged(results, tmp_path) == fresh
    assert [file.parent.name for file in tmp_path.glob(f"*/{MANIFEST}")] == [lm.log.run_id]


def test_an_error_ends_the_log_of_requests_by_hand(tmp_path):
    lm = model(tmp_path)
    requests = instances("loglikelihood", ("The river", " flows"), ("The storm", " came"))
    lm.loglikelihood(requests)
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, lm.model, "forward", 1)
        with pytest.raises(KeyboardInterrupt):
            lm.loglikelihood(requests)
    lm.loglikelihood(requests)
    once = lm.log.summary()["tokens"]
    lm.loglikelihood(requests)  # goes on with the log
    assert lm.log.summary()["tokens"] == 2 * once > 0


def test_asking_twice_changes_nothing_and_another_evaluation_has_logs_of_its_own(tmp_path):
    lm = BHLM.create_from_arg_string(
        f"{ARGS},log_routing=samples,log_dir={tmp_path}", {"device": "cpu"}
    )
    requests = instances("loglikelihood", ("The river", " flows"))
    lm.loglikelihood(requests)
    first, again = (lm.get_model_info()["bh"] for _ in range(2))
    assert again == first
    lm.loglikelihood(requests)
    second = lm.get_model_info()["bh"]
    assert second["run_id"] != first["run_id"]
    assert second["summary"]["tokens"] == first["summary"]["tokens"] > 0
    for run_id in (first["run_id"], second["run_id"]):
        (log,) = (tmp_path / run_id).glob("*_internal_routing.json")
        assert len(read_internal_routing(log)["samples"]) == 1


def test_answers_of_a_cache_are_counted_for_the_evaluation_that_asked(tasks, tmp_path):
    lm = BHLM.create_from_arg_string(ARGS, {"device": "cpu", "batch_size": 2})
    cache = {"use_cache": str(tmp_path / "cache")}
    summaries = [
        evaluate(lm, tasks[1:2], **options)["config"]["bh"]["summary"]
        for options in (cache, cache, {})
    ]
    assert [summary["cached_requests"] for summary in summaries] == [0, 2, 0]
    tokens = [summary["tokens"] for summary in summaries]
    assert tokens == [tokens[0], 0, tokens[0]]


def test_on_two_processes_every_evaluation_has_logs_of_its_own_too(launch, expected, tmp_path):
    """One is interrupted on both processes, then two more run to their end."""
    script = tmp_path / "evaluate.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, sys, lm_eval
            from lm_eval.tasks import TaskManager
            from lm_eval_bh.harness.model import BHLM
            from lm_eval_bh.resources import shipped
            manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
            lm = BHLM.create_from_arg_string(
                {ARGS!r} + ",log_routing=full,log_dir=" + sys.argv[1],
                {{"device": "cpu", "batch_size": 2}})
            def evaluate(*tasks):
                results = lm_eval.simple_evaluate(
                    lm, tasks=list(tasks), task_manager=manager, limit={LIMIT}, bootstrap_iters=0)
                return results and results["config"]["bh"]
            real, calls = lm._model_call, []
            def stop(*args, **options):  # both have as many windows to score
                calls.append(None)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return real(*args, **options)
            lm._model_call = stop
            try:
                evaluate("bh_demo_wikitext", "bh_demo_hellaswag")
            except KeyboardInterrupt:
                interrupted = lm.log.run_id
            lm._model_call = real
            found = [evaluate("bh_demo_lambada"), evaluate("bh_demo_wikitext", "bh_demo_lambada")]
            if found[0] is not None:
                with open(sys.argv[2], "w") as file:
                    json.dump([interrupted, *found], file)
            lm.accelerator.end_training()  # gloo's threads abort a process that ends with them
            """
        )
    )
    logs = tmp_path / "logs"
    launch(script, logs, tmp_path / "bh.json")
    interrupted, *runs = json.loads((tmp_path / "bh.json").read_text())
    assert not (logs / interrupted / MANIFEST).exists()
    assert len({interrupted, *(bh["run_id"] for bh in runs)}) == 3
    tasks = [["bh_demo_lambada"], ["bh_demo_wikitext", "bh_demo_lambada"]]
    for bh, names in zip(runs, tasks, strict=True):
        assert counters({"config": {"bh": bh}}) == {name: expected[name] for name in names}
        manifest = read_manifest(logs / bh["run_id"])
        parts = [name for name in manifest["files"] if name.startswith("tokens")]
        assert {name.split("-")[1] for name in parts} == {"0", "1"}
        table = pq.read_table(logs / bh["run_id"] / "tokens")
        assert table.num_rows == manifest["token_rows"] == 4 * bh["summary"]["tokens"]
