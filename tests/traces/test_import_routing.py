"""Traces of other engines: small ones of every format are read exactly, and give patterns.

The formats follow the sources named in the readers; vLLM, SGLang and Megatron-LM themselves need
GPUs.
"""

from __future__ import annotations

import base64
import io
import json
import pickle

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from lm_eval_bh.analysis.table.experiments import load_experiments

LAYERS, EXPERTS, K = 3, 16, 4
LENGTHS = (7, 1, 12, 5)


@pytest.fixture
def texts():
    """Return (token ids, experts [tokens, layers, K]) of some documents."""
    rng = np.random.default_rng(0)
    return [
        (
            rng.integers(0, 500, length).tolist(),
            rng.permuted(np.tile(np.arange(EXPERTS), (length, LAYERS, 1)), axis=-1)[..., :K],
        )
        for length in LENGTHS
    ]


def imported(run, source, output, *options):
    """Import a trace and return its log: (document, repeat, layer, position) -> row."""
    code, out, err = run("import-routing", source, "--output-dir", output, *options)
    assert code == 0, err
    assert f"Written to {output}" in out
    (part,) = output.rglob("part-*.parquet")
    table = pq.read_table(part).to_pandas()
    keys = ["doc_id", "repeat", "layer", "position"]
    assert not table.duplicated(keys).any()
    return table.set_index(keys).sort_index(), err


def assert_same(table, texts, ids=True):
    expected = {
        (document, 0, layer, position): list(experts[position, layer])
        for document, (_, experts) in enumerate(texts)
        for layer in range(LAYERS)
        for position in range(len(experts))
    }
    assert {key: list(row) for key, row in table["experts"].items()} == expected
    assert (table["count"] == table["experts"].map(len)).all()
    for (document, _, _, position), token in table["token_id"].items():
        assert token == texts[document][0][position] if ids else pd.isna(token)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def answer(prompt, tokens, experts, **more):
    """Return a response of vLLM with base64 text, which lacks the last token."""
    text = base64.b64encode(npy(experts[:-1].astype(np.uint8))).decode()
    choice = {"index": 0, "text": "x", "token_ids": tokens, "routed_experts": text}
    return {"id": "cmpl-1", "prompt_token_ids": prompt, "choices": [choice | more]}


def test_vllm_as_its_server_answers(run, texts, tmp_path):
    longer = [(ids, e) for ids, e in texts if len(ids) > 1]
    lines = [answer(ids[:2], ids[2:], experts) for ids, experts in longer]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    table, err = imported(run, tmp_path / "trace.jsonl", tmp_path / "out", "--num-experts", EXPERTS)
    assert err == ""
    assert_same(table, [(ids[:-1], experts[:-1]) for ids, experts in longer])
    assert table["weights"].isna().all()


def test_vllm_with_lists_of_prompt_and_answer(run, texts, tmp_path):
    """As in vLLM 0.21: -1 after a cache hit, several answers to a prompt."""
    ids, experts = texts[2]
    response = {
        "prompt_token_ids": ids[:4],
        "prompt_routed_experts": [[[-1] * K] * LAYERS, *experts[1:4].tolist()],
        "choices": [
            {"token_ids": ids[4:], "routed_experts": experts[4:].tolist()},
            {"token_ids": ids[4:6], "routed_experts": experts[4:6].tolist()},
        ],
    }
    (tmp_path / "trace.json").write_text(json.dumps([response]))
    table, _ = imported(run, tmp_path / "trace.json", tmp_path / "out")
    assert len(table) == LAYERS * (11 + 5)
    for (_, repeat, layer, position), row in table.iterrows():
        assert row["token_id"] == ids[position]
        assert list(row["experts"]) == experts[position, layer].tolist()
        assert position > 0
        assert position < (12, 6)[repeat]


def test_vllm_arrays_saved_from_python(run, texts, tmp_path):
    folder = tmp_path / "traces"
    folder.mkdir()
    for number, (_, experts) in enumerate(texts):
        # Fortran's order is another way to lay the same numbers out.
        order = np.asfortranarray if number % 2 else np.ascontiguousarray
        (folder / f"{number}.npy").write_bytes(npy(order(experts.astype(np.int16))))
    table, err = imported(run, folder, tmp_path / "out")
    assert_same(table, texts, ids=False)
    assert "--num-experts" in err


