"""The files of a routing log; a failing run leaves none that seems complete."""

from __future__ import annotations

import resource
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest
from routing_runs import ARGS, instances

from lm_eval_bh import DataError
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.schema import experiment_name, read_internal_routing, read_manifest


def place_and_loss(row):
    return (*row[:-1], -1.0 if row[-1] is None else row[-1])


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
    names = ("task", "doc_id", "request", "position")
    losses = [(*(r[name] for name in names), r["loss"]) for r in table if r["layer"] == 0]
    known = sorted(reference.losses, key=place_and_loss)
    for row, expected in zip(sorted(losses, key=place_and_loss), known, strict=True):
        assert row[:-1] == expected[:-1]
        assert row[-1] == (expected[-1] and pytest.approx(expected[-1], rel=1e-4, abs=1e-5))
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


def test_two_runs_in_one_folder_at_once_do_not_mix(commands, tmp_path):
    command = [commands / "python", "-c", SCRIPT, str(tmp_path), "limit = 2"]
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


def test_a_killed_run_leaves_nothing_that_reads_as_complete(commands, tmp_path):
    process = subprocess.Popen(
        [commands / "python", "-c", SCRIPT, str(tmp_path), ""],
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


def test_a_full_disk_ends_the_run_with_one_sentence_and_earlier_files_stay(run, commands, tmp_path):
    first = run(f"log_routing=full,log_dir={tmp_path}", limit=1)["config"]["bh"]["run_id"]
    before = {path: path.read_bytes() for path in (tmp_path / first).rglob("*") if path.is_file()}
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    full += f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))"
    ended = subprocess.run(
        [commands / "python", "-c", SCRIPT, str(tmp_path), full],
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
