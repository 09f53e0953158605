"""The command calibrate, run in this process through its own entry point."""

from __future__ import annotations

import json

import numpy as np

from lm_eval_bh import NullModel, RoutingConfig
from lm_eval_bh.resources import shipped
from lm_eval_bh.routing.tables.null_match import mismatch


def test_calibrate_fits_checks_and_writes_a_null_model(run, tmp_path):
    text = tmp_path / "text.txt"
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text().splitlines()
    pages = [json.loads(line)["page"] for line in lines]
    text.write_text("\n\n".join(page.replace("\n", " ") for page in pages))
    output = tmp_path / "null.safetensors"
    code, out, _ = run(
        "calibrate",
        "--model",
        "tiny-olmoe",
        "--text-file",
        text,
        "--tokens",
        2048,
        "--window",
        128,
        "--output",
        output,
    )
    assert code == 0
    null = NullModel.load(output)
    assert (null.num_layers, null.header.num_experts, null.header.tokens) == (4, 64, 2048)
    assert null.header.model == "tiny-olmoe"
    assert null.header.text == "text.txt"
    assert (
        null.header.fingerprint
        == NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors").header.fingerprint
    )
    assert "KS distance" in out
    assert "held-out tokens" in out


def test_calibrate_measures_contributions_and_draws_its_health(run, text, tmp_path):
    output, figure = tmp_path / "null.safetensors", tmp_path / "health.png"
    code, out, _ = run(
        *("calibrate", "--model", "tiny-olmoe", "--text-file", text, "--tokens", 1024),
        *("--window", 128, "--statistic", "contribution", "--null-scope", "expert", "--trim", 2),
        *("--output", output, "--figure", figure),
    )
    assert code == 0
    null = NullModel.load(output)
    assert (null.header.statistic, null.header.null_scope) == ("contribution", "expert")
    assert null.header.trim == 2
    assert [layer["layer"] for layer in null.header.health] == [0, 1, 2, 3]
    assert all(0 < layer["ks_distance"] < 1 for layer in null.header.health)
    assert null.norms.shape == (4, 64)
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(figure) in out.replace("\n", "")


def test_calibrate_on_a_text_that_leaves_nothing_to_check_on(run, text, tmp_path):
    output = tmp_path / "null.safetensors"
    code, out, _ = run(
        "calibrate", "--model", "tiny-olmoe", "--text-file", text, "--output", output
    )
    assert code == 0
    assert "so no check was possible" in " ".join(out.split())
    assert NullModel.load(output).header.health is None


def test_calibrate_measures_the_tables_of_methods(run, text, tmp_path):
    output = tmp_path / "null.safetensors"
    calibrate = "calibrate", "--model", "tiny-olmoe", "--text-file", text, "--output", output
    code, _, err = run(*calibrate, "--tables", "ratio")
    assert (code, output.exists()) == (1, False)
    assert "no table 'ratio' (did you mean 'ratios'?)" in " ".join(err.split())
    few = "--tokens", 1024, "--window", 128
    assert run(*calibrate, *few, "--statistic", "weight", "--tables", "slot_weights,ratios")[0] == 0
    null = NullModel.load(output)
    assert null.header.tables == ["ratios", "slot_weights"]
    assert all(np.isfinite(null.measured[name]).all() for name in null.header.tables)
    naee = RoutingConfig(rule="naee")
    assert mismatch(null.header, naee.null_kind) is None
