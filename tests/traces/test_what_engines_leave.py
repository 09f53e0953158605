"""Empty, repeated or partial records of engines are never read as choices."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from written_traces import (
    chosen,
    imported,
    line,
    record,
    refused,
    response,
    save_records,
    text_of,
    write,
)

from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.traces.model_layers import layers_with_router

PROMPT, ANSWER = list(range(100, 112)), list(range(200, 205))


def with_zeros(experts, layers):
    """Return experts with further layers of zeros at these places."""
    whole = np.zeros((len(experts), experts.shape[1] + len(layers), experts.shape[2]), int)
    whole[:, [i for i in range(whole.shape[1]) if i not in layers]] = experts
    return whole


def model_of(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_experts": 16} | config))
    return folder


# Filler


@pytest.mark.parametrize("dense", [[0], [0, 1, 2], [1, 3]])
@pytest.mark.parametrize("how", ["text", "array"])
def test_layers_of_zeros_have_no_router(run, tmp_path, dense, how):
    experts = with_zeros(chosen(12, 3), dense)
    file = tmp_path / "t.npy"
    if how == "array":
        np.save(file, experts.astype(np.uint8))
    else:
        file = write(tmp_path / "t.jsonl", response(text_of(experts), PROMPT[:8], ANSWER))
    found = imported(run, file, tmp_path / "out")
    assert found.layers == [i for i in range(3 + len(dense)) if i not in dense]
    assert found.histograms == [{2: 12}] * 3
    assert found.rule == "top-k"
    assert any("nothing but zeros" in note for note in found.notes)


@pytest.mark.parametrize("k", [1, 2])
def test_one_token_or_one_expert_tells_filler_by_the_whole_trace(run, tmp_path, k):
    """A document's only token may choose expert 0 in a layer where others choose others."""
    one, many = np.full((1, 3, k), 0), with_zeros(chosen(9, 2, k), [0])
    one[0, 1:] = chosen(1, 2, k, seed=1)
    if k == 1:
        one[0, 1] = 0
    answers = (response(text_of(e), list(range(len(e))), [1]) for e in (one, many))
    found = imported(run, write(tmp_path / "t.jsonl", *answers), tmp_path / "out")
    assert (found.layers, found.documents, found.tokens) == ([1, 2], 2, 10)
    assert found.histograms == [{k: 10}] * 2


def test_a_token_of_zeros_was_not_captured(run, tmp_path):
    experts = chosen(12, 3)
    experts[2:5] = 0
    file = write(tmp_path / "t.jsonl", response(text_of(experts), PROMPT[:8], ANSWER))
    found = imported(run, file, tmp_path / "out")
    assert (found.tokens, found.histograms) == (9, [{2: 9}] * 3)
    assert any(note.startswith("3 tokens have zeros in every layer") for note in found.notes)


def test_zeros_of_some_layers_leave_the_token_out(run, tmp_path):
    experts = chosen(12, 3)
    experts[2, 1] = 0
    np.save(tmp_path / "t.npy", experts)
    found = imported(run, tmp_path / "t.npy", tmp_path / "out")
    assert (found.tokens, found.histograms) == (11, [{2: 11}] * 3)
    assert any(note.startswith("1 tokens have no expert in some") for note in found.notes)


def test_zeros_are_a_choice_where_the_engine_repeats_experts(run, tmp_path):
    """As in our own export to vLLM: one expert fills a token's unused slots."""
    experts = chosen(12, 3)
    experts[2, 1], experts[3, 2] = 0, 7
    np.save(tmp_path / "t.npy", experts)
    found = imported(run, tmp_path / "t.npy", tmp_path / "out")
    assert found.histograms == [{2: 12}, {1: 1, 2: 11}, {1: 1, 2: 11}]
    assert any("name an expert more than once" in note for note in found.notes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_unused_slots_of_unsigned_numbers(run, tmp_path, dtype):
    """-1 becomes the largest number, which is an expert only where a row names it once."""
    experts = chosen(12, 3)
    experts[:4] = -1
    np.save(tmp_path / "t.npy", experts.astype(dtype))
    found = imported(run, tmp_path / "t.npy", tmp_path / "out")
    assert (found.tokens, found.histograms) == (8, [{2: 8}] * 3)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_a_capture_of_nothing_but_zeros_is_refused(run, tmp_path, k):
    answers = [response(text_of(np.zeros((12, 3, k))), PROMPT[:8], ANSWER)] * 2
    error = refused(run, write(tmp_path / "t.jsonl", *answers), tmp_path / "out")
    assert "holds nothing but zeros: the engine captured no routing" in error


def test_a_response_of_nothing_but_zeros_is_left_out(run, tmp_path):
    answers = [
        response(text_of(e), PROMPT[:8], ANSWER) for e in (chosen(12, 3), np.zeros((12, 3, 2)))
    ]
    found = imported(run, write(tmp_path / "t.jsonl", *answers), tmp_path / "out")
    assert (found.documents, found.tokens) == (1, 12)
    assert any("Response 2" in note and "left out" in note for note in found.notes)


DENSE = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 16}


