"""The files of patterns: from made-up logs, on the command line, and from a real run."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lm_eval_bh.analysis.patterns import write_patterns
from lm_eval_bh.analysis.patterns.findings import find_patterns
from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import read_sample_log, read_token_log
from lm_eval_bh.analysis.patterns.token_classes import vocabulary
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.cli.app import app
from lm_eval_bh.cli.model_files import find_tokenizer
from lm_eval_bh.errors import DataError
from lm_eval_bh.resources import tiny_olmoe


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
    words = ["report", "--patterns", str(write.folder), "--output-dir", str(tmp_path)]
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
    of_tokens, of_samples = (
        Counts(tasks, range(4), 64, ["unknown"], np.array([], dtype=np.int64), 100)
        for _ in range(2)
    )
    for piece in read_token_log(parquet, tasks, tasks):
        of_tokens.add(piece)
    for log in logs:
        place = next(i for i, task in enumerate(tasks) if task.removeprefix("bh_") in log.name)
        for piece in read_sample_log(log, place)[0]:
            of_samples.add(piece)
    assert of_tokens.tokens.sum() > 1000
    assert np.array_equal(of_tokens.served, of_samples.served)
    assert of_tokens.class_table().equals(of_samples.class_table())
    assert of_tokens.token_table().equals(of_samples.token_table())
    for one, other in zip(of_tokens.document_table(), of_samples.document_table(), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slow
def test_patterns_of_a_real_run(full_run):
    loaded = load_experiments([full_run])
    (found,) = find_patterns(loaded, tokenizer=tiny_olmoe() / "tokenizer.json")
    lambada = loaded.frame[loaded.frame["task"] == "bh_demo_lambada"].iloc[0]
    documents = found.tables["documents"][found.tables["documents"]["task"] == "bh_demo_lambada"]
    assert len(documents) == 12
    assert documents["tokens"].sum() == lambada["tokens"]  # it has one request a document
    assert np.average(documents["mean_experts"], weights=documents["tokens"]) == pytest.approx(
        lambada["avg_experts"]
    )
    assert documents["loss"].notna().all()
    assert found.tables["tokens"]["occurrences"].sum() == found.tables["documents"]["tokens"].sum()
    assert found.tables["classes"]["tokens"].sum() == found.tables["documents"]["tokens"].sum()
    texts, classes = vocabulary(tiny_olmoe() / "tokenizer.json")
    row = found.tables["tokens"][found.tables["tokens"]["text"] == " the"].iloc[0]
    assert (row["token_id"], row["token_class"]) == (texts.index(" the"), "word start")
    punctuation = found.tables["classes"][found.tables["classes"]["token_class"] == "punctuation"][
        "tokens"
    ].sum()
    assert 0 < punctuation < 0.3 * found.tables["documents"]["tokens"].sum()
    assert len(found.tables["specialisation"]) == 2 * 4 * 64
    assert found.tables["specialisation"]["share"].between(0, 1).all()
    assert Counter(classes)["word start"] > 1000
    assert len(found.tables["clusters"]) == found.clusters.number


@pytest.mark.slow
def test_losses_of_the_harness_stand_in_for_missing_samples(full_run):
    loaded = load_experiments([full_run])
    loaded.internal_routing_file = lambda run_id, task: None  # as with log_samples=0
    (found,) = find_patterns(loaded)
    units = found.tables["documents"].groupby("task")["loss_unit"].unique()
    assert units["bh_demo_lambada"].tolist() == ["nats per token"]
    assert pd.isna(units["bh_demo_hellaswag"]).all()
    of_documents = found.tables["complexity"].query("against == 'loss of the document'")
    reasons = of_documents.set_index("task")["reason"]
    assert reasons["bh_demo_hellaswag"].startswith("no loss was logged")
