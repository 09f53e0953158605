"""Policies at equal distinct experts: groups, counts, controls, results and errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lm_eval_bh import BHRoutingIntegration, ParameterError, Policy, RoutingConfig, UnreachableError
from lm_eval_bh.analysis.show.tuning_page import screened_rows, verdict_of, write_tuning_page
from lm_eval_bh.errors import DataError
from lm_eval_bh.policies.cost import DISTINCT
from lm_eval_bh.policies.document_losses import Documents
from lm_eval_bh.policies.league.contest import compete
from lm_eval_bh.policies.league.league_file import read_league
from lm_eval_bh.policies.paired_differences import PairedBootstrap
from lm_eval_bh.policies.tuning.candidates import Family, named, step_families
from lm_eval_bh.policies.tuning.run import POLICY, tune
from lm_eval_bh.policies.tuning.search import Search
from lm_eval_bh.policies.tuning.subject import CONFIRMATION, VALIDATION, Subject
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.routers import find_routers

ROWS = 4
SIZES = {"tokens": 1024, "length": 24, "tokens_per_document": 48, "most_tokens": 480}
SIZES |= {"decode_batch": ROWS, "by_group": True}
FAMILIES = [named("batch_min_w"), named("xshare")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return one folder for many tests, which share measurements."""
    return tmp_path_factory.mktemp("distinct")


@pytest.fixture
def subject(tiny, tokenizer, splits, folder):
    return Subject(tiny, tokenizer, "tiny-olmoe", splits, folder, {}, **SIZES)


def recounted(routing, documents) -> float:
    """Return the mean number of distinct experts of a layer and step, by sets, token by token."""
    model, top_k = routing.model, routing.routers[0].top_k
    heard: list[np.ndarray] = []

    def hear(module, inputs, output):
        heard.append(output[2].reshape(rows, -1, output[2].shape[-1]).numpy().copy())

    sizes = []
    with routing, torch.no_grad():
        handles = [r.module.register_forward_hook(hear) for r in find_routers(model)]
        for batch in documents.batches:
            rows = len(batch)
            lengths = [len(ids) - 1 for _, ids in batch]
            width = max(lengths)
            ids = torch.tensor([[*ids[:-1], *[0] * (width - len(ids) + 1)] for _, ids in batch])
            mask = torch.arange(width) < torch.tensor(lengths)[:, None]
            heard.clear()
            model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            for layer in heard:
                for position in range(width):
                    alive = [row for row in range(rows) if position < lengths[row]]
                    used = {int(e) for row in alive for e in layer[row, position]}
                    sizes.append(len(used - {routing.num_experts}))
        for handle in handles:
            handle.remove()
    assert min(sizes) >= 1
    assert max(sizes) <= top_k * ROWS
    return float(np.mean(sizes))


@pytest.mark.parametrize("name", ["topk", "oea", "batch_min_w", "min_w"])
def test_distinct_experts_are_what_a_plain_recount_gives(subject, name):
    search = Search(subject, FAMILIES, progress=False, cost=DISTINCT)
    family = named(name)
    config = search.choose(family, 14.0, CONFIRMATION)
    row = search.run(CONFIRMATION, family, config)
    assert row.failed is None
    routing = subject._routing(family, config)
    assert row.distinct_experts == pytest.approx(
        recounted(routing, subject.documents[CONFIRMATION])
    )
    if config.target_distinct:  # a method that decides token by token is solved, too
        assert row.distinct_experts == pytest.approx(14, rel=0.1)
        assert row.solution.distinct_experts == pytest.approx(14, rel=0.02)
        assert row.solution.mean_experts == pytest.approx(row.mean_experts, rel=0.1)


