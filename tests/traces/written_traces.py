"""Small traces as engines write them, and the results of importing them."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Imported:
    documents: int
    tokens: int
    layers: list[int]
    histograms: list[dict[int, int]]  # of each layer: experts of a token -> tokens
    usage: list[dict[int, int]]  # of each layer: expert -> tokens
    rule: str
    notes: list[str]


def imported(run, sources, output, *options):
    """Import traces and return the results file; its notes equal those on the terminal."""
    sources = sources if isinstance(sources, list) else [sources]
    code, _, err = run("import-routing", *sources, "--output-dir", output, *options)
    assert code == 0, err
    (file,) = output.glob("results_*.json")
    content = json.loads(file.read_text())
    info = content["config"]["bh"]
    assert err.splitlines() == [f"note: {note}" for note in info["notes"]]
    (task,) = info["summary"]["tasks"].values()
    return Imported(
        content["n-samples"]["imported"]["effective"],
        task["tokens"],
        [layer["layer"] for layer in task["layers"]],
        [{k: n for k, n in enumerate(layer["histogram"]) if n} for layer in task["layers"]],
        [{k: n for k, n in enumerate(layer["usage"]) if n} for layer in task["layers"]],
        info["rule"]["label"],
        info["notes"],
    )


def refused(run, sources, output, *options):
    """Return the one sentence with which an import ends."""
    sources = sources if isinstance(sources, list) else [sources]
    code, out, err = run("import-routing", *sources, "--output-dir", output, *options)
    assert (code, out) == (1, "")
    assert err.startswith("lm-eval-bh: error: ")
    assert err.count("\n") == 1
    assert not output.exists()
    return err


def chosen(tokens, layers, k=2, experts=16, seed=0):
    """Return experts [tokens, layers, k], the numbers of a top-k: no token's are zeros."""
    rng = np.random.default_rng(seed)
    every = np.tile(np.arange(experts), (tokens, layers, 1))
    return rng.permuted(every, axis=-1)[..., :k]


def text_of(array, dtype=np.uint8):
    stream = io.BytesIO()
    np.save(stream, np.asarray(array).astype(dtype))
    return base64.b64encode(stream.getvalue()).decode()


def response(experts, prompt=None, answer=None, **more):
    """Return a response of vLLM, of its later releases if the experts are text."""
    choice = {"index": 0, "text": "x", "token_ids": answer, "routed_experts": experts}
    return {"id": "cmpl-1", "prompt_token_ids": prompt, "choices": [choice]} | more


def write(path, *responses):
    path.write_text("\n".join(map(json.dumps, responses)) + "\n")
    return path


def record(number, ids, positions, lengths, mode, experts, rank=0):
    """Return a record of SGLang; experts [tokens, layers, k], after a dense layer."""
    slots = torch.full((experts.shape[1] + 1, len(ids), 8), -1, dtype=torch.int32)
    slots[1:, :, : experts.shape[2]] = torch.from_numpy(experts.swapaxes(0, 1).astype(np.int32))
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": ids,
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": slots,
        "misc_objects": [],
        "global_physical_count": torch.zeros(experts.shape[1] + 1, 16, dtype=torch.int32),
    }


def save_records(path, *records, layers=3, **more):
    path.parent.mkdir(exist_ok=True)
    table = torch.arange(16).repeat(layers, 1)
    torch.save({"records": list(records), "last_physical_to_logical_map": table} | more, path)
    return path


def line(step, layer, experts, rank=0, **more):
    """Return a line of Megatron's trace; experts [tokens, topk]."""
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": len(experts),
        "topk": len(experts[0]) if len(experts) else 2,
        "top_indices": np.asarray(experts).tolist(),
    } | more
