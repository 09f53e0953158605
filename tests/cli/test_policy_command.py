"""``lm-eval-bh policy`` writes what hf-bh runs, and shows it."""

from __future__ import annotations

from lm_eval_bh import Policy

ARGUMENTS = "rule=topk,k_per_layer=5-3-3-5"
WRITE = (
    "policy",
    "--model",
    "tiny-olmoe",
    "--model-args",
    ARGUMENTS,
    "--device",
    "cpu",
    "--output",
)


def test_it_writes_and_shows(run, tmp_path):
    path = tmp_path / "p.safetensors"
    code, out, err = run(*WRITE, path)
    assert code == 0, err
    assert str(path) in out
    assert Policy.load(path).config.k_per_layer == "5-3-3-5"
    code, out, _ = run("policy", "show", path)
    assert code == 0
    assert "k_per_layer" in out
    assert "tiny-olmoe" in out

    before = path.read_bytes()
    code, _, err = run(*WRITE, path)
    assert code == 1
    assert "use --overwrite" in err
    assert path.read_bytes() == before


def test_what_is_missing_is_said(run, tmp_path):
    assert "--output and --model or --model-args" in run("policy")[2]
    assert "There is no policy" in run("policy", "show", tmp_path / "none")[2]