def test_the_model_says_which_layers_have_a_router(run, tmp_path):
    model = model_of(tmp_path / "m", **DENSE)
    np.save(tmp_path / "t.npy", with_zeros(chosen(12, 3, 1), [0]))
    found = imported(run, tmp_path / "t.npy", tmp_path / "out", "--model", model)
    assert found.layers == [1, 2, 3]
    assert any("no router there, as its configuration says" in note for note in found.notes)
    # One expert: that all tokens chose 0 in a layer that has a router is their choice.
    np.save(tmp_path / "u.npy", with_zeros(chosen(12, 2, 1), [0, 2]))
    found = imported(run, tmp_path / "u.npy", tmp_path / "out2", "--model", model)
    assert found.layers == [1, 2, 3]
    assert found.usage[1] == {0: 12}
    # No top-k: the engine did not capture the layer.
    np.save(tmp_path / "v.npy", with_zeros(chosen(12, 2), [0, 2]))
    found = imported(run, tmp_path / "v.npy", tmp_path / "out3", "--model", model)
    assert found.layers == [1, 3]
    assert any("layer 2" in note and "captured nothing" in note for note in found.notes)


def test_rows_of_routers_alone_get_the_numbers_of_the_model(run, tmp_path):
    """As earlier releases of vLLM write them."""
    np.save(tmp_path / "t.npy", chosen(12, 3))
    model = model_of(tmp_path / "m", **DENSE)
    found = imported(run, tmp_path / "t.npy", tmp_path / "out", "--model", model)
    assert found.layers == [1, 2, 3]
    assert any("numbered 1 to 3" in note for note in found.notes)


def test_another_model_is_noticed(run, tmp_path):
    model = model_of(tmp_path / "m", **DENSE)
    np.save(tmp_path / "t.npy", chosen(12, 4))
    found = imported(run, tmp_path / "t.npy", tmp_path / "out", "--model", model)
    assert found.layers == [0, 1, 2, 3]
    assert any("layer 0: experts, but no router" in note for note in found.notes)


@pytest.mark.parametrize(
    ("config", "routed"),
    [
        ({}, None),
        ({"num_hidden_layers": "6", "first_k_dense_replace": 1}, None),
        ({"first_k_dense_replace": 1}, [1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, [1, 2, 4, 5]),
        ({"mlp_only_layers": [0, 3]}, [1, 2, 4, 5]),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [1, 3, 5]),
        ({"moe_layers": [1, 5]}, [1, 5]),
        ({"interleave_moe_layer_step": 2}, [1, 3, 5]),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 1},
            [1, 2, 3, 4],
        ),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3, 5]),
        ({"mlp_layer_types": ["dense", *["sparse"] * 5]}, [1, 2, 3, 4, 5]),
        ({"text_config": {"num_hidden_layers": 3, "first_k_dense_replace": 2}}, [2]),
    ],
)
def test_configurations_of_families(config, routed):
    found = layers_with_router({"num_hidden_layers": 6} | config)
    assert routed == (None if found is None else [i for i, has in enumerate(found) if has])


# Parts of a prompt, and responses without experts

IDS = (PROMPT + ANSWER)[:-1]
BY_ID = np.array([[[token % 16, (token + 1) % 16]] * 3 for token in IDS])


def assert_by_token(output, positions):
    """Assert that every token has the experts encoded by its id, at its position."""
    (part,) = output.rglob("part-*.parquet")
    table = pq.read_table(part).to_pandas()
    assert sorted(set(table["position"])) == list(positions)
    for _, row in table.iterrows():
        assert row["token_id"] == (PROMPT + ANSWER)[row["position"]]
        assert list(row["experts"]) == [row["token_id"] % 16, (row["token_id"] + 1) % 16]


