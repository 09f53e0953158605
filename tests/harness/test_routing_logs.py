"""Routing logs: equal to a slow reference at every batch size, cache and number of processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import lm_eval
import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from reference import Reference

from lm_eval_bh import DataError, NullModel, ParameterError
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.schema import experiment_name, read_internal_routing, read_manifest

# Windows of 48 tokens cut documents into pieces and contexts on the left; in float64 no rounding
# that depends on the shape of a batch can tip a decision.
ARGS = "pretrained=tiny-olmoe,alpha=0.5,max_k=6,dtype=float64,experts=ragged,max_length=48"
LIMIT = 3
GENERATION = {
    "task": "demo_generation",
    "custom_dataset": None,
    "output_type": "generate_until",
    "doc_to_text": "{{text[:120]}}",
    "doc_to_target": "{{text[120:]}}",
    "generation_kwargs": {"until": [",", "the"], "max_gen_toks": 10, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
    "test_split": "test",
}


@pytest.fixture(scope="module")
def tasks():
    """Three ways of scoring, and generation, on the demo texts."""
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    lambada = manager.load(["bh_demo_lambada"])["tasks"]["bh_demo_lambada"]
    generation = GENERATION | {"custom_dataset": lambada.config.custom_dataset}
    generation["dataset_kwargs"] = lambada.config.dataset_kwargs
    return ["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag", generation]


@pytest.fixture(scope="module")
def run(tasks):
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)

    def evaluate(
        arguments="", *, model_args=ARGS, tasks=tasks, batch_size=1, limit=LIMIT, **options
    ):
        return lm_eval.simple_evaluate(
            model="hf-bh",
            model_args=f"{model_args},{arguments}" if arguments else model_args,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            bootstrap_iters=0,
            device="cpu",
            **options,
        )

    return evaluate


def counters(results):
    """Return the exact counters of every task."""
    return {
        task: {
            name: [layer[name] for layer in summary["layers"]]
            for name in ("histogram", "usage", "cross")
        }
        for task, summary in results["config"]["bh"]["summary"]["tasks"].items()
    }


@pytest.fixture(scope="module")
def reference(tasks):
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    lm = HFLM(
        str(tiny_olmoe()),
        dtype="float64",
        experts_implementation="eager",
        max_length=48,
        device="cpu",
    )
    slow = Reference(lm, NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors"), 0.5, 6)
    for task in manager.load(tasks)["tasks"].values():
        task.build_all_requests(limit=LIMIT, rank=0, world_size=1)
        slow.run(task.instances)
    return slow


@pytest.fixture(scope="module")
def expected(reference):
    return {
        task: {
            "histogram": reference.histogram[task],
            "usage": reference.usage[task],
            "cross": reference.cross[task],
        }
        for task in reference.histogram
    }


@pytest.mark.parametrize("batch_size", [1, 3, 8, "auto"])
@pytest.mark.parametrize("logits_cache", [True, False])
def test_counters_equal_the_slow_reference(run, expected, batch_size, logits_cache):
    results = run(f"logits_cache={logits_cache}", batch_size=batch_size)
    assert set(expected) == {
        "bh_demo_wikitext",
        "bh_demo_lambada",
        "bh_demo_hellaswag",
        "demo_generation",
    }
    assert counters(results) == expected


def test_two_processes_give_the_counters_of_one(run, expected, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, sys, lm_eval
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
            """
        )
    )
    launch = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *launch,
            script,
            tmp_path,
            tmp_path / "bh.json",
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
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


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_token_log_is_the_slow_reference_row_by_row(run, reference, tmp_path, batch_size):
    results = run(f"log_routing=full,log_dir={tmp_path},log_logits=True", batch_size=batch_size)
    folder = tmp_path / results["config"]["bh"]["run_id"]
    table = pq.read_table(folder / "tokens").to_pylist()
    assert len(table) == read_manifest(folder)["token_rows"]
    found = [
        (
            r["task"],
            r["doc_id"],
            r["request"],
            r["layer"],
            r["position"],
            r["token_id"],
            r["count"],
            tuple(r["experts"]),
        )
        for r in table
    ]
    assert sorted(found) == sorted(reference.rows)
    for row in table:
        assert len(row["weights"]) == row["count"]
        assert sum(row["weights"]) <= 1 + 1e-5
        top = sorted(range(64), key=lambda expert: -row["logits"][expert])[: row["count"]]
        assert min(row["logits"][e] for e in row["experts"]) >= row["logits"][top[-1]] - 1e-2


