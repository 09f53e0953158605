"""Any file is read, or left out and named; nothing else is ever raised."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from damaged_runs import (
    HUGE,
    LONG,
    SUMMARY_OF_A_SWEEP,
    log_of,
    manifest_of,
    results_of,
    samples_of,
)
from typer.testing import CliRunner

from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.cli.app import app
from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.harness.sweep.settings_file import read_settings

DEEP = "[" * 100_000 + "]" * 100_000


def put(place, value):
    """Return a change of JSON content: a value at a place such as ``config.bh.run_id``."""

    def change(content):
        *parents, last = place.split(".")
        inside = content
        for name in parents:
            inside = inside[int(name) if isinstance(inside, list) else name]
        inside[int(last) if isinstance(inside, list) else last] = value

    return change


def renamed(place, name):
    def change(content):
        inside = content
        for part in place.split("."):
            inside = inside[part]
        inside[name] = inside.pop(next(iter(inside)))

    return change


def rewritten(file, change):
    """Apply a change to a JSON file, or to the first line of a JSONL file; text replaces it all."""
    if isinstance(change, bytes):
        file.write_bytes(change)
    elif isinstance(change, str):
        file.write_text(change, encoding="utf-8")
    else:
        first, *rest = (
            file.read_text().split("\n") if file.suffix == ".jsonl" else [file.read_text()]
        )
        content = json.loads(first)
        change(content)
        file.write_text("\n".join([json.dumps(content), *rest]))


SUMMARY = "config.bh.summary.tasks.bh_wikitext"
RESULTS = {
    "empty": "",
    "half": '{"results": {"a"',
    "list": "[1]",
    "null": "null",
    "deep": DEEP,
    "deep inside": '{"results": {"t": {"acc,none": 1}}, "config": {"model_args": ' + DEEP + "}}",
    "not utf-8": b'{"results": "\xff\xfe"}',
    "half a character": put("config.model_args", {"pretrained": "\ud800"}),
    "no results": put("results", {}),
    "results a list": put("results", [1]),
    "config a list": put("config", [1]),
    "config.bh a list": put("config.bh", [1]),
    "config.bh text": put("config.bh", "x"),
    "version text": put("config.bh.schema_version", "1"),
    "version true": put("config.bh.schema_version", True),
    "version 99": put("config.bh.schema_version", 99),
    "log_dir 3": put("config.bh.log_dir", 3),
    "run_id null": put("config.bh.run_id", None),
    "run_id list": put("config.bh.run_id", ["a"]),
    "run_id int": put("config.bh.run_id", 3),
    "run_id leads outside": put("config.bh.run_id", "../../etc"),
    "run_id long": put("config.bh.run_id", LONG),
    "run_id empty": put("config.bh.run_id", ""),
    "huge metric": put("results.bh_wikitext.word_perplexity,none", HUGE),
    "huge tokens": put(f"{SUMMARY}.tokens", HUGE),
    "huge seconds": put(f"{SUMMARY}.seconds", HUGE),
    "huge histogram": put(f"{SUMMARY}.layers.0.histogram", [HUGE] * 17),
    "huge alpha": put("config.bh.config.alpha", HUGE),
    "huge width": put("config.bh.model_config.hidden_size", HUGE),
    "huge window": put("max_length", HUGE),
    "huge limit": put("config.limit", HUGE),
    "huge date": put("date", HUGE),
    "date text": put("date", "yesterday"),
    "task a/b": renamed("results", "a/b"),
    "task null byte": renamed("results", "a\0b"),
    "results of a task a list": put("results.bh_wikitext", [1]),
    "n-samples a list": put("n-samples", [1]),
    "n-samples text": put("n-samples.bh_wikitext", "4"),
    "versions a list": put("versions", [1]),
    "hash a number": put("task_hashes.bh_wikitext", 3),
    "model_args a list": put("config.model_args", ["pretrained"]),
    "model a list": put("config.model", ["hf"]),
    "config of the routing": put("config.bh.config", None),
    "max_k text": put("config.bh.config.max_k", "8"),
    "rule a number": put("config.bh.config.rule", 3),
    "layers text": put(f"{SUMMARY}.layers", "all"),
    "layer a list": put(f"{SUMMARY}.layers.0", [1]),
    "usage short": put(f"{SUMMARY}.layers.0.usage", [1]),
    "null model a list": put("config.bh.null_model", [1]),
    "fewshot text": put("config.fewshot_seed", "x"),
}
SAMPLES = {
    "empty": "",
    "half": '{"doc_id": 0',
    "not utf-8": b'{"doc_id": "\xff"}\n',
    "deep": DEEP,
    "list": "[1]\n",
    "blank line": "\n\n",
    "doc_id text": put("doc_id", "0"),
    "doc_id null": put("doc_id", None),
    "doc_id huge": put("doc_id", HUGE),
    "doc_id true": put("doc_id", True),
    "perplexity text": put("perplexity", "3"),
    "perplexity huge": put("perplexity", HUGE),
    "word_perplexity of three": put("word_perplexity", [1.0, 2.0, 3.0]),
    "word_perplexity text": put("word_perplexity", ["a", "b"]),
    "accuracy text": put("acc", "yes"),
    "no answers": put("resps", None),
    "hash a number": put("doc_hash", 3),
}
MANIFESTS = {
    "empty": "",
    "deep": DEEP,
    "files null": put("files", None),
    "files numbers": put("files", [1]),
    "files text": put("files", "tokens"),
    "files outside": put("files", ["../../two/x"]),
    "files absolute": put("files", ["/etc/passwd"]),
    "files long": put("files", [LONG]),
    "a file that is missing": put("files", ["none.json"]),
    "run_id of another": put("run_id", "run-2"),
    "run_id a list": put("run_id", [1]),
    "version null": put("schema_version", None),
    "token_rows text": put("token_rows", "0"),
}
LOGS = {
    "empty": "",
    "half": '{"schema_version": 1',
    "deep": DEEP,
    "not utf-8": b"\xff",
    "list": "[]",
    "samples null": put("samples", None),
    "sample a list": put("samples.0", [1]),
    "loss text": put("samples.0.loss", "2.0"),
    "loss huge": put("samples.0.loss", HUGE),
    "sample_id text": put("samples.0.sample_id", "0"),
    "layers a number": put("samples.0.layers", 3),
    "experts text": put("samples.0.layers.0.selected_experts", ["0"]),
    "experts huge": put("samples.0.layers.0.selected_experts", [[HUGE]]),
    "tokens null": put("samples.0.token_ids", [None]),
    "run_id of another": put("run_id", "run-2"),
}
HOSTILE = [
    (kind, name, place, change)
    for kind, place, table in (
        ("results", results_of, RESULTS),
        ("samples", samples_of, SAMPLES),
        ("manifest", manifest_of, MANIFESTS),
        ("log", log_of, LOGS),
    )
    for name, change in table.items()
]


@pytest.mark.parametrize(
    ("kind", "place", "change"),
    [pytest.param(k, p, c, id=f"{k}-{name}") for k, name, p, c in HOSTILE],
)
def test_a_hostile_file_is_left_out_and_named_and_the_rest_is_read(folder, kind, place, change):
    file = place(folder)
    rewritten(file, change)
    shutil.rmtree(folder / "logs" / "run-2")  # else it might do for both, and the other not be read
    done = CliRunner().invoke(app, ["aggregate", str(folder), "--no-figure", "--resamples", "10"])
    assert done.exit_code == 3, (done.output, done.exception)
    left_out = [line for line in done.output.splitlines() if line.startswith("left out: ")]
    named = file.parent if kind == "manifest" else file
    assert left_out
    assert any(str(named) in line for line in left_out), left_out
    assert all(len(line) < 1000 and "Traceback" not in line for line in left_out)
    strategies = load_experiments([folder]).frame["strategy"].unique().tolist()
    expected = (
        ["BH a=0.50, max 4"] if kind == "results" else ["BH a=0.30, max 4", "BH a=0.50, max 4"]
    )
    assert strategies == expected


@pytest.mark.parametrize(
    "change",
    [
        put("config.bh.log_dir", LONG),
        put("config.bh.log_dir", "../" * 40 + "etc"),
        put("config.bh.log_dir", "a\0b"),
        put("config.model_args", {"pretrained": LONG}),
        renamed("results", LONG),
        renamed("results", "[b]x[red]"),
    ],
)
def test_what_is_only_odd_is_read(folder, change):
    rewritten(results_of(folder), change)
    loaded = load_experiments([folder], force=True)
    assert loaded.frame["strategy"].nunique() == 2


def test_a_pipe_and_a_folder_are_not_waited_for(folder):
    os.mkfifo(folder / "one" / "results_pipe.json")
    loaded = load_experiments([folder])
    ((path, sentence),) = loaded.problems
    assert path.name == "results_pipe.json"
    assert "it is not a file" in sentence


# What a sweep had finished


@pytest.fixture
def sweep_of_one(folder):
    """Turn the folder into that of a sweep that has finished ``one``."""
    summary = json.loads(json.dumps(SUMMARY_OF_A_SWEEP))
    summary["files"] = {
        file.relative_to(folder).as_posix(): "0"
        for file in (results_of(folder), samples_of(folder))
    }
    (folder / "sweep.json").write_text("{}")
    (folder / "logs" / f"{summary['config']}.json").write_text(json.dumps(summary))
    return folder


def test_a_whole_sweep_has_lost_nothing(sweep_of_one):
    assert load_experiments([sweep_of_one]).problems == []


@pytest.mark.parametrize("place", [results_of, samples_of])
def test_what_a_sweep_had_finished_and_is_gone_is_named(sweep_of_one, place):
    file = place(sweep_of_one)
    file.unlink()
    loaded = load_experiments([sweep_of_one])
    ((path, sentence),) = loaded.problems
    assert path == file
    assert sentence.endswith(
        "is gone, though the sweep had finished 8experts_bh_a040_wikitext: run the sweep again."
    )


def test_a_damaged_summary_of_a_sweep_is_named(sweep_of_one):
    (file,) = (sweep_of_one / "logs").glob("8experts*.json")
    for text in ("", "[]", "{}", DEEP, '{"files": {"../../etc/results_passwd": "0"}}'):
        file.write_text(text)
        ((path, _),) = load_experiments([sweep_of_one]).problems
        assert path == file


# Links


def test_linked_experiments_are_read_and_loops_end(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder / "one", tmp_path / "elsewhere" / "one")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "two" / "loop").symlink_to(folder)
    (tmp_path / "elsewhere" / "back").symlink_to(folder / "linked")
    (folder / "nowhere").symlink_to(folder / "missing")
    loaded = load_experiments([folder])
    assert loaded.problems == loaded.notes == []
    assert set(loaded.frame["alpha"]) == {0.3, 0.5}
    files = set(loaded.frame["file"])
    assert any("/linked/one/" in file for file in files)
    assert not any("/loop/" in file for file in files)


def test_a_folder_given_twice_is_read_once(folder):
    (folder.parent / "same").symlink_to(folder)
    loaded = load_experiments([folder, folder.parent / "same", folder / "one"])
    assert loaded.notes == []
    assert len(loaded.frame) == 6


def test_a_copy_does_not_read_the_log_of_the_original(original, tmp_path):
    """The results name an absolute folder of their log; the copy lacks it."""
    copied = shutil.copytree(original, tmp_path / "copy")
    shutil.rmtree(copied / "logs" / "run-1")
    loaded = load_experiments([copied])
    assert loaded.log_folder("run-1") is None
    assert loaded.log_folder("run-2") == copied / "logs" / "run-2"
    assert "give the folder that it was moved to" in loaded.notes[0][1]
    assert load_experiments([copied, original / "logs"]).log_folder("run-1") is not None


def test_a_results_file_without_a_date_is_told_of(folder):
    file = results_of(folder)
    file.rename(file.with_name("results.json"))
    loaded = load_experiments([folder])
    assert set(loaded.frame["alpha"]) == {0.5}
    assert "give the file itself" in loaded.notes[0][1]
    assert len(load_experiments([file.with_name("results.json")]).frame) == 3
    shutil.rmtree(folder / "two")
    with pytest.raises(DataError, match=r"or the file .*results\.json itself"):
        load_experiments([folder])


# Settings of sweeps

YAML = {
    "aliases": "a: &a [1, 1]\nb: &b [*a, *a]\nmodel_args: {x: *b}\n",
    "bomb": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "deep": "alphas: " + "[" * 3000 + "]" * 3000,
    "deep blocks": "".join("  " * i + "a:\n" for i in range(3000))[:60_000],
    "large": "tasks: [" + "x, " * 400_000 + "x]",
    "preset a list": "preset: [quick]",
    "date as dtype": "model_args: {dtype: 2024-01-01}",
    "invalid date": "model_args: {dtype: 2024-99-99}",
    "set": "model_args: !!set {a, b}",
    "binary": "model_args: {dtype: !!binary aGVsbG8=}",
    "object": "!!python/object/apply:os.system [echo]",
    "number as key": "1: 2",
    "list as key": "? [1, 2]\n: 3",
    "tasks a mapping": "tasks: {a: b}",
    "limit text": "limit: many",
    "limit huge": f"limit: {HUGE}",
    "alphas text": "alphas: [0.4, high]",
    "model_args a list": "model_args: [dtype]",
    "model_args nested": "model_args: {a: [[1]]}",
    "tab": "\tlimit: 3",
    "zero byte": "limit: \0",
    "pretrained a list": "pretrained: [a]",
    "log_routing a list": "log_routing: [samples]",
}


@pytest.mark.parametrize("name", YAML)
def test_hostile_settings_are_one_sentence(tmp_path, name):
    file = tmp_path / "sweep.yaml"
    file.write_text(YAML[name])
    done = CliRunner().invoke(
        app, ["sweep", "--config", str(file), "--output-dir", str(tmp_path / "o")]
    )
    assert isinstance(done.exception, (ParameterError, SystemExit)), done.exception
    assert done.exit_code != 0
    message = str(done.exception) if isinstance(done.exception, ParameterError) else done.output
    assert str(file) in message
    assert len(message) < 2000
    assert not (tmp_path / "o").exists()


def test_a_folder_a_pipe_and_nothing_are_no_settings(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path, tmp_path / "pipe", tmp_path / "none"):
        with pytest.raises(ParameterError, match="could not be read"):
            read_settings(file)