@pytest.mark.parametrize("start", [0, 1, 7, 11])
@pytest.mark.parametrize("batch", [False, True])
def test_rows_are_those_of_the_last_tokens(run, tmp_path, start, batch):
    content = response(text_of(BY_ID[start:]), PROMPT, ANSWER)
    if batch:
        content = {"custom_id": "a", "response": {"status_code": 200, "body": content}}
    found = imported(run, write(tmp_path / "t.jsonl", content), tmp_path / "out")
    assert_by_token(tmp_path / "out", range(start, 16))
    said = any(
        note.startswith(f"{start} tokens of prompts have no experts") for note in found.notes
    )
    assert said == (start > 0)


def test_lists_of_the_answer_alone(run, tmp_path):
    """As vLLM 0.21 writes them: rows of the answer, with its last token or without."""
    rows = np.array([[[t % 16, (t + 1) % 16]] * 3 for t in ANSWER])
    for number in (4, 5):
        file = write(tmp_path / f"{number}.jsonl", response(rows[:number].tolist(), PROMPT, ANSWER))
        found = imported(run, file, tmp_path / f"out{number}")
        assert_by_token(tmp_path / f"out{number}", range(12, 12 + number))
        assert any("rows are those of the answer alone" in note for note in found.notes)


def test_usage_tells_lengths_where_ids_do_not(run, tmp_path):
    usage = {"prompt_tokens": 12, "completion_tokens": 5}
    content = response(text_of(BY_ID[7:]), usage=usage)
    found = imported(run, write(tmp_path / "t.jsonl", content), tmp_path / "out")
    (part,) = (tmp_path / "out").rglob("part-*.parquet")
    assert sorted(set(pq.read_table(part)["position"].to_pylist())) == list(range(7, 16))
    assert any(note.startswith("7 tokens of prompts") for note in found.notes)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (response(text_of(np.concatenate([BY_ID, BY_ID])), PROMPT, ANSWER), "32 rows"),
        (response(text_of(BY_ID[:17]), PROMPT, ANSWER[:-1]), "16 rows of experts do not fit 15"),
        (response(text_of(BY_ID[:3]), PROMPT, ANSWER), "3 rows of experts do not fit 5"),
        (response(text_of(BY_ID[:3]), PROMPT), "3 rows of experts do not fit 12"),
        (response(BY_ID.tolist() * 2, PROMPT, ANSWER), "32 rows"),
        (
            response(BY_ID[12:].tolist(), PROMPT, ANSWER, prompt_routed_experts=BY_ID[:3].tolist()),
            "3 rows of experts do not fit 12 tokens of its prompt",
        ),
        (
            response(text_of(BY_ID), PROMPT, ANSWER, usage={"prompt_tokens": 11}),
            "its prompt has 12 token ids, but usage says 11 tokens",
        ),
    ],
)
def test_lengths_that_nothing_explains_are_refused(run, tmp_path, content, sentence):
    assert sentence in refused(run, write(tmp_path / "t.jsonl", content), tmp_path / "out")


def test_a_preempted_request_is_left_out_and_named(run, tmp_path):
    whole = response(text_of(BY_ID), PROMPT, ANSWER)
    answers = [whole, response(None, PROMPT, ANSWER), whole]
    lines = [
        {"id": f"b{i}", "custom_id": f"r-{i}", "response": {"body": one}, "error": None}
        for i, one in enumerate(answers)
    ]
    lines.insert(0, {"custom_id": "bad", "response": None, "error": {"message": "x"}})
    for file in (write(tmp_path / "a.jsonl", *answers), write(tmp_path / "b.jsonl", *lines)):
        found = imported(run, file, tmp_path / f"out-{file.stem}")
        assert (found.documents, found.tokens) == (2, 32)
        name = "Response 2" if file.stem == "a" else "(custom_id 'r-1')"
        assert any(name in note and "left out" in note for note in found.notes)
    assert any("custom_id 'bad'" in note for note in found.notes)
    # With nothing else the reader learns how to record them.
    error = refused(run, write(tmp_path / "c.jsonl", answers[1]), tmp_path / "none")
    assert "serve with --enable-return-routed-experts" in error