def test_the_samples_log_holds_the_first_documents_and_their_loss(run, tmp_path):
    results = run(
        f"log_routing=samples,log_dir={tmp_path},log_samples=2", batch_size=4, log_samples=True
    )
    bh = results["config"]["bh"]
    folder = tmp_path / bh["run_id"]
    names = {
        experiment_name("bh", 6, 0.5, task) + "_internal_routing.json"
        for task in results["results"]
    }
    assert names == set(read_manifest(folder)["files"])
    for task in results["results"]:
        log = read_internal_routing(
            folder / f"{experiment_name('bh', 6, 0.5, task)}_internal_routing.json"
        )
        assert {sample["sample_id"] for sample in log["samples"]} == {0, 1}
        assert len(log["samples"]) == (8 if task == "bh_demo_hellaswag" else 2)
        assert log["aggregate_stats"]["total_tokens"] == bh["summary"]["tasks"][task]["tokens"]
        for sample in log["samples"]:
            for layer in sample["layers"]:
                assert layer["router_logits_shape"] == [sample["num_tokens"], 64]
                assert (
                    len(layer["selected_experts"])
                    == sample["num_tokens"]
                    == len(sample["token_ids"])
                )
                for chosen, count in zip(
                    layer["selected_experts"], layer["expert_counts"], strict=True
                ):
                    assert len(chosen) == 6
                    assert [expert >= 0 for expert in chosen] == [True] * count + [False] * (
                        6 - count
                    )
                stats = layer["layer_stats"]
                assert stats["floor_hits"] == layer["expert_counts"].count(1)
                assert stats["ceiling_hits"] == layer["expert_counts"].count(6)
    lambada = read_internal_routing(
        folder / f"{experiment_name('bh', 6, 0.5, 'bh_demo_lambada')}_internal_routing.json"
    )
    lm = BHLM.create_from_arg_string(ARGS, {"device": "cpu"})
    for sample, logged in zip(
        lambada["samples"], results["samples"]["bh_demo_lambada"], strict=False
    ):
        _, continuation = lm._encode_pair(*logged["arguments"][0])
        assert sample["loss"] == pytest.approx(-logged["resps"][0][0][0] / len(continuation))


def test_a_shared_row_counts_for_every_owner_and_is_computed_once(run):
    shared, alone = (
        run(f"logits_cache={cache}", batch_size=4)["config"]["bh"]["summary"]
        for cache in (True, False)
    )
    assert shared["tokens"] == alone["tokens"]
    assert alone["computed_tokens"] == alone["tokens"]
    assert shared["computed_tokens"] <= shared["tokens"]


def test_no_expert_works_for_padding_or_for_slots_that_stay_unused(run):
    """What the experts really computed is what was selected for real tokens, and nothing else."""
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


SCRIPT = """
import sys, lm_eval
from lm_eval.tasks import TaskManager
from lm_eval_bh.errors import show_as_one_sentence
from lm_eval_bh.resources import shipped
show_as_one_sentence()
limit = None
exec(sys.argv[2])
lm_eval.simple_evaluate(
    model="hf-bh",
    model_args="pretrained=tiny-olmoe,alpha=0.4,log_routing=full,log_dir=" + sys.argv[1],
    tasks=["bh_demo_wikitext", "bh_demo_hellaswag"], batch_size=1, bootstrap_iters=0, device="cpu",
    limit=limit,
    task_manager=TaskManager(include_path=str(shipped("tasks")), include_defaults=False))
"""


