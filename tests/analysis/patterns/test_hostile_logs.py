"""Invalid logs: each is left out and named, and the others are read."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lm_eval_bh.analysis.patterns import write_patterns
from lm_eval_bh.analysis.patterns.findings import find_patterns
from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import read_token_log
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.cli.app import app
from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import INTERNAL_ROUTING, MANIFEST, TOKENS, token_schema

GOOD, BAD = "BH a=0.40, max 4", "BH a=0.30, max 4"


def token_rows(folder: Path) -> list[dict[str, object]]:
    """Return the rows of a token log that say what a run's internal routing logs say."""
    rows = []
    for file in sorted(folder.glob(f"*{INTERNAL_ROUTING}")):
        log = json.loads(file.read_text())
        for sample in log["samples"]:
            for layer in sample["layers"]:
                for position, (token, selected) in enumerate(
                    zip(sample["token_ids"], layer["selected_experts"], strict=True)
                ):
                    experts = [expert for expert in selected if expert >= 0]
                    rows.append(
                        {
                            "task": log["dataset"],
                            "doc_id": sample["sample_id"],
                            "request": 0,
                            "repeat": 0,
                            "layer": layer["layer"],
                            "position": position,
                            "token_id": token,
                            "count": len(experts),
                            "experts": experts,
                            "weights": [0.5] * len(experts),
                        }
                    )
    return rows


@pytest.fixture
def runs(write) -> tuple[Path, Path]:
    """Return the folder of two configurations, and the token log of the second."""
    write("good", log=True, alpha=0.4)
    write("bad", log=True, alpha=0.3)
    folder = write.folder / "logs" / "run-2"
    file = folder / TOKENS / "part-0-0.parquet"
    file.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(token_rows(folder), token_schema(False, 16)), file)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"].append(f"{TOKENS}/{file.name}")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return write.folder, file


def test_both_logs_say_the_same(runs, write):
    write("again", log=True, alpha=0.2)
    ours = {found.strategy: found.tables for found in find_patterns(load_experiments([runs[0]]))}
    for name, table in ours[BAD].items():
        assert table.equals(ours["BH a=0.20, max 4"][name]), name


def with_column(name: str, values: Callable[[list], list], kind: pa.DataType | None = None):
    """Return a change of one column of a token log."""

    def change(table: pa.Table) -> pa.Table:
        place, field = table.schema.get_field_index(name), table.schema.field(name)
        column = pa.array(values(table.column(name).to_pylist()), kind or field.type)
        return table.set_column(place, name, column)

    return change


def last(value: object) -> Callable[[list], list]:
    return lambda values: [*values[:-1], value]


TABLES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "no rows": (lambda table: table.slice(0, 0), "found 0 to 0 tokens of bh_hellaswag"),
    "a task is missing": (
        lambda table: table.filter(pa.compute.not_equal(table["task"], "bh_lambada")),
        "found 0 to 0 tokens of bh_lambada",
    ),
    "a layer is missing": (
        lambda table: table.filter(pa.compute.not_equal(table["layer"], 1)),
        "found 0 to 25 tokens",
    ),
    "a row is missing": (lambda table: table.slice(1), "found 24 to 25 tokens"),
    "no column": (lambda table: table.drop_columns("token_id"), "token_id"),
    **{
        f"{name} is null": (with_column(name, last(None)), f"{name} is null in 1 rows")
        for name in ("task", "doc_id", "request", "repeat", "layer", "experts")
    },
    "an expert is null": (with_column("experts", last([None])), "experts is null in 1 rows"),
    "documents are words": (with_column("doc_id", lambda v: ["a"] * len(v), pa.string()), "'a'"),
    "documents are NaN": (
        with_column("doc_id", last(float("nan")), pa.float64()),
        "nan was truncated",
    ),
    "a token is half": (with_column("token_id", last(1.5), pa.float64()), "was truncated"),
    "a token is a list": (
        with_column("token_id", lambda v: [[x] for x in v], pa.list_(pa.int32())),
        "cast",
    ),
    "experts are numbers": (with_column("experts", lambda v: [1] * len(v), pa.int16()), "list"),
    "experts are words": (
        with_column("experts", lambda v: [["a"]] * len(v), pa.list_(pa.string())),
        "'a'",
    ),
    "document -1": (with_column("doc_id", last(-1)), "found document -1, which is out of range"),
    "layer 99": (with_column("layer", last(99)), "found layer 99, which is out of range"),
    "layer -1": (with_column("layer", last(-1)), "found layer -1, which is out of range"),
    "token -1": (with_column("token_id", last(-1)), "found token id -1, which is out of range"),
    "expert 30000": (with_column("experts", last([1, 30000])), "found expert 30000, which is out"),
    "expert -5": (with_column("experts", last([-5])), "found expert -5, which is out of range"),
}


def left_out(folder: Path, damage: Callable[[], object]) -> str:
    """Damage a log of the second configuration, and return why it is left out."""
    loaded = load_experiments([folder])
    damage()
    assert [found.strategy for found in find_patterns(loaded)] == [GOOD]
    ((_, sentence),) = loaded.problems
    assert "run-2" in sentence
    assert re.search(r"; run (the evaluation|it) again\.$", sentence)
    return sentence