def test_prompts_of_one_request_are_documents_and_answers_are_none(run, tmp_path):
    def choice(index, prompt):
        ids = (prompt + ANSWER)[:-1]
        text = text_of([[[t % 16, (t + 1) % 16]] * 3 for t in ids])
        return {
            "index": index,
            "prompt_token_ids": prompt,
            "token_ids": ANSWER,
            "routed_experts": text,
        }

    choices = [choice(0, PROMPT), choice(1, PROMPT), choice(2, PROMPT[:6]), choice(3, PROMPT[:6])]
    file = write(tmp_path / "t.jsonl", {"choices": choices}, {"choices": choices[:1]})
    found = imported(run, file, tmp_path / "out")
    assert (found.documents, found.tokens) == (3, 16 + 16 + 10 + 10 + 16)


# Ranks, chunks and mixed passes of SGLang

E8 = chosen(8, 2, seed=5)


def prefill(rank=0, number=1):
    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    return record(number, ids, [0, 1, 2, 3, 4, 0, 1, 2], [5, 3], 1, E8, rank)


def test_ranks_with_the_same_tokens_count_once(run, tmp_path):
    folder = tmp_path / "t"
    for rank in range(4):
        save_records(folder / f"expert_distribution_recorder_1.{rank}_{rank}.pt", prefill(rank))
    found = imported(run, folder, tmp_path / "out")
    assert (found.documents, found.tokens, found.layers) == (2, 8, [1, 2])
    assert any("rank 3 are those of rank 0" in note for note in found.notes)


def test_ranks_with_other_tokens_count_all(run, tmp_path):
    other = prefill(1) | {"input_ids": list(range(20, 28))}
    save_records(tmp_path / "t" / "r_0.pt", prefill())
    save_records(tmp_path / "t" / "r_1.pt", other)
    found = imported(run, tmp_path / "t", tmp_path / "out")
    assert (found.documents, found.tokens) == (4, 16)


def test_ranks_may_name_other_copies_of_an_expert(run, tmp_path):
    """Every rank prefers its own copies: choices are compared by logical experts."""
    table = torch.arange(16).repeat(3, 2)
    other = prefill(1)
    slots = other["topk_ids_of_layer"]
    other["topk_ids_of_layer"] = torch.where(slots < 0, slots, slots + 16)
    for rank, of_rank in enumerate((prefill(), other)):
        save_records(tmp_path / "t" / f"r_{rank}.pt", of_rank, last_physical_to_logical_map=table)
    found = imported(run, tmp_path / "t", tmp_path / "out")
    assert (found.documents, found.tokens) == (2, 8)
    assert not any("its experts differ from those of rank" in note for note in found.notes)


def test_a_prompt_in_chunks_is_one_document(run, tmp_path):
    """The scheduler ends a pass with the chunk that fills it, and starts the next with the rest."""
    first = record(1, [1, 2, 3, 4, 5], [0, 1, 0, 1, 2], [2, 3], 1, E8[:5])
    decode = record(2, [9], [2], None, 2, E8[:1])
    rest = record(3, [6, 7, 8], [3, 4, 0], [2, 1], 1, E8[5:])
    file = save_records(tmp_path / "t.pt", first, decode, rest)
    found = imported(run, file, tmp_path / "out")
    assert (found.documents, found.tokens) == (3, 8)
    assert any(note.startswith("1 chunks are joined") for note in found.notes)
    (part,) = (tmp_path / "out").rglob("part-*.parquet")
    table = pq.read_table(part).to_pandas()
    of_document = table[(table["doc_id"] == 1) & (table["layer"] == 1)]
    assert of_document["token_id"].tolist() == [3, 4, 5, 6, 7]
    assert of_document["position"].tolist() == [0, 1, 2, 3, 4]