def test_two_runs_in_one_folder_at_once_do_not_mix(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "limit = 2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(command, **quiet) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2
    logs = []
    for folder in folders:
        manifest = read_manifest(folder)
        assert manifest["run_id"] == folder.name
        table = pq.read_table(folder / "tokens")
        assert table.num_rows == manifest["token_rows"]
        logs.append(table)
    assert logs[0].equals(logs[1])


def test_a_killed_run_leaves_nothing_that_reads_as_complete(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), ""],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/tokens/*part*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("*/tokens/*part*"))
    (folder,) = tmp_path.iterdir()
    with pytest.raises(DataError, match="did not finish"):
        read_manifest(folder)


def test_a_full_disk_ends_the_run_with_one_sentence_and_earlier_files_stay(run, tmp_path):
    first = run(f"log_routing=full,log_dir={tmp_path}", limit=1)["config"]["bh"]["run_id"]
    before = {path: path.read_bytes() for path in (tmp_path / first).rglob("*") if path.is_file()}
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    full += f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))"
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), full],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("lm-eval-bh: error: The routing log in")
    assert "free some space" in last
    assert {path: path.read_bytes() for path in before} == before
    assert len([folder for folder in tmp_path.iterdir() if (folder / "routing.json").exists()]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("log_routing=all", "log_routing='all' is unknown"),
        ("log_routing=samples,log_dir=x,log_samples=-1", "log_samples=-1 is negative"),
        ("log_routing=samples,log_dir=x,log_samples=2.5", "give an integer"),
        ("log_logits=True", "log_logits=True needs log_routing=full"),
        ("log_logits=True,log_routing=samples,log_dir=x", "needs log_routing=full"),
        ("log_routing=samples", "needs a folder to write to: give log_dir"),
        ("log_routing=full", "needs a folder to write to: give log_dir"),
        ("log_dir=somewhere", "has no use with log_routing=summary"),
        ("log_samples=50", "has no use with log_routing=summary"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_looked_for(arguments, sentence):
    with pytest.raises(ParameterError) as caught:
        BHLM.create_from_arg_string(f"pretrained=no/such-model,{arguments}")
    assert sentence in str(caught.value)


def test_a_folder_that_cannot_be_written_is_said_before_a_model_is_looked_for(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="give a log_dir that can be written to"):
        BHLM.create_from_arg_string(
            f"pretrained=no/such-model,log_routing=full,log_dir={tmp_path / 'file'}"
        )


def test_a_cache_of_another_routing_is_refused_and_cached_requests_are_counted(run, tmp_path):
    cache = str(tmp_path / "cache")
    options = {"model_args": ARGS.replace("alpha=0.5,", ""), "limit": 2, "use_cache": cache}
    first = run("alpha=0.5", **options)
    second = run("alpha=0.5", **options)
    assert first["config"]["bh"]["summary"]["cached_requests"] == 0
    assert second["config"]["bh"]["summary"]["cached_requests"] == 2 + 2 + 8 + 2
    assert second["config"]["bh"]["summary"]["tokens"] == 0
    assert second["results"] == first["results"]
    with pytest.raises(
        ParameterError, match=r"was filled with alpha=0\.5, and this run has alpha=0\.3"
    ):
        run("alpha=0.3", **options)


def test_a_cache_of_another_model_is_refused(tmp_path):
    from lm_eval.api.model import CachingLM

    lm = BHLM.create_from_arg_string("pretrained=tiny-olmoe", {"device": "cpu"})
    path = Path(tmp_path / "cache.db")
    from sqlitedict import SqliteDict

    with SqliteDict(path, autocommit=True) as foreign:
        foreign["some request"] = (-1.0, False)
    with pytest.raises(ParameterError, match="by another model than hf-bh"):
        CachingLM(lm, str(path))


def instances(kind, *arguments, **fields):
    """Make requests by hand: one document each."""
    metadata = {"task": "by_hand", "repeats": 1} | fields
    return [
        Instance(kind, {}, args, 0, metadata=(metadata["task"], number, metadata["repeats"]))
        for number, args in enumerate(arguments)
    ]


@pytest.mark.parametrize("logits_cache", [True, False])
def test_equal_rows_count_once_for_each_request(logits_cache):
    """Two one-token continuations of one context: one row if shared, else two equal ones."""
    lm = BHLM.create_from_arg_string(f"{ARGS},logits_cache={logits_cache}", {"device": "cpu"})
    lm.loglikelihood(instances("loglikelihood", ("The river", " a"), ("The river", " the")))
    summary = lm.log.summary()
    length = len(lm.tok_encode("The river"))
    assert summary["tokens"] == 2 * length
    assert summary["computed_tokens"] == (length if logits_cache else 2 * length)


def test_a_prompt_with_two_sets_of_options_is_credited_to_both():
    lm = BHLM.create_from_arg_string(f"{ARGS},batch_size=2", {"device": "cpu"})
    prompts = ["The river", "In the year of the storm"]
    requests = []
    for task, tokens in (("long", 9), ("short", 4)):
        options = {"until": ["no such text"], "max_gen_toks": tokens, "do_sample": False}
        requests += instances("generate_until", *((p, options) for p in prompts), task=task)
    lm.generate_until(requests)
    fed = sum(len(lm.tok_encode(prompt)) for prompt in prompts)
    tasks = lm.log.summary()["tasks"]
    assert tasks["long"]["tokens"] == fed + 2 * 8
    assert tasks["short"]["tokens"] == fed + 2 * 3


def test_repeats_are_samples_of_their_own(tmp_path):
    lm = BHLM.create_from_arg_string(
        f"{ARGS},log_routing=samples,log_dir={tmp_path}", {"device": "cpu", "batch_size": 2}
    )
    options = {"until": ["no such text"], "max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
    requests = instances("generate_until", ("The river", options), repeats=3)
    answers = lm.generate_until(requests * 4)  # the fourth evens out processes
    lm.get_model_info()
    (log,) = (tmp_path / lm.log.run_id).glob("*_internal_routing.json")
    samples = read_internal_routing(log)["samples"]
    assert [sample["repeat"] for sample in samples] == [0, 1, 2]
    for sample, answer in zip(samples, answers, strict=False):
        text = lm.tokenizer.decode(sample["token_ids"], skip_special_tokens=True)
        assert ("The river" + answer).startswith(text)


def test_an_empty_document_and_beams_work_as_they_do_with_hf():
    lm = BHLM.create_from_arg_string(ARGS, {"device": "cpu"})
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("",), ("A text.",)))[0] == 0
    options = {"until": ["."], "max_gen_toks": 5, "do_sample": False, "num_beams": 2}
    before = lm.log.summary()["tokens"]
    assert len(lm.generate_until(instances("generate_until", ("The river", options)))) == 1
    assert lm.log.summary()["tokens"] == before


def test_asking_twice_changes_nothing_and_another_evaluation_has_logs_of_its_own(run, tmp_path):
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
