"""route-diff agrees with a slow plain recomputation from the Parquet files of two logs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lm_eval_bh import DataError
from lm_eval_bh.analysis.compare.route_diff import diff_routes
from lm_eval_bh.cli.app import app
from lm_eval_bh.errors import RoutingError
from lm_eval_bh.logged_rows import read_logged_rows
from lm_eval_bh.traces.notes import Notes
from lm_eval_bh.traces.trace_document import TraceDocument
from lm_eval_bh.traces.trace_run import TraceSource, write_trace


def pairs_of(folder):
    """Return (text, layer, position, time) -> row, as the log's files have them."""
    parts = sorted(Path(folder).rglob("part-*.parquet"), key=lambda part: len(part.name))
    seen, found = Counter(), {}
    for row in pd.concat(map(pd.read_parquet, parts)).to_dict("records"):
        key = tuple(row[n] for n in ("task", "doc_id", "request", "repeat", "layer", "position"))
        found[*key, seen[key]] = row  # the last window of a document looks back
        seen[key] += 1
    return found


@pytest.mark.parametrize("other", ["bfloat16", "min_w"])
def test_it_is_what_a_slow_plain_recomputation_finds(full_logs, other):
    a, b = pairs_of(full_logs["float32"]), pairs_of(full_logs[other])
    generated = [key for key in a if key[0] == "demo_generation"]
    a = {key: row for key, row in a.items() if key not in generated}
    assert set(a) == set(b)
    by_layer, by_token, losses = defaultdict(list), defaultdict(int), {}
    swaps, dropped, positions = Counter(), defaultdict(list), defaultdict(list)
    for key, row in a.items():
        assert row["token_id"] == b[key]["token_id"]
        ours, theirs = list(row["experts"]), list(b[key]["experts"])
        only, new = [e for e in ours if e not in theirs], [e for e in theirs if e not in ours]
        differs = set(ours) != set(theirs)
        jaccard = len(set(ours) & set(theirs)) / len(set(ours) | set(theirs))
        by_layer[key[4]].append((differs, jaccard))
        positions[0 if key[5] == 0 else int(np.log2(key[5])) + 1].append((differs, jaccard))
        token = key[:4] + key[5:]
        by_token[token] += differs
        losses[token] = row["loss"], b[key]["loss"]
        weights = dict(zip(ours, row["weights"], strict=True))
        dropped[key[4]].append(sum(weights[e] for e in only) / sum(weights.values()))
        for slot in range(max(len(only), len(new))):
            from_, to = ((x[slot] if slot < len(x) else -1) for x in (only, new))
            swaps[key[4], from_, to] += 1
    found = diff_routes(*(read_logged_rows(full_logs[name]) for name in ("float32", other)))
    every = [pair for some in by_layer.values() for pair in some]
    assert (found.tokens, found.pairs) == (len(by_token), len(every))
    assert found.left_out == (len(generated) / len(by_layer), 0)
    assert found.tokens_differ == sum(count > 0 for count in by_token.values()) > 0
    assert found.pairs_differ == sum(differs for differs, _ in every)
    assert found.jaccard == pytest.approx(np.mean([jaccard for _, jaccard in every]))
    for layer, row in found.layers.set_index("layer").iterrows():
        assert row[["differ", "jaccard"]].to_numpy() == pytest.approx(np.mean(by_layer[layer], 0))
        assert row["weight_a"] == pytest.approx(np.mean(dropped[layer]))
    for row, (_, some) in zip(found.positions.itertuples(), sorted(positions.items()), strict=True):
        assert (row.differ, row.jaccard) == pytest.approx(tuple(np.mean(some, 0)))
        assert row.pairs == len(some)
    assert {(r.layer, r.a, r.b): r.times for r in found.swaps.itertuples()} == dict(swaps)
    for row in found.losses.itertuples():
        some = [losses[t] for t, count in by_token.items() if count == row.layers_differ]
        some = [both for both in some if not np.isnan(both).any()]
        assert row.tokens == len(some)
        assert (row.loss_a, row.loss_b) == pytest.approx(tuple(np.mean(some, 0)), abs=1e-5)