def test_decoding_passes_are_steps_whose_distinct_experts_are_counted(run, tmp_path):
    """Also where several ranks recorded one pass; what a prompt reads is no step."""
    sizes = (3, 1, 8, 3)
    experts = [chosen(rows, 2, seed=rows) for rows in sizes]
    for rank in (0, 1):
        passes = [
            record(2 + n, [7] * rows, [*range(9, 9 + rows)], None, 2, experts[n], rank)
            for n, rows in enumerate(sizes)
        ]
        save_records(tmp_path / "t" / f"r_{rank}.pt", passes[0], prefill(rank), *passes[1:])
    output = tmp_path / "out"
    found = imported(run, tmp_path / "t", output)
    assert (found.documents, found.tokens) == (2, 8)
    recounted = [len(set(of_step[:, layer].flat)) for of_step in experts for layer in (0, 1)]
    (file,) = output.glob("results_*.json")
    summary = json.loads(file.read_text())["config"]["bh"]["summary"]
    assert summary["steps_by_rows"] == {"1": 1, "3": 2, "8": 1}
    assert summary["distinct_experts"] == pytest.approx(np.mean(recounted))
    assert summary["layer_distinct_experts"] == pytest.approx(
        [np.mean(recounted[layer::2]) for layer in (0, 1)]
    )
    (row,) = load_experiments([output]).frame.to_dict(orient="records")
    assert row["distinct_experts"] == pytest.approx(np.mean(recounted))
    assert pd.isna(row["decode_batch"])


@pytest.mark.parametrize("decoded", [0, 2])
def test_the_command_says_once_what_steps_read(run, tmp_path, decoded):
    passes = [record(2 + n, [7], [9], None, 2, E8[n : n + 1]) for n in range(decoded)]
    file = save_records(tmp_path / "t.pt", prefill(), *passes)
    _, out, _ = run("import-routing", file, "--output-dir", tmp_path / "out")
    said = (
        "2.00 distinct experts per layer and step, over 2 decoding passes of 1 to 1 rows."
        if decoded
        else "Distinct experts are not counted: the trace does not say which tokens were decoded "
        "together."
    )
    assert out.splitlines().count(said) == 1
    (row,) = load_experiments([tmp_path / "out"]).frame.to_dict(orient="records")
    assert pd.isna(row["distinct_experts"]) == (not decoded)


def test_a_prompt_from_the_cache_is_noted(run, tmp_path):
    file = save_records(tmp_path / "t.pt", record(1, [6, 7], [3, 4], [2], 1, E8[:2]))
    found = imported(run, file, tmp_path / "out")
    assert (found.documents, found.tokens) == (1, 2)
    assert any("a prompt begins at position 3" in note for note in found.notes)


@pytest.mark.parametrize("lengths", [[4, 1, 1], [4]])
def test_decoded_tokens_of_a_mixed_pass_are_no_documents(run, tmp_path, lengths):
    mixed = record(2, [1, 2, 3, 4, 8, 9], [0, 1, 2, 3, 5, 3], lengths, 3, E8[:6])
    found = imported(run, save_records(tmp_path / "t.pt", mixed), tmp_path / "out")
    assert (found.documents, found.tokens) == (1, 4)
    assert any(note.startswith("2 decoded tokens of mixed passes") for note in found.notes)


@pytest.mark.parametrize("mode", [5, 6, 9])
def test_passes_of_other_modes_are_left_out(run, tmp_path, mode):
    """A draft model's passes have sequences too, but do not belong to the model."""
    draft = prefill(number=2) | {"forward_mode": mode}
    found = imported(run, save_records(tmp_path / "t.pt", prefill(), draft), tmp_path / "out")
    assert (found.documents, found.tokens) == (2, 8)
    assert any(f"forward_mode {mode}" in note for note in found.notes)


# Ranks and stages of Megatron

A, B, C = chosen(3, 2, seed=1), chosen(3, 2, seed=2), chosen(3, 2, seed=3)


def of_ranks(folder, ranks):
    """Write {rank: {layer: experts}} of one step."""
    folder.mkdir()
    for rank, layers in ranks.items():
        lines = [line(0, layer, experts, rank) for layer, experts in layers.items()]
        file = folder / f"router_trace_rank{rank}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


@pytest.mark.parametrize("cat", [False, True])
def test_stages_of_a_pipeline_are_joined(run, tmp_path, cat):
    first, second = ({n: e[:, i] for i, n in enumerate(at)} for e, at in ((A, (1, 2)), (B, (3, 4))))
    source = of_ranks(tmp_path / "t", {0: first, 1: second, 2: {}})
    if cat:  # what ranks wrote may lie in one file
        lines = "".join(file.read_text() for file in sorted(source.iterdir()))
        source = tmp_path / "all.jsonl"
        source.write_text(lines)
    found = imported(run, source, tmp_path / "out")
    assert (found.documents, found.tokens, found.layers) == (1, 3, [1, 2, 3, 4])
    assert any("joined: layers 1 to 2 and layers 3 to 4" in note for note in found.notes)
    assert cat or any("it has no lines" in note for note in found.notes)


