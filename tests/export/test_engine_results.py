"""Only complete results of an engine count: NaN, gaps and debris never agree."""

from __future__ import annotations

import json
import math
import time

import pytest

from lm_eval_bh import ModelError, Policy
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.verification import verify
from lm_eval_bh.resources import tiny_olmoe

NAN, INFINITY = math.nan, math.inf


@pytest.fixture(scope="module")
def returned(tmp_path_factory, policies, documents, commands):
    """Return the real engine's results for the policy and the stock model, as files."""
    folder = tmp_path_factory.mktemp("returned")
    engine = folder / "python"
    engine.write_text(
        f'#!/bin/sh\n{commands}/python "$@" || exit\n'
        f'grep -q /policy\\" "$3" && run=policy || run=stock\ncp "$4" {folder}/$run.json\n'
    )
    engine.chmod(0o755)
    found = run(policies, documents, engine)
    assert found.agrees
    assert found.unscored == 0
    return folder


def run(policies, documents, python, **arguments):
    return verify(
        Policy.load(policies["bh"]),
        Checkpoint.find(str(tiny_olmoe())),
        documents[:2],
        engine="hf",
        name="tiny-olmoe",
        policy_file=policies["bh"],
        python=str(python),
        **arguments,
    )


def engine_that_returns(content, returned, folder):
    """Write an engine that returns ``content`` for the policy, and true stock scores."""
    (folder / "content").write_bytes(content)
    engine = folder / "python"
    engine.write_text(
        f'#!/bin/sh\ngrep -q /policy\\" "$3" && cp {folder}/content "$4" '
        f'|| cp {returned}/stock.json "$4"\n'
    )
    engine.chmod(0o755)
    return engine


def changed(returned, change):
    scores = json.loads((returned / "policy.json").read_text())
    change(scores)
    return json.dumps(scores).encode()


def keep_first(value):
    def change(scores):
        for of_document in scores["log_probs"]:
            of_document[1:] = [value] * (len(of_document) - 1)

    return change


def shorten(scores):
    scores["log_probs"][1] = scores["log_probs"][1][:1]


def none_at_all(scores):
    scores["log_probs"] = [[] for _ in scores["log_probs"]]


@pytest.mark.parametrize(
    ("change", "scored"),
    [
        (keep_first(NAN), 2),
        (keep_first(INFINITY), 2),
        (keep_first(-INFINITY), 2),
        (keep_first(None), 2),
        (shorten, None),
        (none_at_all, 0),
    ],
)
def test_scores_that_are_missing_or_not_finite_are_a_difference(
    change, scored, returned, policies, documents, tmp_path
):
    engine = engine_that_returns(changed(returned, change), returned, tmp_path)
    found = run(policies, documents, engine)
    whole = sum(map(len, documents[:2])) - 2
    tokens = len(documents[0]) if scored is None else scored
    assert (found.tokens, found.unscored) == (tokens, whole - tokens)
    assert not found.agrees
    assert f"{whole - tokens} of {whole} tokens have no finite score" in found.differences


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("generated", [1, 2, 3], "the greedy continuation differs"),
        ("generated", [], "the greedy continuation differs"),
        ("counts", [], "numbers of experts differ"),
    ],
)
def test_text_and_experts_are_compared_too(
    key, value, said, returned, policies, documents, tmp_path
):
    content = changed(returned, lambda scores: scores.update({key: value}))
    found = run(policies, documents, engine_that_returns(content, returned, tmp_path))
    assert not found.agrees
    [difference] = found.differences
    assert said in difference


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (b'{"log_probs": []}', "lacks counts, engine, generated, seconds"),
    ],
    ids=["empty", "no text", "deep", "list", "null", "log_probs alone"],
)
def test_what_is_no_result_is_one_sentence(content, said, returned, policies, documents, tmp_path):
    with pytest.raises(ModelError, match=said) as error:
        run(policies, documents, engine_that_returns(content, returned, tmp_path))
    assert "hf did not return the scores of these documents" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("log_probs", None, "log_probs must be a list"),
        ("log_probs", {"0": [1.0]}, "log_probs must be a list"),
        ("log_probs", [[0.0]], "scores of 1 documents instead of 2"),
        ("log_probs", [[0.0] * 999, [0.0]], "999 scores for"),
        ("log_probs", [["-1"], [0.0]], "must be a number or null"),
        ("counts", [[1.5]], "must be an integer"),
        ("counts", 3, "must be a list or null"),
        ("generated", "text", "generated must be a list"),
        ("seconds", 0, "must be more than 0"),
        ("seconds", -1.0, "must be more than 0"),
        ("seconds", NAN, "must be more than 0"),
        ("seconds", None, "must be a number"),
        ("engine", None, "must be text"),
        ("engine", "\x1b[2J", "must be a name"),
    ],
)
def test_results_of_another_shape(key, value, said, returned, policies, documents, tmp_path):
    content = changed(returned, lambda scores: scores.update({key: value}))
    with pytest.raises(ModelError, match=said):
        run(policies, documents, engine_that_returns(content, returned, tmp_path))


def test_a_run_that_returns_nothing_does_not_get_the_result_of_the_one_before(
    returned, policies, documents, tmp_path
):
    content = (returned / "policy.json").read_bytes()
    engine = engine_that_returns(content, returned, tmp_path)
    engine.write_text(engine.read_text().replace(f"|| cp {returned}/stock.json", "|| true"))
    with pytest.raises(ModelError, match="there is no file"):
        run(policies, documents, engine)


def test_an_engine_that_hangs_is_ended_with_its_helpers(policies, documents, tmp_path):
    engine = tmp_path / "python"
    engine.write_text(f"#!/bin/sh\n(sleep 3; touch {tmp_path}/alive) &\nsleep 60\n")
    engine.chmod(0o755)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"stopped because .* after 1 seconds: .*--timeout"):
        run(policies, documents, engine, timeout=1)
    assert time.monotonic() - started < 30
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("head -c 3000000 /dev/zero >&2; echo >&2; echo out of memory. >&2; exit 1", "of memory"),
        ("printf '\\377\\n' >&2; exit 1", "\N{REPLACEMENT CHARACTER}"),
        ("exit 1", "no message"),
        ("kill -9 $$", "signal 9 ended it"),
    ],
)
def test_what_a_failing_engine_says(script, said, policies, documents, tmp_path):
    engine = tmp_path / "python"
    engine.write_text(f"#!/bin/sh\n{script}\n")
    engine.chmod(0o755)
    with pytest.raises(ModelError, match=rf"hf failed \(.*{said}\)"):
        run(policies, documents, engine)
