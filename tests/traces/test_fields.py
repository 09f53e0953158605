"""Every field of every trace may be missing, null, of another length or of another type.

An import then ends with one message, or reads the same as before, or notes what it left out.
"""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from written_traces import chosen, imported, line, record, response, text_of

PROMPT, ANSWER = [1, 2, 3, 4], [5, 6, 7]


def vllm():
    usage = {"prompt_tokens": 4, "completion_tokens": 3}
    return [response(text_of(chosen(6, 2)), PROMPT, ANSWER, usage=usage) for _ in range(2)]


def vllm_lists():
    rows = chosen(7, 2).tolist()
    return [response(rows[4:], PROMPT, ANSWER, prompt_routed_experts=rows[:4]) for _ in range(2)]


def vllm_batch():
    return [
        {"custom_id": f"r{i}", "response": {"status_code": 200, "body": body}, "error": None}
        for i, body in enumerate(vllm())
    ]


def sglang():
    first = record(1, [1, 2, 3, 4], [0, 1, 2, 0], [3, 1], 1, chosen(4, 2))
    mixed = record(2, [5, 6, 7], [0, 1, 1], [2, 1], 3, chosen(3, 2, seed=1))
    table = torch.arange(16).repeat(3, 1)
    return {"records": [first, mixed], "last_physical_to_logical_map": table}


def megatron():
    return [line(step, layer, chosen(3, 1)[:, 0]) for step in (0, 1) for layer in (0, 1)]


def table():
    return [
        {"document": "a", "token": t, "layer": n, "expert": e, "weight": 0.5, "token_id": 9}
        for t in range(2)
        for n in range(2)
        for e in range(2)
    ]


def as_lines(path, content):
    path.write_text("".join(json.dumps(one) + "\n" for one in content))


def as_csv(path, content):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, sorted({name for row in content for name in row}))
        writer.writeheader()
        writer.writerows(content)


TRACES = {
    "vllm": (vllm, "t.jsonl", as_lines),
    "vllm_lists": (vllm_lists, "t.jsonl", as_lines),
    "vllm_batch": (vllm_batch, "t.jsonl", as_lines),
    "sglang": (sglang, "t_0.pt", lambda path, content: torch.save(content, path)),
    "megatron": (megatron, "router_trace_rank0.jsonl", as_lines),
    "csv": (table, "t.csv", as_csv),
}


def fields(content, place=()):
    """Yield the places of all fields, of the last element of each list."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield (*place, name)
            yield from fields(value, (*place, name))
    elif isinstance(content, list) and content and isinstance(content[-1], dict):
        yield from fields(content[-1], (*place, len(content) - 1))


def longer(value):
    if isinstance(value, list):
        return value + value[-1:]
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value[-1:]])
    return None if isinstance(value, (int, float, dict, type(None))) else value + value


def shorter(value):
    return value[:-1] if isinstance(value, (list, str, torch.Tensor)) and len(value) else None


def nested(value):
    return [value]


MISSING = object()
CHANGES = {
    "missing": lambda value: MISSING,
    "null": lambda value: None,
    "longer": longer,
    "shorter": shorter,
    "text": lambda value: "text",
    "number": lambda value: 1.5,
    "true": lambda value: True,
    "negative": lambda value: -7,
    "huge": lambda value: 10**30,
    "object": lambda value: {"x": 1},
    "empty": lambda value: [],
    "nested": nested,
}
NOBODY_CAN_TELL = {(("records",), "shorter")}  # the passes that a record ends with
PLACES = [(name, place) for name, (make, _, _) in TRACES.items() for place in fields(make())]


@pytest.mark.parametrize(("name", "place"), PLACES, ids=lambda v: v if isinstance(v, str) else None)
def test_every_field(run, tmp_path, name, place):
    make, file, save = TRACES[name]
    (tmp_path / "whole").mkdir()
    save(tmp_path / "whole" / file, make())
    whole = imported(run, tmp_path / "whole" / file, tmp_path / "out")
    for change, changed in CHANGES.items():
        content = make()
        home = content
        for step in place[:-1]:
            home = home[step]
        value = changed(copy.copy(home[place[-1]]))
        if value is MISSING:
            del home[place[-1]]
        else:
            home[place[-1]] = value
        source, output = tmp_path / change / file, tmp_path / f"out-{change}"
        source.parent.mkdir()
        save(source, content)
        options = ["--output-dir", output]
        code, out, err = run("import-routing", source, *options)
        if code:
            assert (code, out) == (1, ""), change
            assert err.startswith("lm-eval-bh: error: "), change
            assert err.count("\n") == 1, change
            assert not output.exists()
            continue
        if (place, change) in NOBODY_CAN_TELL:
            continue
        found = imported(run, source, output, "--overwrite")
        same = (found.tokens, found.documents, found.layers, found.usage) == (
            whole.tokens,
            whole.documents,
            whole.layers,
            whole.usage,
        )
        assert same or set(found.notes) - set(whole.notes), (change, found)
