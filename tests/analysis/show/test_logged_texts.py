"""The page of finished runs: logs compared with running the model again."""

from __future__ import annotations

import json
import shutil

import lm_eval
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lm_eval_bh import BHRoutingIntegration, DataError, ParameterError
from lm_eval_bh.analysis.patterns.findings import find_patterns
from lm_eval_bh.analysis.show.logged_texts import read_logged
from lm_eval_bh.analysis.show.view_page import view_page
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.cli.app import app
from lm_eval_bh.cli.model_files import find_tokenizer
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.viewing.routed_text import route_texts

TASKS = ["bh_demo_wikitext", "bh_demo_lambada"]


def evaluated(folder, arguments, tasks):
    tracker = EvaluationTracker(output_path=str(folder))
    results = lm_eval.simple_evaluate(
        model="hf-bh",
        model_args=f"pretrained=tiny-olmoe,{arguments},log_routing=full,log_dir={folder / 'logs'}",
        tasks=tasks,
        task_manager=TaskManager(include_path=str(shipped("tasks")), include_defaults=False),
        limit=3,
        batch_size=2,
        bootstrap_iters=0,
        device="cpu",
        evaluation_tracker=tracker,
    )
    tracker.save_results_aggregated(results, results.pop("samples"))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return (
        evaluated(root / "bh", "alpha=0.4,max_k=8,layers=1-3", TASKS),
        evaluated(root / "top", "rule=topk,max_k=4,layers=1-3,decode_batch=2", TASKS),
    )


def read(*folders, task=None, documents=2, most=100, tokenizer=None, find=find_tokenizer):
    return read_logged(folders, task, documents, most, tokenizer, find)


@pytest.mark.slow
def test_a_run_shows_what_the_model_does(runs):
    texts, (run,) = read(runs[0], task="bh_demo_wikitext")
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    assert run["label"].startswith("BH a=0.40")
    assert [text["title"] for text in texts] == ["document 0", "document 1"]
    routing = BHRoutingIntegration(model, alpha=0.4, max_k=8, layers="1-3")
    for text, found in zip(texts, run["texts"], strict=True):
        assert len(text["ids"]) == 100
        assert "".join(text["tokens"]) == tokenizer.decode(text["ids"])
        with routing:
            [expected] = route_texts(routing, [text["ids"]])
        assert found["loss"][0] is None
        assert found["loss"][1:] == pytest.approx(expected["loss"][1:], rel=2e-3, abs=1e-4)
        for layer, again in zip(found["layers"], expected["layers"], strict=True):
            assert layer["layer"] == again["layer"]
            assert layer["counts"] == again["counts"]
            for rows, others, count in zip(
                layer["rows"], again["rows"], layer["counts"], strict=True
            ):
                assert [row[0] for row in rows] == [row[0] for row in others[:count]]
                weights = [row[1] for row in others[:count]]
                assert [row[1] for row in rows] == pytest.approx(weights, rel=2e-3)


@pytest.mark.slow
def test_two_runs_stand_side_by_side(runs, tmp_path):
    output = tmp_path / "view.html"
    done = CliRunner().invoke(
        app, ["view", *map(str, runs), "--limit", "1", "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    page = output.read_text(encoding="utf-8")
    assert "top-4" in page
    (file,) = runs[1].glob("**/results_*.json")
    tasks = json.loads(file.read_text(encoding="utf-8"))["config"]["bh"]["summary"]["tasks"]
    distinct = tasks["bh_demo_lambada"]["distinct_experts"]
    assert f", {distinct:.1f} distinct experts per layer and step of 2 rows</span>" in page
    assert page.count("distinct experts") == 2  # there and in the data: the other has no steps
    assert page == view_page("Routing of tiny-olmoe", *read(*runs, documents=1, most=256))


@pytest.mark.slow
def test_the_losses_of_tokens_go_into_the_patterns(runs):
    (found,) = find_patterns(load_experiments([runs[0]]))
    table = found.tables["complexity"].query("against == 'loss of the token'")
    assert table["layer"].tolist() == [1, 2, 3] * 2
    (folder,) = (runs[0] / "logs").glob("*/tokens")
    rows = pq.read_table(folder).to_pandas()
    logged = rows[(rows["task"] == "bh_demo_lambada") & (rows["layer"] == 2)].dropna(subset="loss")
    of_layer = table[(table["task"] == "bh_demo_lambada") & (table["layer"] == 2)].iloc[0]
    assert of_layer["n"] == len(logged)
    exact = logged[["loss", "count"]].corr("spearman").iloc[0, 1]
    assert of_layer["spearman"] == pytest.approx(exact, abs=0.01)  # losses are binned


@pytest.mark.slow
def test_a_log_without_losses_is_read(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "old")
    for file in (tmp_path / "old" / "logs").glob("*/tokens/*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(["loss"]), file)
    for results in (tmp_path / "old").rglob("results_*.json"):
        content = json.loads(results.read_text())
        content["config"]["bh"]["log_dir"] = str(tmp_path / "old" / "logs")
        results.write_text(json.dumps(content))
    texts, (run,) = read(tmp_path / "old")
    _, (whole,) = read(runs[0])
    assert run["texts"][0]["layers"] == whole["texts"][0]["layers"]
    assert set(run["texts"][0]["loss"]) == {None}
    assert view_page("old", texts, [run])
    (found,) = find_patterns(load_experiments([tmp_path / "old"]))
    reasons = found.tables["complexity"].query("against == 'loss of the token'")["reason"]
    assert reasons.str.startswith("no run logged the loss of tokens").all()


@pytest.mark.slow
def test_without_a_tokenizer_tokens_are_numbers(runs):
    texts, _ = read(runs[0], find=lambda results: None)
    assert texts[0]["tokens"] == [f" {number}" for number in texts[0]["ids"]]


@pytest.mark.slow
def test_what_cannot_be_shown_is_one_sentence(runs, tmp_path):
    for folders, options, part in (
        ((runs[0],), {"task": "wikitext"}, "no task wikitext: use bh_demo_lambada, bh_demo_wik"),
        ((runs[0].parent,), {}, "has 2 runs: give the folder of the one"),
        ((*runs, runs[0]), {}, "At most two runs"),
        ((runs[0],), {"tokenizer": tmp_path / "none.json"}, "could not be read"),
    ):
        with pytest.raises((DataError, ParameterError), match=part):
            read(*folders, **options)
    other = evaluated(tmp_path / "other", "alpha=0.4,layers=1-3", ["bh_demo_hellaswag"])
    with pytest.raises(ParameterError, match="no task: give runs that have one in common"):
        read(runs[0], other)
    (file,) = (other / "logs").glob("*/tokens/*.parquet")
    file.write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises(DataError, match="could not be read"):
        read(other)