def test_a_log_does_not_differ_from_itself(full_logs):
    log = read_logged_rows(full_logs["float32"])
    found = diff_routes(log, log)
    assert (found.pairs_differ, found.jaccard, len(found.swaps)) == (0, 1.0, 0)
    assert found.left_out == (0, 0)


def trace(folder, texts, experts, *, layers=(0, 1), weights=True, ids=True):
    """Import a trace in which all tokens of a text have its experts."""
    documents = []
    for number, (text, own) in enumerate(zip(texts, experts, strict=True)):
        shape = len(text), len(layers), len(own)
        documents.append(
            TraceDocument.of(
                "made",
                number,
                np.broadcast_to(np.array(own), shape),
                layers=list(layers),
                tokens=text if ids else None,
                weights=np.full(shape, 1 / len(own)) if weights else None,
            )
        )
    write_trace(documents, TraceSource("made", "some/model"), folder, Notes())
    return read_logged_rows(folder)


TEXTS = [[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9, 9]]


def test_documents_are_found_by_their_text_whatever_their_numbers(tmp_path):
    a = trace(tmp_path / "a", TEXTS, [[0, 1], [2, 3], [4, 5]])
    b = trace(tmp_path / "b", TEXTS[::-1], [[4, 5], [2, 3], [0, 6]], weights=False)
    found = diff_routes(a, b)
    assert (found.tokens, found.tokens_differ, found.by_text) == (12, 4, 2)
    assert found.swaps[["layer", "a", "b", "times"]].to_numpy().tolist() == [
        [0, 1, 6, 4],
        [1, 1, 6, 4],
    ]
    assert found.layers["weight_a"].tolist() == pytest.approx([0.5 / 3] * 2)
    assert found.layers["weight_b"].isna().all()
    assert json.loads(json.dumps(found.as_dict()))["layers"][0]["weight_b"] is None


def test_what_follows_another_token_is_another_text(tmp_path):
    a = trace(tmp_path / "a", [[1, 2, 3, 4, 5]], [[0]], layers=(0, 2))
    b = trace(tmp_path / "b", [[1, 2, 3, 8, 5]], [[0]], layers=(0, 1))
    found = diff_routes(a, b)
    assert (found.tokens, found.left_out, found.other_layers) == (3, (2, 2), [1, 2])


@pytest.mark.parametrize(
    ("texts", "arguments", "sentence"),
    [
        ([[1, 9, 9, 9]] * 3, {}, r"different texts.*document 0 has the token id 2 at position 1"),
        ([text[1:] for text in TEXTS], {}, "are logs of different texts"),
        (TEXTS, {"layers": (4, 5)}, "have a layer in common"),
        (TEXTS, {"ids": False}, "has no token ids"),
    ],
)
def test_logs_that_cannot_be_compared(tmp_path, texts, arguments, sentence):
    a = trace(tmp_path / "a", TEXTS, [[0]] * 3)
    with pytest.raises(DataError, match=sentence):
        diff_routes(a, trace(tmp_path / "b", texts, [[0]] * 3, **arguments))


def test_the_command(full_logs, tmp_path, capsys):
    def run(*arguments):
        return app(["route-diff", *map(str, arguments)], standalone_mode=False)

    logs = full_logs["float32"], full_logs["bfloat16"]
    figure = tmp_path / "d.svg"
    run(*logs, "--output", tmp_path / "d.json", "--figure", figure, "--fail-above", "50%")
    written = json.loads((tmp_path / "d.json").read_text())
    assert f"{written['pairs_differ']:,} of {written['pairs']:,} pairs" in capsys.readouterr().out
    assert "Jaccard index" in figure.read_text()
    run(logs[0], logs[0], "--fail-above", "0%")
    with pytest.raises(RoutingError, match=r"--fail-above allows 0\.1 %"):
        run(*logs, "--fail-above", "0.1%")
    with pytest.raises(DataError, match="has 3 logs, such as"):
        run(logs[0].parent, logs[1])
    with pytest.raises(DataError, match="no log of every token"):
        run(tmp_path, logs[1])