def test_groups_are_exact_seeded_and_what_is_resampled(tokenizer, splits):
    documents = Documents.of(tokenizer, splits.confirmation, length=16)
    windows = [window for batch in documents.batches for window in batch]
    found = documents.grouped(ROWS)
    assert [len(batch) for batch in found.batches] == [ROWS] * (len(windows) // ROWS)
    assert all({n for n, _ in batch} == {number} for number, batch in enumerate(found.batches))
    assert found.tokens.tolist() == [sum(len(i) - 1 for _, i in b) for b in found.batches]
    taken = sorted(ids for batch in found.batches for _, ids in batch)
    left_out = sorted(ids for _, ids in windows)
    for ids in taken:
        left_out.remove(ids)  # each window once
    assert len(left_out) < ROWS
    assert documents.grouped(ROWS).batches == found.batches
    assert documents.grouped(ROWS, seed=1).batches != found.batches
    # A small batch size of passes changes nothing.
    other = Documents.of(tokenizer, splits.confirmation, length=16, batch=3)
    assert other.grouped(ROWS).batches == found.batches


def test_intervals_are_those_of_drawn_groups(subject):
    search = Search(subject, FAMILIES, progress=False, cost=DISTINCT)
    documents = subject.documents[VALIDATION]
    row, native = (search._measure(VALIDATION, named("topk"), k) for k in (3, 8))
    assert len(row.losses) == len(documents.tokens) == len(documents.batches)
    found = PairedBootstrap(documents.tokens).compare(row.sums, native.sums)
    rng, drawn = np.random.default_rng(7), []
    for _ in range(4000):
        groups = rng.integers(0, len(documents.tokens), len(documents.tokens))
        tokens = documents.tokens[groups].sum()
        ours, theirs = (np.exp(r.sums[groups].sum() / tokens) for r in (row, native))
        drawn.append(ours / theirs - 1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    wide = high - low
    assert found.relative_low == pytest.approx(low, abs=0.1 * wide)
    assert found.relative_high == pytest.approx(high, abs=0.1 * wide)


@pytest.fixture
def tuned(subject, monkeypatch):
    monkeypatch.setattr("lm_eval_bh.policies.tuning.search.step_families", lambda: FAMILIES)
    return tune(subject, target_distinct=14.0, progress=False)


def test_a_search_at_distinct_experts(tuned, subject, folder):
    policy, account = tuned
    tried = {row["name"]: row for row in account["tried"]}
    assert set(tried) == {"oea", "topk", "batch_min_w", "xshare"}
    assert account["unit"] == "groups of 4 windows"
    found = account["confirmation"]
    assert {"topk", "oea"} - {account["winner"]["name"]} == set(found["controls"])
    assert found["distinct_experts"] == pytest.approx(14, rel=0.1)
    assert len(account["static"]) == 8
    assert all(a < b for a, b in zip(account["static"], list(account["static"])[1:], strict=False))

    saved = Policy.load(folder / POLICY)
    assert saved.digest() == policy.digest()
    assert saved.config.decode_batch == ROWS
    documents = subject.documents[CONFIRMATION]
    with BHRoutingIntegration(subject.model, policy=saved) as routing:
        losses = documents.losses(subject.model)
    assert found["native"]["perplexity"] == pytest.approx(
        np.exp(losses.sum() / documents.tokens.sum()), rel=1e-6
    )
    assert found["distinct_experts"] == routing.counters.mean_distinct()
    # Controls are at the same distinct experts: between the rungs that were measured.
    for name, control in found["controls"].items():
        rungs = {}
        for k in range(1, 9):
            option = {"k0": k} if name == "oea" else {"max_k": k}
            config = RoutingConfig(rule=name, decode_batch=ROWS, **{"max_k": 8} | option)
            with BHRoutingIntegration(subject.model, config) as routing:
                losses = documents.losses(subject.model)
            rungs[routing.counters.mean_distinct()] = losses
        below = max(d for d in rungs if d <= found["distinct_experts"])
        above = min(d for d in rungs if d > found["distinct_experts"])
        share = (found["distinct_experts"] - below) / (above - below)
        mixed = (1 - share) * rungs[below] + share * rungs[above]
        expected = np.exp(mixed.sum() / documents.tokens.sum())
        assert control["control"] == pytest.approx(expected, rel=1e-6)


def test_the_page_and_the_verdict_name_groups(tuned, tmp_path):
    _, account = tuned
    text = verdict_of(account)
    assert "unseen groups of 4 windows of demo" in text
    assert "distinct experts per layer and step" in text
    assert screened_rows(account) == []
    write_tuning_page(account, tmp_path)
    page = (tmp_path / "tune.html").read_text(encoding="utf-8")
    assert "oea, same distinct experts" in page
    json.dumps(account, allow_nan=False)


@pytest.mark.parametrize("target", [0.5, 1.0, 30.0, 64.0, 100.0])
def test_a_target_out_of_reach_is_refused_with_the_range(subject, target):
    search = Search(subject, FAMILIES, progress=False, cost=DISTINCT)
    with pytest.raises(ParameterError, match=r"out of reach: .* between 1 and (2\d|32)"):
        search.for_mean(target)


def test_what_no_threshold_reaches_says_between_which_it_lies(subject):
    with pytest.raises(
        UnreachableError, match=r"the mean on the calibration text lies between \S+ and 2\d"
    ):
        BHRoutingIntegration(
            subject.model,
            RoutingConfig(rule="batch_min_w", target_distinct=60, decode_batch=ROWS),
            tokenizer=subject.tokenizer,
            texts=subject.splits.calibration[:8],
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_distinct": 1}, "must be more than min_k=1"),
        ({"target_distinct": 9, "target_experts": 4}, "give one target"),
        ({"target_distinct": 9, "decode_batch": 0}, "decode_batch must be"),
        ({"target_distinct": 9, "decode_batch": None}, "without decode_batch"),
    ],
)
def test_targets_that_say_nothing_are_refused(options, sentence):
    with pytest.raises(ParameterError, match=sentence):
        RoutingConfig(**{"rule": "min_w", "decode_batch": ROWS} | options)


def test_one_row_at_a_time_shares_nothing(tiny, tokenizer, splits, tmp_path):
    sizes = SIZES | {"decode_batch": 1}
    subject = Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {}, **sizes)
    with pytest.raises(ParameterError, match="needs a decode_batch of at least 2"):
        Search(subject, FAMILIES, progress=False, cost=DISTINCT).for_mean(5.0)


