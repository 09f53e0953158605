"""The exact counters equal a slow reference at every batch size, cache and number of processes."""

from __future__ import annotations

import json
import textwrap

import pyarrow.parquet as pq
import pytest
from routing_runs import ARGS, LIMIT, counters, instances

from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.schema import read_manifest


@pytest.mark.parametrize(
    ("batch_size", "logits_cache"), [(1, False), (3, True), (8, False), ("auto", True)]
)
def test_counters_equal_the_slow_reference(run, expected, batch_size, logits_cache):
    results = run(f"logits_cache={logits_cache}", batch_size=batch_size)
    assert set(expected) == {
        "bh_demo_wikitext",
        "bh_demo_lambada",
        "bh_demo_hellaswag",
        "demo_generation",
    }
    assert counters(results) == expected


def test_two_processes_give_the_counters_of_one(run, launch, expected, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import accelerate, json, sys, lm_eval
            from lm_eval.tasks import TaskManager
            from lm_eval_bh.resources import shipped
            manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
            results = lm_eval.simple_evaluate(
                model="hf-bh",
                model_args={ARGS!r} + ",log_routing=full,log_dir=" + sys.argv[1],
                tasks=["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag"],
                task_manager=manager, limit={LIMIT}, batch_size=2, bootstrap_iters=0, device="cpu")
            if results is not None:
                with open(sys.argv[2], "w") as file:
                    json.dump(results["config"]["bh"], file)
            # gloo's threads abort a process that ends with them
            accelerate.PartialState().destroy_process_group()
            """
        )
    )
    launch(script, tmp_path, tmp_path / "bh.json")
    bh = json.loads((tmp_path / "bh.json").read_text())
    found = counters({"config": {"bh": bh}})
    assert found == {task: expected[task] for task in found}
    assert len(found) == 3
    manifest = read_manifest(tmp_path / bh["run_id"])
    assert {name.split("-")[1] for name in manifest["files"] if name.startswith("tokens")} == {
        "0",
        "1",
    }
    table = pq.read_table(tmp_path / bh["run_id"] / "tokens")
    assert table.num_rows == manifest["token_rows"] == 4 * bh["summary"]["tokens"]


def test_a_shared_row_counts_for_every_owner_and_is_computed_once(run):
    shared, alone = (
        run(f"logits_cache={cache}", batch_size=4)["config"]["bh"]["summary"]
        for cache in (True, False)
    )
    assert shared["tokens"] == alone["tokens"]
    assert alone["computed_tokens"] == alone["tokens"]
    assert shared["computed_tokens"] <= shared["tokens"]


@pytest.mark.parametrize("logits_cache", [True, False])
def test_equal_rows_count_once_for_each_request(logits_cache):
    """Two one-token continuations of one context: one row if shared, else two equal ones."""
    lm = BHLM.create_from_arg_string(f"{ARGS},logits_cache={logits_cache}", {"device": "cpu"})
    lm.loglikelihood(instances("loglikelihood", ("The river", " a"), ("The river", " the")))
    summary = lm.log.summary()
    length = len(lm.tok_encode("The river"))
    assert summary["tokens"] == 2 * length
    assert summary["computed_tokens"] == (length if logits_cache else 2 * length)


def test_no_expert_works_for_padding_or_for_slots_that_stay_unused(run):
    """The experts compute exactly the selections for real tokens."""
    scoring = ["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag"]
    long = ARGS.replace("max_length=48", "max_length=512")
    results = run("logits_cache=False", batch_size=4, tasks=scoring, model_args=long)
    summary = results["config"]["bh"]["summary"]
    assert summary["padding_tokens"] > 0
    selected = sum(sum(layer["usage"]) for layer in summary["layers"])
    assert summary["expert_rows_computed"] == selected


def test_off_logs_nothing_and_changes_no_result(run):
    off, summary = run("log_routing=off", batch_size=4), run(batch_size=4)
    assert off["config"]["bh"]["summary"] is None
    assert off["results"] == summary["results"]


def test_results_do_not_depend_on_the_level_of_logging(run, tmp_path):
    results = [
        run(level, batch_size=4)["results"]
        for level in ("", f"log_routing=full,log_dir={tmp_path}")
    ]
    assert results[0] == results[1]
