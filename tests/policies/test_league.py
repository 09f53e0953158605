"""A league: its families, its rows, failures, and the checks of its file."""

from __future__ import annotations

import copy
import json
import math
import shutil

import numpy as np
import pytest

from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.policies.fidelity import OwnOutputs
from lm_eval_bh.policies.league.contest import compete, families_of
from lm_eval_bh.policies.league.league_file import read_league
from lm_eval_bh.policies.tuning.candidates import (
    adaptive_families,
    gains_of,
    named,
    published,
    winner,
)
from lm_eval_bh.policies.tuning.subject import Subject
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.min_w import MinW

SIZES = {"tokens": 1024, "length": 64, "tokens_per_document": 40, "most_tokens": 400}
SIZES["decode_batch"] = 4


@pytest.fixture
def broken():
    """Add a method with a valid declaration that cannot decide."""

    class Broken(MinW):
        name, label, source = "broken", "broken", "this test"

        def count(self, ranked, level):
            raise IndexError("index 9 is out of bounds")

    yield Broken
    del METHODS["broken"]


@pytest.mark.parametrize("family", [*published(), *adaptive_families()], ids=lambda f: f.name)
def test_a_name_is_its_family(family):
    assert named(family.name).options == family.options
    for gained in gains_of(family):
        assert named(gained.name).options == gained.options
        RoutingConfig(**gained.options)


def test_every_method_is_asked_by_what_it_declares(broken):
    assert [family.name for family in published()] == list(METHODS)
    names = [family.name for family in adaptive_families()]
    assert {"broken", "broken benefit", "bh benefit", "top_p", winner().name[:13]} <= set(names)
    assert not {"topk", "random_k", "oracle"} & set(names)
    assert {family.name for family in gains_of(named("broken"))} >= {"broken mass 0.2"}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("min-w", r"no method 'min-w' \(did you mean 'min_w'\?\): use .*top_p"),
        ("min_w benefits", r"'benefits' .* \(did you mean 'benefit'\?\)"),
        ("min_w mass", "'mass' in the method 'min_w mass' lacks its value"),
        ("min_w mass 2", "mass must be a number from 0 to 1: found 2"),
        ("random_k benefit", "'benefit' .* is not a statistic or parameter of it"),
        ("top_p, min_w,top_p", "'top_p' twice"),
        (" , ", "There is no method to measure"),
    ],
)
def test_an_unknown_name_is_one_sentence(names, sentence):
    with pytest.raises(ParameterError, match=sentence):
        families_of(names)