@pytest.mark.parametrize("rows", [64, 10_000])
def test_too_few_groups_are_refused_with_what_to_do(tokenizer, splits, rows):
    documents = Documents.of(tokenizer, splits.confirmation, length=64)
    with pytest.raises(DataError, match=r"make \d groups of \d+ .* smaller --decode-batch"):
        documents.grouped(rows)


def test_families_of_a_step_are_all_that_share(subject):
    names = {family.options["rule"] for family in step_families()}
    assert names == {name for name, method in METHODS.items() if method.joint}
    for family in step_families():
        config = family.at(14, subject.native, DISTINCT, ROWS)
        assert 14 in (config.target_distinct, config.step_budget) or config.k0 == 14
    assert named("oea k0 3").at(14, 8, DISTINCT, ROWS).k0 == 3  # as it was given


def test_a_league_has_all_in_one_table(subject, tmp_path):
    families = [named(name) for name in ("topk", "oea", "min_w", "batch_min_w")]
    league = compete(subject, [14.0], families, progress=False, cost=DISTINCT)
    assert {*league["controls"]} == {"topk", "oea"}
    assert not [row["failed"] for row in league["rows"] if row["failed"]]
    for row in league["rows"]:
        assert row["distinct_experts"] == pytest.approx(14, rel=0.25)
        assert row["config"]["decode_batch"] == ROWS
        if row["name"] in ("topk", "oea"):
            control = row["from_static" if row["name"] == "topk" else "from_oea"]
            assert control["difference"] == pytest.approx(0, abs=1e-9)
    path = tmp_path / "league.json"
    path.write_text(json.dumps(league, allow_nan=False))
    assert read_league(path)[0] == league
    league["rows"][0]["distinct_experts"] += 1
    path.write_text(json.dumps(league))
    with pytest.raises(DataError, match="sums give"):
        read_league(path)


def test_a_league_counts_them_beside_its_means(tiny, tokenizer, splits, tmp_path):
    sizes = SIZES | {"by_group": False}
    subject = Subject(tiny, tokenizer, "tiny-olmoe", splits, tmp_path, {}, **sizes)
    league = compete(subject, [4.0], [named("min_p")], progress=False)
    [row] = league["rows"]
    family = Family("min_p", {"rule": "min_p"})
    routing = subject._routing(family, RoutingConfig.named(row["config"]))
    assert len(league["tokens"]) == len(splits.confirmation[:10])
    assert row["distinct_experts"] == pytest.approx(
        recounted(routing, subject.documents[CONFIRMATION])
    )