@pytest.mark.parametrize("name", TABLES)
def test_a_token_log_of_another_content(runs, name):
    folder, file = runs
    change, reason = TABLES[name]
    table = change(pq.read_table(file))
    assert reason in left_out(folder, lambda: pq.write_table(table, file))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"{}",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:4] + bytes(len(content) - 8) + content[-4:],
    ],
    ids=["empty", "JSON", "half", "last byte", "zeros"],
)
def test_a_token_log_that_is_no_parquet(runs, change):
    folder, file = runs
    content = change(file.read_bytes())
    assert file.name in left_out(folder, lambda: file.write_bytes(content))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1))))
def test_a_corrupted_token_log_raises_nothing_but_our_error(runs, changes):
    _, whole = runs
    content = bytearray(whole.read_bytes())
    for place, some in changes:
        start = int(place * len(content))
        content[start : start + len(some)] = some
    file = whole.with_name("corrupted.parquet")
    file.write_bytes(content)
    tasks = ["bh_hellaswag", "bh_lambada", "bh_wikitext"]
    counts = Counts(tasks, range(3), 16, ["unknown"], np.array([], dtype=np.int64), 4)
    with contextlib.suppress(DataError):
        for piece in read_token_log([file], tasks, tasks):
            counts.add(piece)
        counts.document_table()


def change_sample(**fields: object) -> Callable[[dict], object]:
    return lambda log: log["samples"][0].update(fields)


def change_layer(**fields: object) -> Callable[[dict], object]:
    return lambda log: log["samples"][0]["layers"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda log: log.update(samples=[]), "found 0 to 0 tokens of bh_wikitext"),
        (lambda log: log.update(samples=[1]), "must be an object, not 1"),
        (lambda log: log.update(samples=None), "must be a list, not null"),
        (lambda log: log["samples"][0].pop("token_ids"), "token_ids"),
        (lambda log: log["samples"][0]["layers"].pop(), "found 20 to 25 tokens"),
        (change_sample(loss="low"), "'low'"),
        (change_sample(loss=[1.0]), "must be a number or null, not a list"),
        (change_sample(sample_id="first"), "'first'"),
        (change_sample(sample_id=10**400), "must be an integer, not an integer of 401 digits"),
        (change_sample(sample_id=-1), "found document -1, which is out of range"),
        (change_sample(token_ids=[1, 2]), "document 0 has other tokens than experts"),
        (change_sample(token_ids=[-1] * 5), "found token id -1, which is out of range"),
        (change_sample(layers=[]), "document 0 has other tokens than experts"),
        (change_layer(layer=99), "found layer 99, which is out of range"),
        (change_layer(selected_experts=[[99] * 4] * 5), "found expert 99, which is out of range"),
        (change_layer(selected_experts=[[-5] * 4] * 5), "found expert -5, which is out of range"),
        (change_layer(selected_experts=[[1], [1, 2]]), "ValueError"),
        (change_layer(selected_experts=[1, 2, 3, 4, 5]), "must be a list, not 1"),
    ],
)
def test_an_internal_log_of_another_content(write, change, reason):
    write("good", log=True, alpha=0.4)
    write("bad", log=True, alpha=0.3)
    file = next((write.folder / "logs" / "run-2").glob("*wikitext*"))
    log = json.loads(file.read_text())
    change(log)
    assert reason in left_out(write.folder, lambda: file.write_text(json.dumps(log)))


def test_the_largest_token_id_takes_no_more_memory_than_another(runs):
    folder, file = runs
    table = with_column("token_id", lambda v: [2**31 - 1] * len(v))(pq.read_table(file))
    pq.write_table(table, file)
    loaded = load_experiments([folder])
    tokens = {found.strategy: found.tables["tokens"] for found in find_patterns(loaded)}
    assert loaded.problems == []
    assert tokens[BAD]["token_id"].tolist() == [2**31 - 1]
    assert tokens[BAD]["token_class"].tolist() == ["unknown"]
    assert tokens[BAD]["occurrences"].tolist() == [3 * 25]


def test_a_log_of_late_documents_alone_is_drawn_without_them(runs, tmp_path):
    folder, file = runs
    table = with_column("doc_id", lambda v: [10**6] * len(v))(pq.read_table(file))
    pq.write_table(table, file)
    write_patterns(load_experiments([folder]), tmp_path)
    documents = pd.read_csv(tmp_path / "patterns" / "documents.csv")
    assert set(documents["configuration"]) == {GOOD}
    assert set(pd.read_csv(tmp_path / "patterns" / "tokens.csv")["configuration"]) == {GOOD, BAD}


def test_the_command_says_what_is_left_out_and_keeps_tables_if_nothing_is_left(runs, tmp_path):
    folder, file = runs
    words = ["report", "--patterns", str(folder), "--output-dir", str(tmp_path / "out")]
    file.write_bytes(b"PAR1")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3
    assert f"left out: {file} could not be read" in " ".join(done.stderr.split())
    written = {path: path.read_bytes() for path in (tmp_path / "out" / "patterns").iterdir()}
    table = pd.read_csv(tmp_path / "out" / "patterns" / "documents.csv")
    assert set(table["configuration"]) == {GOOD}

    for other in (folder / "logs" / "run-1").glob(f"*{INTERNAL_ROUTING}"):
        log = json.loads(other.read_text())
        other.write_text(json.dumps(log | {"samples": []}))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 3
    assert done.stderr.count("left out: ") == 2
    assert written == {path: path.read_bytes() for path in written}
    assert set(written) == set((tmp_path / "out" / "patterns").iterdir())