def test_a_repeated_expert_counts_once(run, tmp_path):
    """Engines that cannot leave a slot empty repeat an expert."""
    experts = np.array([[[5, 3, 5, 5]], [[1, 1, 1, 2]]], dtype=np.int16)
    (tmp_path / "t.npy").write_bytes(npy(experts))
    table, _ = imported(run, tmp_path / "t.npy", tmp_path / "out")
    assert [list(row) for row in table["experts"]] == [[5, 3], [1, 2]]


def sglang(texts, **more):
    """Return a record: a dense layer, two physical experts per logical one, and a decoding pass."""
    ids = [token for of_text, _ in texts for token in of_text]
    logical = np.concatenate([experts for _, experts in texts]).swapaxes(0, 1)
    to_logical = np.tile(np.arange(2 * EXPERTS) // 2, (LAYERS + 1, 1))
    slots = np.full((LAYERS + 1, len(ids), 8), -1, dtype=np.int32)
    rng = np.random.default_rng(1)
    slots[1:, :, :K] = 2 * logical + rng.integers(0, 2, logical.shape)
    prefill = {
        "forward_pass_id": 1,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": ids,
        "positions": [i for length in LENGTHS for i in range(length)],
        "extend_seq_lens": list(LENGTHS),
        "forward_mode": 1,
        "topk_ids_of_layer": torch.from_numpy(slots),
        "misc_objects": [],
        "global_physical_count": torch.zeros(LAYERS + 1, 2 * EXPERTS),
    }
    decode = prefill | {
        "forward_mode": 2,
        "extend_seq_lens": None,
        "input_ids": [3, 4],
        "positions": [9, 9],
        "topk_ids_of_layer": torch.from_numpy(slots[:, :2]),
    }
    return {
        "records": [prefill | more, decode],
        "last_physical_to_logical_map": torch.from_numpy(to_logical),
    }


def test_sglang(run, texts, tmp_path):
    file = tmp_path / "expert_distribution_recorder_1.5_0.pt"
    torch.save(sglang(texts), file)
    table, err = imported(run, file, tmp_path / "out")
    table.index = table.index.set_levels(table.index.levels[2] - 1, level="layer")
    assert_same(table, texts)
    assert "2 tokens of decoding passes count for distinct experts alone" in err


def test_megatron(run, texts, tmp_path):
    """One document per pass: two micro-batches in the first step, two in the second."""
    lines = []
    for step in (0, 1):
        for layer in range(LAYERS):
            for _, experts in texts[2 * step : 2 * step + 2]:
                record = {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": 0,
                    "num_tokens": len(experts),
                    "topk": K,
                    "top_indices": experts[:, layer].tolist(),
                }
                lines.append(json.dumps(record))
        lines.append(json.dumps(record | {"block": "mtp", "mtp_idx": 0}))
    file = tmp_path / "router_trace_rank0.jsonl"
    file.write_text("\n".join(lines) + "\n")
    table, err = imported(run, file, tmp_path / "out")
    assert_same(table, texts, ids=False)
    assert "2 lines of multi-token prediction are left out" in err


def table_of(texts):
    rng = np.random.default_rng(2)
    return pd.DataFrame(
        [
            (f"text {document}", position, layer, expert, weight, ids[position])
            for document, (ids, experts) in enumerate(texts)
            for position in range(len(ids))
            for layer in range(LAYERS)
            for expert, weight in zip(experts[position, layer], rng.random(K), strict=True)
        ],
        columns=["document", "token", "layer", "expert", "weight", "token_id"],
    )


def test_csv(run, texts, tmp_path):
    table_of(texts).to_csv(tmp_path / "trace.csv", index=False)
    table, _ = imported(run, tmp_path / "trace.csv", tmp_path / "out")
    assert_same(table, texts)
    weights = np.concatenate(table["weights"].tolist())
    expected = table_of(texts).sort_values(["document", "layer", "token"], kind="stable")["weight"]
    assert weights == pytest.approx(expected.to_numpy(), abs=1e-6)


def test_rows_of_a_table_may_come_in_any_order(run, texts, tmp_path):
    rows = table_of(texts).drop(columns=["weight", "token_id"])
    rows["document"] = rows["document"].str.removeprefix("text ").astype(int)
    shuffled = rows.sample(frac=1, random_state=0)
    shuffled = shuffled.sort_values("document", kind="stable")
    shuffled.to_csv(tmp_path / "trace.csv", index=False)
    table, _ = imported(run, tmp_path / "trace.csv", tmp_path / "out")
    for (document, _, layer, position), row in table.iterrows():
        assert set(row["experts"]) == set(texts[document][1][position, layer].tolist())


@pytest.fixture
def adaptive(tmp_path):
    """Write a table of thirty texts of two kinds, whose tokens have one to four experts."""
    rng = np.random.default_rng(3)
    rows = []
    for document in range(30):
        favoured = 4 * (document % 2)
        for token in range(20):
            kind = int(rng.integers(0, 50))
            for layer in (2, 5, 6):
                k = 1 + (kind + layer) % 4
                chosen = (favoured + rng.permutation(8)[:k]) % 12
                rows += [(document, token, layer, expert, kind) for expert in chosen]
    columns = ["document", "token", "layer", "expert", "token_id"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "trace.csv", index=False)
    return tmp_path / "trace.csv"


def test_metrics_are_those_of_the_trace(run, adaptive, tmp_path):
    rows = pd.read_csv(adaptive)
    imported(run, adaptive, tmp_path / "out", "--num-experts", 12, "--task", "mine")
    loaded = load_experiments([tmp_path / "out"])
    assert (loaded.problems, loaded.notes) == ([], [])
    (row,) = loaded.frame.to_dict(orient="records")
    counts = rows.groupby(["document", "token", "layer"]).size()
    assert (row["task"], row["strategy"]) == ("mine", "as csv routed, max 4")
    assert (row["tokens"], row["documents"], row["min_k"], row["max_k"]) == (600, 30, 1, 4)
    assert row["avg_experts"] == pytest.approx(counts.mean())
    assert row["std_experts"] == pytest.approx(counts.std(ddof=0))
    assert row["ceiling_hit_rate"] == pytest.approx(100 * (counts == 4).mean())
    wide = counts.unstack("layer")
    correlations = [wide[one].corr(wide[other]) for one, other in ((2, 5), (5, 6))]
    assert row["layer_consistency_score"] == pytest.approx(np.mean(correlations))
    usage = rows.groupby(["layer", "expert"]).size().unstack(fill_value=0)
    for _, layer in loaded.layers.iterrows():
        assert layer["usage"] == usage.loc[layer["layer"]].reindex(range(12), fill_value=0).tolist()
    assert pd.isna(row["tokens_per_second"])


def test_patterns_and_figures_of_an_import(run, adaptive, tmp_path):
    output = tmp_path / "out"
    imported(run, adaptive, output)
    code, _, err = run("report", output, "--patterns")
    assert code == 0, err
    documents = pd.read_csv(output / "patterns" / "documents.csv")
    assert (documents["tokens"] == 20).all()
    # The two kinds of text use other experts, and nobody said so.
    of_kind = pd.crosstab(documents["document"] % 2, documents["cluster"]).to_numpy()
    assert of_kind.max(1).sum() == 30
    code, out, err = run("aggregate", output, "--no-figure")
    assert code == 0, err
    assert "as csv routed, max 4" in out
    code, _, err = run("report", output, "--panel", "layers", "--output", tmp_path / "layers.png")
    assert code == 0, err
    # Without token ids there are no tokens to tell of, and everything else is the same.
    pd.read_csv(adaptive).drop(columns="token_id").to_csv(adaptive, index=False)
    imported(run, adaptive, tmp_path / "without")
    code, _, err = run("report", tmp_path / "without", "--patterns")
    assert code == 0, err
    without = pd.read_csv(tmp_path / "without" / "patterns" / "documents.csv")
    pd.testing.assert_frame_equal(without, documents)
    assert len(pd.read_csv(output / "patterns" / "tokens.csv")) == 50
    assert len(pd.read_csv(tmp_path / "without" / "patterns" / "tokens.csv")) == 0


def test_a_static_top_k_is_known_as_one(run, texts, tmp_path):
    table_of(texts).to_csv(tmp_path / "trace.csv", index=False)
    imported(run, tmp_path / "trace.csv", tmp_path / "out", "--model", "tiny-olmoe")
    (row,) = load_experiments([tmp_path / "out"]).frame.to_dict(orient="records")
    assert (row["strategy"], row["baseline"], row["num_experts"]) == ("top-4", True, 64)
    assert row["model"] == "tiny-olmoe"


# Hostile traces


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def responses(*choices, **more):
    return json.dumps({"choices": list(choices)} | more)


def as_text(content):
    return {"routed_experts": base64.b64encode(content).decode()}


HEADER = npy(np.zeros((2, 3, 4), np.int16))
LINE = {"step": 0, "layer": 0, "rank": 0, "top_indices": [[1, 2]]}
CSV = "document,token,layer,expert\n"
BROKEN = {
    "empty.json": ("", "could not be read"),
    "words.json": ("words", "could not be read"),
    "deep.json": ("[" * 100_000, "could not be read"),
    "list.json": ("[3]", "Response 1 of {file} has no choices"),
    "nothing.json": ("[]", "no token with experts"),
    "none.json": (responses({"text": "x"}), "serve with --enable-return-routed-experts"),
    "base.json": (responses({"routed_experts": "?!"}), "must be an integer array"),
    "magic.json": (responses(as_text(b"no numpy file")), "must be an integer array"),
    "short.json": (responses(as_text(HEADER[:-1])), "must be an integer array"),
    "huge.json": (
        responses(as_text(HEADER.replace(b"(2, 3, 4)", b"(9999999999, 3, 4)"))),
        "must be an integer array",
    ),
    "object.json": (
        responses(
            as_text(npy(np.array([{}]))),
        ),
        "must be an integer array",
    ),
    "ragged.json": (responses({"routed_experts": [[[1, 2]], [[1]]]}), "must be an integer array"),
    "flat.json": (responses({"routed_experts": [1, 2]}), "[tokens, layers, k]"),
    "float.json": (responses({"routed_experts": [[[0.5]]]}), "must be integers"),
    "words2.json": (responses({"routed_experts": [[["one"]]]}), "must be integers"),
    "negative.json": (responses({"routed_experts": [[[-2]]]}), "found expert -2"),
    "large.json": (responses({"routed_experts": [[[99999]]]}), "found expert 99999"),
    "larger.json": (responses({"routed_experts": [[[10**30]]]}), "must be 64-bit integers"),
    "ids.json": (
        responses({"routed_experts": [[[1]]], "token_ids": ["a"]}),
        "token_ids[0] must be an integer, not 'a'",
    ),
    "bigid.json": (
        responses({"routed_experts": [[[1]]], "token_ids": [10**30]}),
        "not an integer of 31 digits",
    ),
    "apart.json": (
        responses({"routed_experts": [[[1]]]}, prompt_routed_experts=[[[1], [2]]]),
        "differ in shape",
    ),
    "cut.npy": (HEADER[:-1], "must be an integer array"),
    "header.npy": (HEADER.replace(b"}", b"("), "must be an integer array"),
    "brackets.npy": (HEADER.replace(b"{'descr'", b"((((((((("), "must be an integer array"),
    "pickle.npy": (npy(np.array([Hostile()])), "must be an integer array"),
    "unknown.jsonl": ("{}\n", "add --format"),
    "cut.jsonl": (json.dumps(LINE) + '\n{"step"', "Line 2 of {file} is damaged"),
    "float.jsonl": (json.dumps(LINE | {"top_indices": [[1.5]]}), "must be an integer"),
    "rows.jsonl": (json.dumps(LINE | {"top_indices": [[1, 2], [1]]}), "in their number of experts"),
    "empty.jsonl": (json.dumps(LINE | {"top_indices": []}), "have no tokens"),
    "missing.jsonl": (
        "\n".join(map(json.dumps, [LINE, LINE, LINE | {"layer": 1}])),
        "its layers have 1 to 2 passes",
    ),
    "layer.jsonl": (json.dumps(LINE | {"layer": 99999}), "found layer 99999"),
    "zip.pt": (b"PK\x03\x04 not a zip", "could not be read as tensors"),
    "pickle.pt": (pickle.dumps(Hostile()), "could not be read as tensors"),
    "empty.pt": (b"", "could not be read as tensors"),
    "empty.csv": ("", "could not be read"),
    "columns.csv": ("document,token,layer\n1,2,3\n", "has no column expert"),
    "ragged.csv": (CSV + "1,2,3,4,5,6\n1\n", "more fields than its header"),
    "words.csv": (CSV + "a,b,c,d\n", "token must be whole numbers"),
    "part.csv": (CSV + "1,2,3,4\n1,2,,4\n", "layer must be whole numbers"),
    "negative.csv": (CSV + "1,2,-3,4\n", "layer must be from 0"),
    "position.csv": (CSV + "1,-2,3,4\n", "found position -2"),
    "header.csv": (CSV, "has no rows"),
    "differ.csv": (
        CSV + "1,0,0,4\n2,0,0,4\n2,0,1,4\n",
        "experts in 2 layers, and the first document in 1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_trace_is_refused_in_one_sentence(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run("import-routing", name, "--output-dir", "out")
    assert (code, out) == (1, "")
    assert err.startswith("lm-eval-bh: error: ")
    assert err.count("\n") == 1
    assert sentence.format(file=name) in err
    assert {path.name for path in tmp_path.iterdir()} == {name}  # nothing executed, half-written


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"topk_ids_of_layer": torch.zeros(3)}, "topk_ids_of_layer must be an array"),
        ({"topk_ids_of_layer": torch.full((4, 25, 8), 99)}, "last_physical_to_logical_map"),
        ({"topk_ids_of_layer": None}, "topk_ids_of_layer must be an array"),
        ({"input_ids": "text"}, "input_ids must be a list of integers"),
        ({"positions": [[1]]}, "positions must be a list of integers"),
        ({"extend_seq_lens": [26, -1]}, "extend_seq_lens are negative"),
        ({"extend_seq_lens": [0.5]}, "extend_seq_lens must be a list of integers"),
    ],
)
def test_a_broken_record_of_sglang(run, texts, tmp_path, change, sentence):
    torch.save(sglang(texts, **change), tmp_path / "r.pt")
    code, _, err = run("import-routing", tmp_path / "r.pt", "--output-dir", tmp_path / "out")
    assert code == 1
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_mode_of_sglang(run, tmp_path):
    for content in ({"logical_count": torch.zeros(1, 2)}, {"records": [{"rank": 0}]}, [1], 3):
        torch.save(content, tmp_path / "r.pt")
        code, _, err = run("import-routing", tmp_path / "r.pt", "--output-dir", tmp_path / "out")
        assert code == 1
        assert "--expert-distribution-recorder-mode per_token" in err


def test_what_is_there_stays(run, adaptive, tmp_path):
    output = tmp_path / "out"
    imported(run, adaptive, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    code, _, err = run("import-routing", adaptive, "--output-dir", output)
    assert code == 1
    assert "exists and is not empty: use --overwrite" in err
    broken = tmp_path / "broken.csv"
    broken.write_text(CSV + "1,0,0,4\n2,0,0,4\n2,0,1,4\n")
    code, *_ = run("import-routing", broken, "--output-dir", output, "--overwrite")
    assert code == 1
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    (output / "mine.txt").write_text("mine")
    code, _, err = run("import-routing", adaptive, "--output-dir", output, "--overwrite")
    assert code == 1
    assert "name another one" in err