@pytest.fixture(scope="module")
def held(tmp_path_factory, tiny_model_folder, tokenizer, splits):
    """Return a small league, the folder of its journal, and a function to start it again."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    folder = tmp_path_factory.mktemp("league")

    def start(methods, targets=(4.0,), home=None):
        if home is not None:
            shutil.copytree(folder, home, dirs_exist_ok=True)
        home = home or folder
        subject = Subject(model, tokenizer, "tiny-olmoe", splits, home, {}, file="m.json", **SIZES)
        return compete(subject, targets, families_of(methods), progress=False)

    return start("topk,top_p,min_w,by"), start


def test_a_league_is_sorted_and_complete(held):
    league, _ = held
    *measured, failed = league["rows"]
    assert (failed["name"], failed["from_native"]) == ("by", None)
    assert "cannot be reached with rule=by" in failed["failed"]
    losses = [row["from_native"]["relative"] for row in measured]
    assert losses == sorted(losses)
    assert sum(league["tokens"]) <= SIZES["most_tokens"]
    for row in measured:
        assert row["mean_experts"] == pytest.approx(4, rel=0.15)
        assert row["decision"] > 0
        assert row["calibration_seconds"] >= 0
    [static] = [row for row in measured if row["name"] == "topk"]
    assert static["from_static"]["difference"] == 0
    json.dumps(league, allow_nan=False)


def test_a_row_says_what_its_sums_say(held):
    league, _ = held
    tokens, native = np.array(league["tokens"]), np.array(league["native"]["losses"])
    assert not any(league["native"]["divergences"])
    row = next(row for row in league["rows"] if row["name"] == "min_w")
    losses, mean = np.array(row["losses"]), row["mean_experts"]
    perplexity = math.exp(losses.sum() / tokens.sum())
    assert row["from_native"]["perplexity"] == pytest.approx(perplexity)
    assert row["from_native"]["relative"] == pytest.approx(
        perplexity / math.exp(native.sum() / tokens.sum()) - 1
    )
    low = math.floor(mean)
    rungs = [np.array(league["controls"]["topk"][str(k)]["losses"]) for k in (low, low + 1)]
    control = rungs[0] + (mean - low) * (rungs[1] - rungs[0])
    assert row["from_static"]["difference"] == pytest.approx(
        perplexity - math.exp(control.sum() / tokens.sum())
    )
    assert row["fidelity"]["kl"] == pytest.approx(sum(row["divergences"]) / tokens.sum())
    assert row["fidelity"]["changed"] == pytest.approx(sum(row["changed"]) / tokens.sum())


def test_an_interrupted_league_goes_on_and_a_failure_is_a_row(held, broken, monkeypatch, tmp_path):
    league, start = held
    measured = []
    outcome = OwnOutputs.outcome

    def counted(self, routing):
        measured.append(routing.config.rule)
        return outcome(self, routing)

    monkeypatch.setattr(OwnOutputs, "outcome", counted)
    again = start("topk,top_p,min_w,by,broken", home=tmp_path)
    assert set(measured) <= {"broken"}
    rows = {row["name"]: row for row in again["rows"]}
    assert rows["broken"]["failed"] == "IndexError: index 9 is out of bounds"
    for row in league["rows"]:
        assert rows[row["name"]] == row


@pytest.mark.parametrize(
    ("targets", "sentence"), [([8.0], "between 1 and 8"), ([4.0, 4.0], "name a mean twice")]
)
def test_targets_out_of_reach_are_refused(held, targets, sentence):
    with pytest.raises(ParameterError, match=sentence):
        held[1]("topk", targets)


def row_of(league):
    return next(row for row in league["rows"] if row["failed"] is None)


CHANGES = {
    "another version": ("format version 9", lambda f: f.update(format_version=9)),
    "no version": ("lacks format_version", lambda f: f.pop("format_version")),
    "a field too few": ("lacks targets", lambda f: f.pop("targets")),
    "a number as text": ("must be", lambda f: row_of(f).update(mean_experts="4")),
    "a loss made smaller": ("sums give", lambda f: row_of(f)["losses"].__setitem__(0, 1.0)),
    "a negative loss": ("0 or more", lambda f: row_of(f)["losses"].__setitem__(0, -1.0)),
    "a loss too few": ("losses for", lambda f: row_of(f)["losses"].pop()),
    "a perplexity": (
        "from_native.perplexity is", lambda f: row_of(f)["from_native"].update(perplexity=1.0)
    ),
    "an interval": ("from_static.high is", lambda f: row_of(f)["from_static"].update(high=-9.0)),
    "a fidelity": ("fidelity.kl is", lambda f: row_of(f)["fidelity"].update(kl=0.0)),
    "no comparison": ("lacks or adds", lambda f: row_of(f).update(kl_from_static=None)),
    "a mean": ("its mean must be", lambda f: row_of(f).update(mean_experts=9.0)),
    "another mean": ("sums give", lambda f: row_of(f).update(mean_experts=3.6)),
    "another rule": ("another rule", lambda f: row_of(f).update(rule="bh")),
    "an unknown rule": ("rule must be", lambda f: row_of(f)["config"].update(rule="bhh")),
    "a row twice": ("occurs twice", lambda f: f["rows"].append(row_of(f))),
    "another target": ("no target", lambda f: row_of(f).update(target=5.0)),
    "no static rung": ("topk must have", lambda f: f["controls"].update(topk={})),
    "no control": ("its controls must be", lambda f: f.update(controls={})),
    "another cost": ("its controls must be", lambda f: f.update(cost="distinct_experts")),
    "no distinct experts": ("must be given", lambda f: row_of(f).update(distinct_experts=None)),
    "too many of them": ("at most 64, not 65", lambda f: row_of(f).update(distinct_experts=65.0)),
    "no steps": ("must be given with decode_batch", lambda f: f.update(decode_batch=None)),
    "other steps": ("another decode_batch", lambda f: f.update(decode_batch=8)),
    "a control that is not there": (
        "from_oea lacks", lambda f: row_of(f).update(from_oea=row_of(f)["from_static"])
    ),
    "one document": ("two documents", lambda f: f.update(tokens=[3])),
    "other resamples": ("resamples", lambda f: f.update(resamples=10)),
}  # fmt: skip


@pytest.mark.parametrize(("sentence", "change"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_was_changed_is_refused(held, tmp_path, sentence, change):
    path = tmp_path / "league.json"
    path.write_text(json.dumps(held[0]))
    assert read_league(path) == (held[0], [])
    content = copy.deepcopy(held[0])
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=sentence):
        read_league(path)


@pytest.mark.parametrize("content", ["", "[", "[]", "null", "{}", "[" * 100_000])
def test_what_is_no_league_is_one_sentence(tmp_path, content):
    path = tmp_path / "league.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"league.json .*: (give a league.json|run the league)"):
        read_league(path)


def test_another_release_is_noted(held, tmp_path):
    content = copy.deepcopy(held[0])
    content["versions"]["lm-eval-bh"] = "0.0.1"
    (tmp_path / "league.json").write_text(json.dumps(content))
    _, [note] = read_league(tmp_path / "league.json")
    assert "made with lm-eval-bh 0.0.1" in note
