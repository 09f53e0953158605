"""``lm-eval-bh tune`` finds a policy on a text file, writes what hf-bh runs, and draws it."""

from __future__ import annotations

import pytest

from lm_eval_bh import Policy
from lm_eval_bh.analysis.show.tuning_page import findings_of
from lm_eval_bh.cli.options import share_of
from lm_eval_bh.cli.tuned_tasks import _row
from lm_eval_bh.errors import ParameterError

SIZES = ("--tokens", "2048", "--window", "64", "--tokens-per-document", "40", "--device", "cpu")


def test_it_writes_a_policy_a_page_and_a_figure(run, tmp_path, long_text):
    folder = tmp_path / "tuned"
    arguments = ("tune", "--model", "tiny-olmoe", "--preset", "winner", "--text-file", long_text)
    goal = ("--target-experts", "4")
    tasks = ("--tasks", "bh_demo_hellaswag", "--limit", "4", "--accuracy-margin", "0.2")
    code, out, err = run(*arguments, *goal, "--output-dir", folder, *SIZES, *tasks)
    assert code == 0, err
    policy = Policy.load(folder / "policy.safetensors")
    assert (policy.config.rule, policy.config.statistic) == ("min_w", "benefit")
    assert "top-8" in out
    page = (folder / "tune.html").read_text(encoding="utf-8")
    assert "bh_demo_hellaswag, acc: " in out
    assert "over 4 documents" in out
    for wanted in (
        "bh_demo_hellaswag, acc: ",
        "Fidelity: ",
        "min_w benefit mass 0.2",
        "topk per layer",
        "unseen documents of long.txt",
    ):
        assert wanted in page
    assert (folder / "tune.png").read_bytes().startswith(b"\x89PNG")

    code, _, err = run(*arguments, "--target-experts", "5", "--output-dir", folder, *SIZES)
    assert code == 1
    assert "other settings" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "one goal"),
        (("--target-experts", "4", "--tasks", ","), "names no task"),
        (("--target-experts", "4", "--tasks", "bh_demo_lambda"), "did you mean"),
        (("--target-experts", "4", "--max-loss", "1%"), "one goal"),
        (("--target-experts", "4", "--target-distinct", "14"), "one goal"),
        (("--target-distinct", "14"), "groups of 32 decoded together, and intervals need"),
        (("--max-loss", "much"), "must be a share like 1% or 0.01: found 'much'"),
        (("--max-loss", "150%"), "must be a share"),
        (("--target-experts", "9"), "between 1 and 8"),
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
    assert share_of(text, "--max-loss") == pytest.approx(share)
    with pytest.raises(ParameterError):
        share_of("-" + text, "--max-loss")


def difference(low, high):
    return {"difference": (low + high) / 2, "low": low, "high": high}


def account_of(perplexity, kl, **task):
    """Return an account with given differences of its winner from static top-k."""
    row = {"task": "arc", "metric": "acc", "documents": 9, "native": 0.5, "policy": 0.5} | task
    fidelity = {"kl": 0.1, "changed": 0.2, "worst": 0.3}
    return {
        "target_distinct": None, "unit": "documents", "cost": {"measured": "mean_experts"},
        "winner": {"name": "a"}, "tried": [], "screened": [], "tasks": [row] if task else [],
        "confirmation": {
            "controls": {"topk": difference(*perplexity)},
            "fidelity": {"policy": fidelity, "topk": fidelity, "kl_difference": difference(*kl)},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("perplexity", "kl", "said"),
    [
        ((-2, -1), (-0.2, -0.1), None),
        ((-2, -1), (0.1, 0.2), "is farther from"),
        ((-2, -1), (-0.1, 0.2), "is not shown to be nearer to"),
        ((-2, 1), (-0.2, -0.1), "nearer to the model, but not better"),
        ((-2, 1), (-0.2, 0.1), None),
    ],
)
def test_disagreement_of_perplexity_and_fidelity_is_said(perplexity, kl, said):
    [text] = findings_of(account_of(perplexity, kl))
    assert ("disagree" in text) == (said is not None)
    assert (said or "") in text


@pytest.mark.parametrize(
    ("low", "high", "topk", "said", "disagree"),
    [
        (-0.005, 0.02, (-0.01, 0.01), "within the margin of 1 %", False),
        (-0.02, 0.02, (-0.01, 0.01), "not shown to be within", False),
        (-0.05, -0.02, (-0.05, -0.01), "worse by more than the margin of 1 %", True),
    ],
)
def test_tasks_have_a_margin_and_may_disagree(low, high, topk, said, disagree):
    native = {
        "reason": None, "higher_is_better": True, "task": "arc", "metric": "acc", "documents": 9,
        "a": 0.5, "b": 0.5, "difference": (low + high) / 2, "difference_low": low,
        "difference_high": high,
    }  # fmt: skip
    against = {"difference": sum(topk) / 2, "difference_low": topk[0], "difference_high": topk[1]}
    found = findings_of(account_of((-2, -1), (-0.2, -0.1), **_row(native, against, 0.01)))
    assert said in found[-1]
    assert ("disagree" in found[-1]) == disagree
