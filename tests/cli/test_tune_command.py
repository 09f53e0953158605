"""``lm-eval-bh tune`` finds a policy on a text file, writes what hf-bh runs, and draws it."""

from __future__ import annotations

import json

import pytest

from lm_eval_bh import Policy
from lm_eval_bh.cli.tune_command import share_of
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.resources import shipped

SIZES = ("--tokens", "2048", "--window", "64", "--tokens-per-document", "40", "--device", "cpu")


@pytest.fixture
def long_text(tmp_path):
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
    parts = [part for line in lines for part in json.loads(line)["page"].split("\n")]
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(part for part in parts if len(part) > 150)[:30_000])
    return path


def test_it_writes_a_policy_a_page_and_a_figure(run, tmp_path, long_text):
    folder = tmp_path / "tuned"
    arguments = ("tune", "--model", "tiny-olmoe", "--preset", "winner", "--text-file", long_text)
    goal = ("--target-experts", "4")
    code, out, err = run(*arguments, *goal, "--output-dir", folder, *SIZES)
    assert code == 0, err
    policy = Policy.load(folder / "policy.safetensors")
    assert (policy.config.rule, policy.config.statistic) == ("min_w", "benefit")
    assert "top-8" in out
    page = (folder / "tune.html").read_text(encoding="utf-8")
    for wanted in ("min_w benefit mass 0.2", "topk per layer", "unseen documents of long.txt"):
        assert wanted in page
    assert (folder / "tune.png").read_bytes().startswith(b"\x89PNG")

    code, _, err = run(*arguments, "--target-experts", "5", "--output-dir", folder, *SIZES)
    assert code == 1
    assert "other settings" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "one goal"),
        (("--target-experts", "4", "--max-loss", "1%"), "one goal"),
        (("--max-loss", "much"), "must be a share like 1% or 0.01: found 'much'"),
        (("--max-loss", "150%"), "must be a share"),
        (("--target-experts", "9"), "between 1 and 8"),
        (("--target-experts", "4", "--preset", "x"), "'x' is not one of 'search', 'winner'"),
        (("--target-experts", "4", "--device", "cup"), "cup"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    run, tmp_path, long_text, arguments, sentence
):
    folder = tmp_path / "tuned"
    given = ("tune", "--model", "tiny-olmoe", "--text-file", long_text, "--output-dir", folder)
    code, _, err = run(*given, *SIZES, *arguments)
    assert code == (2 if "--help" in err else 1)
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "policy.safetensors").exists()


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0.02", 0.02)])
def test_a_loss_is_a_share(text, share):
    assert share_of(text) == pytest.approx(share)
    with pytest.raises(ParameterError):
        share_of("-" + text)
