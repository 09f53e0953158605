"""The command tune --preview, run in this process through its own entry point."""

from __future__ import annotations

import json


def test_it_prints_a_row_for_every_configuration(run, text, tmp_path):
    code, out, _ = run(
        *("tune", "--preview", "--model", "tiny-olmoe", "--text-file", text, "--tokens", 512),
        *("--rules", "topk,bh,top_p", "--alphas", "0.3,0.6", "--max-k", "8,16"),
        *("--output", tmp_path / "grid.json"),
    )
    assert code == 0
    content = json.loads((tmp_path / "grid.json").read_text())
    assert content["tokens"] == 512
    rows = content["rows"]
    assert [row["config"]["rule"] for row in rows] == ["topk"] * 2 + ["bh"] * 4 + ["top_p"] * 4
    assert rows[0]["mean_experts"] == 8
    assert rows[0]["overlap"] == 1
    assert rows[2]["mean_experts"] < rows[3]["mean_experts"] < rows[5]["mean_experts"]
    for row in rows:
        assert f"{row['mean_experts']:.2f}" in out
    assert "The model ran unchanged" in out
    assert "distinct" not in out
    assert {row["distinct_experts"] for row in rows} == {None}


def test_with_a_decode_batch_it_shows_the_distinct_experts_of_a_step(run, text, tmp_path):
    code, out, _ = run(
        *("tune", "--preview", "--model", "tiny-olmoe", "--text-file", text, "--tokens", 256),
        *("--rules", "topk,oea", "--max-k", "1,8", "--decode-batch", 4),
        *("--output", tmp_path / "grid.json"),
    )
    assert code == 0
    rows = json.loads((tmp_path / "grid.json").read_text())["rows"]
    one, native, _, shared = (row["distinct_experts"] for row in rows)
    assert [row["config"]["rule"] for row in rows] == ["topk", "topk", "oea", "oea"]
    assert 1 < one <= 4 < shared <= 8 < native <= 32
    assert all(f"{row['distinct_experts']:.1f}" in out for row in rows)
    assert "Distinct experts are of a layer and a step of 4 rows." in out