def test_ranks_of_a_stage_pair_in_their_order(run, tmp_path):
    ranks = {0: {0: A[:, 0]}, 1: {0: B[:, 0]}, 2: {1: A[:, 1]}, 3: {1: B[:, 1]}}
    found = imported(run, of_ranks(tmp_path / "t", ranks), tmp_path / "out")
    assert (found.documents, found.tokens, found.layers) == (2, 6, [0, 1])
    assert any("ranks 0 to 1 have the same layers" in note for note in found.notes)


def test_ranks_of_megatron_with_the_same_choices_count_once(run, tmp_path):
    layers = {0: A[:, 0], 1: A[:, 1]}
    found = imported(run, of_ranks(tmp_path / "t", {0: layers, 1: layers}), tmp_path / "out")
    assert (found.documents, found.tokens) == (1, 3)
    assert any("3 tokens of rank 1 have the same choices as rank 0" in note for note in found.notes)


def test_stages_that_do_not_fit_are_refused(run, tmp_path):
    shared = of_ranks(tmp_path / "a", {0: {0: A[:, 0], 1: A[:, 1]}, 1: {1: B[:, 1], 2: B[:, 0]}})
    assert "share layers, layers 0 to 1 and" in refused(run, shared, tmp_path / "out")
    missing = of_ranks(tmp_path / "b", {0: {0: A[:, 0]}, 1: {0: B[:, 0]}, 2: {1: A[:, 1]}})
    assert "different numbers of ranks" in refused(run, missing, tmp_path / "out")
    other = of_ranks(tmp_path / "c", {0: {0: A[:, 0]}, 1: {1: A[:2, 1]}})
    assert "differ in their number of tokens" in refused(run, other, tmp_path / "out")


def test_what_lies_beside_a_trace_is_no_trace(run, tmp_path):
    folder = of_ranks(tmp_path / "t", {0: {0: A[:, 0]}})
    weights = folder / "router_state_rank0.pt"
    torch.save({0: {"weight": torch.zeros(4, 2), "expert_bias": None}}, weights)
    found = imported(run, folder, tmp_path / "out")
    assert found.tokens == 3
    assert any("router_state_rank0.pt" in note for note in found.notes)
    assert "Megatron writes it beside one" in refused(run, weights, tmp_path / "none")
    weights.rename(tmp_path / "w.pt")
    assert "router weights" in refused(run, tmp_path / "w.pt", tmp_path / "none")


# Tables


@pytest.mark.parametrize(
    "names", [["007", "7"], ["NA", "US"], ["1.0", "1"], ["nan", "null", "None"], ["True", "1e3"]]
)
def test_names_of_documents_stay_text(run, tmp_path, names):
    rows = "".join(f"{name},0,0,{i}\n" for i, name in enumerate(names))
    (tmp_path / "t.csv").write_text("document,token,layer,expert\n" + rows)
    found = imported(run, tmp_path / "t.csv", tmp_path / "out")
    assert (found.documents, found.tokens) == (len(names), len(names))


def test_a_file_given_twice_is_read_once(run, tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "t.csv").write_text("document,token,layer,expert\na,0,0,1\n")
    found = imported(run, [folder, folder / "t.csv"], tmp_path / "out")
    assert found.documents == 1
    assert any("given twice" in note for note in found.notes)


# Sizes


def far_slot(file):
    rows = "".join(f"d,{token},0,0\n" for token in range(100_000))
    rows += "".join(f"d,0,0,{expert}\n" for expert in range(1, 4096))
    file.write_text("document,token,layer,expert\n" + rows)
    return file


def many_tokens(file):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1), np.uint8))
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header | {"shape": (2**40, 3, 0)})
    return file


def stretched(file):
    one = torch.zeros(1, dtype=torch.int32)
    experts = {"topk_ids_of_layer": one.expand(3, 2**30, 8), "input_ids": one.expand(2**30)}
    return save_records(file, prefill() | experts)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("t.csv", far_slot, "most of the table would be empty"),
        ("t.npy", many_tokens, "must be an integer array"),
        ("t.pt", stretched, "in a file of"),
    ],
)
def test_sizes_are_checked_against_what_the_file_holds(run, tmp_path, name, make, sentence):
    file = make(tmp_path / name)
    refused(run, tmp_path / name, tmp_path / "warm")  # imports are not what is measured
    tracemalloc.start()
    error = refused(run, file, tmp_path / "out")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sentence in error
    assert most < 100e6


def test_a_small_tensor_may_be_stretched(run, tmp_path):
    table = torch.arange(16).expand(3, 16)
    file = save_records(tmp_path / "t.pt", prefill(), last_physical_to_logical_map=table)
    assert imported(run, file, tmp_path / "out").tokens == 8


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda t: t.to(torch.bfloat16), "bfloat16"),
        (lambda t: t.float().requires_grad_(), "float"),
        (lambda t: torch.nn.Parameter(t.float()), "parameter"),
        (lambda t: t.to_sparse(), "sparse tensor"),
        (lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.qint32), "qtensor"),
        (lambda t: t > 0, "bool"),
        (lambda t: t.to("meta"), "meta tensor"),
        (lambda t: t[0], "[8, 8]"),
        (lambda t: [[[1, 2]], [[1]]], "1 to 2 elements"),
        (lambda t: t.numpy().astype(str).tolist(), "must be integers"),
    ],
)
def test_tensors_of_other_kinds_are_refused(run, tmp_path, make, kind):
    good = prefill()
    bad = good | {"topk_ids_of_layer": make(good["topk_ids_of_layer"])}
    error = refused(run, save_records(tmp_path / "t.pt", good, bad), tmp_path / "out")
    assert "Record 2" in error
    assert kind in error


def test_fields_that_are_not_read_may_be_anything(run, tmp_path):
    more = {
        "misc_objects": [torch.eye(2).to_sparse()],
        "global_physical_count": torch.ones(2).half(),
    }
    found = imported(run, save_records(tmp_path / "t.pt", prefill() | more), tmp_path / "out")
    assert found.tokens == 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.uint16])
def test_integers_of_every_width(run, tmp_path, dtype):
    good = prefill()
    more = {"input_ids": torch.tensor(good["input_ids"]).to(dtype)}
    if dtype in (torch.int16, torch.int64):
        more["topk_ids_of_layer"] = good["topk_ids_of_layer"].to(dtype).transpose(0, 1).contiguous()
        more["topk_ids_of_layer"] = more["topk_ids_of_layer"].transpose(0, 1)  # other strides
    found = imported(run, save_records(tmp_path / "t.pt", good | more), tmp_path / "out")
    whole = imported(run, save_records(tmp_path / "u.pt", good), tmp_path / "out2")
    assert (found.tokens, found.usage) == (8, whole.usage)


def test_the_first_of_several_answers_may_be_missing(run, tmp_path):
    content = response(text_of(BY_ID), PROMPT, ANSWER)
    (choice,) = content["choices"]
    content["choices"] = [choice | {"index": 1}, choice | {"index": 0, "routed_experts": None}]
    found = imported(run, write(tmp_path / "t.jsonl", content, content), tmp_path / "out")
    assert (found.documents, found.tokens) == (2, 32)


def test_a_pass_that_was_recorded_twice_counts_once(run, tmp_path):
    file = save_records(tmp_path / "t.pt", prefill(), prefill(number=2), prefill())
    found = imported(run, file, tmp_path / "out")
    assert (found.documents, found.tokens) == (4, 16)
    assert any("the same pass was recorded before" in note for note in found.notes)


def test_bytes_of_a_tensor_that_changed_are_noticed(run, tmp_path):
    ids = torch.tensor([77, 78, 79, 80, 81, 82, 83, 84])
    file = save_records(tmp_path / "t.pt", prefill() | {"input_ids": ids})
    content = file.read_bytes()
    assert content.count(bytes([77, *[0] * 7, 78])) == 1
    file.write_bytes(content.replace(bytes([77, *[0] * 7, 78]), bytes([66, *[0] * 7, 78])))
    error = refused(run, file, tmp_path / "out")
    assert "input_ids must be a list of integers (the numbers of a tensor cannot be read" in error
