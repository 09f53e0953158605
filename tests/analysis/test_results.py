"""Folders of experiments become one table: joined, checked, and without invented values."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lm_eval_bh.analysis.read.documents import read_documents
from lm_eval_bh.analysis.read.earlier_release import _RULES as FIRST_RELEASE
from lm_eval_bh.analysis.read.earlier_release import upgraded
from lm_eval_bh.analysis.table.columns import COLUMNS, LAYER_COLUMNS
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.analysis.table.flops import Architecture
from lm_eval_bh.analysis.table.metrics import METRICS
from lm_eval_bh.analysis.table.perplexities import fill_perplexity
from lm_eval_bh.analysis.table.strategy_names import strategy_label
from lm_eval_bh.analysis.table.table_files import read_table, write_tables
from lm_eval_bh.errors import DataError
from lm_eval_bh.routing.methods import METHODS

WIKITEXT, LAMBADA, HELLASWAG = "bh_wikitext", "bh_lambada", "bh_hellaswag"
NATIVE = 4
TOKENS, DOCUMENTS = 25, 4  # of every task that the fixture writes
WORDS = TOKENS - DOCUMENTS


def row_of(frame: pd.DataFrame, task: str, strategy: str) -> pd.Series:
    (row,) = (row for _, row in frame.iterrows() if (row.task, row.strategy) == (task, strategy))
    return row


def test_one_row_an_experiment_with_all_columns(write):
    write("top", rule="topk")
    write("deep/below", alpha=0.4)
    write("stock", model="hf")
    loaded = load_experiments([write.folder])
    assert list(loaded.frame) == list(COLUMNS)
    assert {name: str(kind) for name, kind in loaded.frame.dtypes.items()} == COLUMNS
    assert len(loaded.frame) == 9
    assert set(METRICS) <= set(loaded.frame)
    assert loaded.problems == loaded.notes == []
    assert [group.number for group in loaded.groups] == [1]
    assert len(loaded.groups[0].files) == 3
    assert set(loaded.frame["group"]) == {1}
    # Baselines first, tasks together.
    assert loaded.frame["strategy"].tolist() == ["top-4", "top-4 (hf)", "BH a=0.40, max 4"] * 3
    assert loaded.frame["task"].tolist() == sorted([WIKITEXT, LAMBADA, HELLASWAG] * 3)


def test_routing_metrics_are_those_of_the_counters(write):
    write("bh", seed=7)
    row = row_of(load_experiments([write.folder]).frame, WIKITEXT, "BH a=0.40, max 4")
    selected = write.select(np.random.default_rng(7), 1, write.native)
    counts = (selected >= 0).sum(-1)
    assert row["avg_experts"] == row["avg_experts_model"] == pytest.approx(counts.mean())
    assert row["expert_activation_ratio"] == pytest.approx(counts.mean() / write.native)
    assert row["ceiling_hit_rate"] == pytest.approx(100 * (counts == write.native).mean())
    assert row["floor_hit_rate"] == pytest.approx(100 * (counts == 1).mean())
    assert row["layer_expert_variance"] == pytest.approx(counts.mean(1).var())
    assert row["layer_consistency_score"] == pytest.approx(
        np.mean([np.corrcoef(counts[i], counts[i + 1])[0, 1] for i in range(write.layers - 1)])
    )
    used = [len(np.unique(layer[layer >= 0])) for layer in selected]
    assert row["expert_utilization"] == pytest.approx(sum(used) / (write.layers * write.experts))
    assert (row["tokens"], row["seconds"], row["documents"]) == (TOKENS, 0.5, DOCUMENTS)
    assert row["evaluation_tokens_per_second"] == TOKENS / 0.5
    assert pd.isna(row["tokens_per_second"])  # no speed phase ran
    assert pd.isna(row["latency_ms_per_token"])
    shape = Architecture.from_config(write.model_config, write.layers)
    assert row["context_length"] == 64
    assert row["flops_reduction_pct"] == pytest.approx(
        100 * (1 - shape.flops(counts.mean(), 64) / shape.flops(write.native, 64))
    )


def test_harness_metrics_keep_their_standard_errors(write):
    write("bh", loss=2.0, right=(1, 1, 1, 0))
    frame = load_experiments([write.folder]).frame.set_index("task")
    assert frame.loc[WIKITEXT, "word_perplexity"] == pytest.approx(math.exp(2 * TOKENS / WORDS))
    assert frame.loc[WIKITEXT, "byte_perplexity"] == pytest.approx(math.exp(0.5))
    assert frame.loc[LAMBADA, "target_perplexity"] == pytest.approx(math.exp(2 * TOKENS / 4))
    assert frame.loc[LAMBADA, ["target_perplexity_stderr", "acc_stderr"]].tolist() == [0.25, 0.125]
    assert frame.loc[HELLASWAG, ["acc", "acc_norm", "accuracy"]].tolist() == [1.0, 0.75, 0.75]
    assert frame.loc[LAMBADA, ["acc", "accuracy"]].tolist() == [0.75, 0.75]
    assert math.isnan(frame.loc[WIKITEXT, "word_perplexity_stderr"])
    assert math.isnan(frame.loc[WIKITEXT, "accuracy"])
    assert frame["avg_task_accuracy"].tolist() == [0.75] * 3


def test_what_was_not_measured_is_null(write):
    write("top", rule="topk", samples=False)
    row = row_of(load_experiments([write.folder]).frame, WIKITEXT, "top-4")
    null = {
        "tokens_per_second",  # no speed phase
        "latency_ms_per_token",
        "layer_consistency_score",  # constant counts
        "normalized_selection_entropy",
        "expert_overlap_score",  # one run
        "output_determinism",
    }
    assert {name for name in METRICS if pd.isna(row[name])} == null
    assert (row["ceiling_hit_rate"], row["floor_hit_rate"]) == (100, 0)
    assert (row["min_k"], row["max_k"], row["alpha"]) == (4, 4, pytest.approx(np.nan, nan_ok=True))


def test_no_routing_log_no_routing_metrics(write):
    def off(content):
        content["config"]["bh"] |= {"log_routing": "off", "summary": None}

    write("bh", change=off)
    row = load_experiments([write.folder]).frame.iloc[0]
    assert {name for name in METRICS if pd.notna(row[name])} == {"avg_task_accuracy"}
    assert pd.isna(row["avg_experts"])


@pytest.mark.parametrize(
    ("how", "baseline", "strategy"),
    [
        ({}, True, "top-4"),
        ({"statistic": "contribution"}, False, "top-4, contribution"),
        ({"statistic": "contribution", "null_scope": "expert"}, False, None),
        ({"temperature": 2.0}, False, "top-4, T=2"),
        ({"mode": "analyze"}, False, "top-4, analyze only"),
    ],
)
def test_only_plain_static_top_k_is_a_baseline(write, how, baseline, strategy):
    write("top", rule="topk", **how)
    row = load_experiments([write.folder]).frame.iloc[0]
    assert row["baseline"] == baseline
    assert row["strategy"] == (strategy or "top-4, contribution, null of each expert")


@pytest.mark.parametrize("scope", ["layer", "expert"])
@pytest.mark.parametrize("rule", FIRST_RELEASE)
def test_results_of_the_first_release_give_the_same_rows(new_writer, tmp_path, rule, scope):
    """They lack the rule's description and the null model's scope; the digest is equal."""
    frames = []
    for form in ("first", "this"):
        write = new_writer(tmp_path / form, first_release=form == "first")
        write("a", rule=rule, null_scope=scope, log=True, run_id="one")
        frames.append(load_experiments([write.folder]).frame.drop(columns="file"))
    pd.testing.assert_frame_equal(*frames)
    assert frames[0]["ceiling_hit_rate"].notna().all()
    assert frames[0]["strategy"].str.contains("null of each expert").eq(scope == "expert").all()


def test_the_digest_of_a_configuration_stays(write):
    """It joins tables of different releases."""
    write("bh", null_scope="layer", statistic="logit", trim=None, seed=0)
    assert set(load_experiments([write.folder]).frame["configuration"]) == {"039b8032870e"}


def test_a_rule_that_no_file_describes_is_refused(new_writer, tmp_path):
    write = new_writer(tmp_path, first_release=True)
    write("new", rule="later")
    write("bh")
    ((_, problem),) = load_experiments([tmp_path]).problems
    assert "does not describe its rule 'later'" in problem


@pytest.mark.parametrize(
    ("label", "fixed_count", "strategy"),
    [("toy", True, "toy 4"), ("toy-k", True, "toy-4"), ("toy", False, "toy a=0.40, max 4")],
)
def test_a_new_rule_is_what_its_file_says(write, label, fixed_count, strategy):
    rule = {"name": "toy_rule", "label": label, "fixed_count": fixed_count, "tests": False}
    write("toy", rule="toy_rule", change=lambda c: c["config"]["bh"].update(rule=rule))
    row = load_experiments([write.folder]).frame.iloc[0]
    assert (row["rule"], row["strategy"], row["adaptive"]) == (
        "toy_rule",
        strategy,
        not fixed_count,
    )
    assert pd.isna(row["trim"])


def test_a_stock_baseline_learns_its_k_from_other_runs_of_the_model(write):
    write("stock", model="hf")
    alone = load_experiments([write.folder]).frame.iloc[0]
    assert (alone["rule"], alone["strategy"], alone["baseline"]) == ("topk", "top-k (hf)", True)
    assert pd.isna(alone["max_k"])
    assert pd.isna(alone["avg_experts"])
    assert pd.isna(alone["flops_reduction_pct"])
    assert alone["run_id"].startswith("hf-")
    write("bh")
    row = row_of(load_experiments([write.folder]).frame, WIKITEXT, "top-4 (hf)")
    assert (row["max_k"], row["avg_experts"], row["flops_reduction_pct"]) == (4, 4, 0)
    assert pd.isna(row["ceiling_hit_rate"])
    assert pd.isna(row["tokens_per_second"])


def test_analyze_saves_nothing(write):
    write("bh", mode="analyze")
    row = load_experiments([write.folder]).frame.iloc[0]
    assert row["strategy"] == "BH a=0.40, max 4, analyze only"
    assert 1 < row["would_select_avg_experts"] < 4
    for name in ("avg_experts", "expert_activation_ratio", "flops_reduction_pct"):
        assert pd.isna(row[name])
    assert pd.notna(row["selection_entropy"])


def test_layers_that_are_not_routed_take_the_models_own_k(write):
    def one_layer(content):
        info = content["config"]["bh"]
        info["routed_layers"] = [1]
        for summary in (info["summary"], *info["summary"]["tasks"].values()):
            summary["layers"] = summary["layers"][1:2]
            summary["mean_experts_per_token"] = summary["layers"][0]["mean_experts"]

    write("bh", layers="1", change=one_layer)
    loaded = load_experiments([write.folder])
    row = loaded.frame.iloc[0]
    assert row["strategy"] == "BH a=0.40, max 4, layers 1"
    assert row["avg_experts_model"] == pytest.approx((row["avg_experts"] + 2 * write.native) / 3)
    assert pd.isna(row["layer_expert_variance"])
    assert set(loaded.layers["layer"]) == {1}


def test_the_layers_table(write):
    write("bh")
    layers = load_experiments([write.folder]).layers
    assert tuple(layers) == LAYER_COLUMNS
    assert len(layers) == 3 * write.layers
    first = layers.iloc[0]
    assert first["tokens"] == sum(first["histogram"]) == TOKENS
    mean = np.average(range(write.experts + 1), weights=first["histogram"])
    assert first["mean"] == pytest.approx(mean)
    assert sum(first["usage"]) == pytest.approx(mean * TOKENS)


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"alpha": 0.4, "min_k": 1}, "BH a=0.40, max 8"),
        ({"alpha": 0.125, "min_k": 2, "rule": "by"}, "BY a=0.125, max 8, min 2"),
        ({"rule": "topk"}, "top-8"),
        ({"rule": "random_k"}, "random-8"),
        ({"rule": "topk", "temperature": 2.0}, "top-8, T=2"),
        (
            {"alpha": 0.3, "statistic": "contribution", "renormalize": True},
            "BH a=0.30, max 8, contribution, renormalize=true",
        ),
        ({"alpha": 0.62, "trim": 8}, "BH a=0.62, max 8, trim 8"),
        ({"alpha": 0.62, "null_scope": "layer"}, "BH a=0.62, max 8"),
        ({"alpha": 0.62, "null_scope": "expert"}, "BH a=0.62, max 8, null of each expert"),
        ({"alpha": 0.62, "null_scope": "model"}, "BH a=0.62, max 8, null of the model"),
        ({"alpha": 0.62, "target_experts": 5.0, "budget": "model"}, "BH target 5, max 8"),
        (
            {"alpha": 0.62, "target_experts": 4.5, "budget": "layer"},
            "BH layer target 4.5, max 8",
        ),
    ],
)
def test_strategy_label(config, label):
    config = {"rule": "bh", "max_k": 8} | config
    assert strategy_label(config, upgraded({"config": config}, "it")["rule"]) == label


def test_runs_that_differ_in_level_and_size_only_are_one_variant(write):
    write("one", alpha=0.4)
    write("two", alpha=0.5, max_k=8)
    write("other", temperature=2.0)
    write("top", rule="topk")
    frame = load_experiments([write.folder]).frame
    assert set(zip(frame["variant"], frame["strategy"], strict=True)) == {
        ("BH", "BH a=0.40, max 4"),
        ("BH", "BH a=0.50, max 8"),
        ("BH, T=2", "BH a=0.40, max 4, T=2"),
        ("top-k", "top-4"),
    }


def test_solved_levels_and_trimmed_nulls_are_told_apart(write):
    """All four were tested at 0.62, or the layers at 0.62 on the mean."""
    solved = {"target_experts": 3.0, "trim": None}
    write("plain", alpha=0.62, budget="model")
    write("trimmed", alpha=0.62, trim=8, budget="model")
    write("model", alpha=0.62, budget="model", **solved)
    write("layer", alpha=0.62, budget="layer", **solved)
    write("given", alpha=0.62, change=lambda c: c["config"]["bh"].update(null_model={"trim": 2}))
    write("top", rule="topk")
    frame = load_experiments([write.folder]).frame
    columns = ["variant", "strategy", "target_experts", "budget", "trim"]
    rows = frame[columns].astype(object).where(frame[columns].notna(), None)
    assert set(rows.itertuples(index=False, name=None)) == {
        ("BH", "BH a=0.62, max 4", None, None, 0),
        ("BH, trim 8", "BH a=0.62, max 4, trim 8", None, None, 8),
        ("BH, trim 2", "BH a=0.62, max 4, trim 2", None, None, 2),
        ("BH, target", "BH target 3, max 4", 3.0, "model", 0),
        ("BH, layer target", "BH layer target 3, max 4", 3.0, "layer", 0),
        ("top-k", "top-4", None, None, None),
    }
    assert frame.groupby("strategy")["configuration"].nunique().eq(1).all()


@pytest.mark.parametrize("rule", [METHODS[name] for name in FIRST_RELEASE], ids=FIRST_RELEASE)
def test_rules_of_the_first_release_are_what_they_were(rule):
    info = upgraded({"config": {"rule": rule.name}}, "it")["rule"]
    assert rule.fixed_count == info["fixed_count"]
    assert (rule.tests, rule.random) == (info["tests"], info["random"])


# What must be equal


def change_of(task, table, value):
    def change(content):
        content[table][task] = value

    return change


def change_of_config(name, value):
    def change(content):
        content["config"][name] = value

    return change


DIFFERENCES = {
    "limit": (
        change_of(WIKITEXT, "n-samples", {"original": 10, "effective": 9}),
        "limit of bh_wikitext 4 of 10 documents and 9 of 10 documents",
    ),
    "version": (change_of(LAMBADA, "versions", 2.0), "version of bh_lambada 1.0 and 2.0"),
    "few-shot": (change_of(HELLASWAG, "n-shot", 5), "num_fewshot of bh_hellaswag 0 and 5"),
    "dtype": (change_of_config("model_dtype", "torch.bfloat16"), "torch.float32 and torch.bfloat"),
    "model": (change_of_config("model_args", "pretrained=other/model,dtype=float32"), "some/model"),
    "max_length": (lambda content: content.update(max_length=32), "max_length 64 and 32"),
    "template": (lambda content: content.update(chat_template_sha="ab"), "chat template none and"),
    "routers": (
        lambda content: content["config"]["bh"]["null_model"].update(fingerprint="e" * 64),
        "fingerprint of the routers",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_cannot_be_compared_is_refused_or_kept_apart(write, name):
    change, said = DIFFERENCES[name]
    write("top", rule="topk")
    first = write("bh")
    other = write("other", alpha=0.5, samples=False, change=change)
    with pytest.raises(DataError) as refused:
        load_experiments([write.folder])
    message = str(refused.value)
    assert said in message
    assert first.name in message
    assert str(other) in message
    assert "--keep-groups" in message
    loaded = load_experiments([write.folder], force=True)
    assert [len(group.files) for group in loaded.groups] == [2, 1]
    assert set(loaded.frame[loaded.frame["file"] == other.as_posix()]["group"]) == {2}
    assert loaded.groups[1].files == (other,)
    # Separate groups: nothing of one group replaces something in the other.
    assert loaded.frame.query("group == 2")["matched_by"].isna().all()


def given(**arguments):
    """Return a change of a results file's ``--model_args``."""

    def change(content):
        content["config"]["model_args"] |= arguments

    return change


TELLING = {
    "pretrained": ("/runs/a/final", "/runs/b/final"),
    "revision": ("step100", "step200"),
    "peft": ("adapter", "other"),
    "delta": ("delta", "other"),
    "subfolder": ("one", "two"),
    "tokenizer": ("one", "two"),
    "add_bos_token": (True, False),
    "load_in_8bit": (True, False),
    "gguf_file": ("q4.gguf", "q8.gguf"),
    "prefix_token_id": (0, 1),
    "softmax_dtype": ("float32", "bfloat16"),
    "truncation": (True, False),
    "attn_implementation": ("eager", "sdpa"),
    "of_a_later_release": (1, 2),
}


@pytest.mark.parametrize("model", ["hf-bh", "hf"])
@pytest.mark.parametrize("name", TELLING)
def test_different_models_are_not_repeats_of_one(write, name, model):
    one, other = TELLING[name]
    write("one", model=model, change=given(**{name: one}))
    write("same", model=model, change=given(**{name: one}))
    write("other", model=model, change=given(**{name: other}))
    with pytest.raises(DataError, match="cannot be compared") as refused:
        load_experiments([write.folder])
    assert ("model" if name == "pretrained" else name) in str(refused.value)
    loaded = load_experiments([write.folder], force=True)
    assert [len(group.files) for group in loaded.groups] == [2, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"device": "cpu"}, {"device": "cuda:1", "batch_size": 4, "log_samples": 3}),
        ({}, {"revision": "main", "truncation": False, "subfolder": "", "peft": None}),
        ({"dtype": "auto"}, {"dtype": "float32"}),  # what came of it is the same
        ({"tokenizer": "some/model"}, {}),
        ({"pretrained": "/runs/./final/"}, {"pretrained": "/runs/final"}),
    ],
)
def test_harmless_arguments_tell_nothing_apart(write, one, other):
    write("one", change=given(**one))
    write("other", change=given(**other))
    assert len(load_experiments([write.folder]).groups) == 1


def test_arguments_may_be_text(write):
    def text(content):
        content["config"]["model_args"] = "pretrained=some/model,peft=x,add_bos_token=True"

    write("text", change=text)
    write("pairs", change=given(peft="x", add_bos_token=True))
    assert len(load_experiments([write.folder]).groups) == 1


def test_two_names_of_one_commit_are_one_model(write):
    def at(revision, commit):
        def change(content):
            content["config"]["model_sha"] = commit
            content["config"]["model_args"]["revision"] = revision

        return change

    write("branch", change=at("main", "c0ffee"))
    write("tag", change=at("v1", "c0ffee"))
    assert len(load_experiments([write.folder]).groups) == 1
    write("moved", change=at("main", "decade"))
    with pytest.raises(DataError, match="commit of the model c0ffee and decade"):
        load_experiments([write.folder])


def test_a_policy_is_compared_by_what_it_decides(write):
    """Not by its path: it is compared with the static top-k that it has to beat."""

    def with_policy(content):
        content["config"]["model_args"]["policy"] = "tuned/policy.safetensors"

    write("static")
    write("policy", alpha=0.3, change=with_policy)
    assert len(load_experiments([write.folder]).groups) == 1


def test_hf_bh_describes_all_its_routing_arguments_in_the_file():
    from lm_eval_bh.analysis.read.model_arguments import OF_ROUTING
    from lm_eval_bh.harness.arguments import ROUTING_NAMES

    assert ROUTING_NAMES | {"policy"} == OF_ROUTING


def test_the_defaults_are_those_of_lm_eval():
    import inspect

    from lm_eval.models.huggingface import HFLM

    from lm_eval_bh.analysis.read.model_arguments import DEFAULTS

    known = inspect.signature(HFLM.__init__).parameters
    for name, value in DEFAULTS.items():
        assert name.startswith("load_in_") or known[name].default == value


def test_a_stock_model_with_another_k_is_that_baseline(write):
    write("bh")
    write("stock", model="hf")
    write("two", model="hf", change=given(num_experts_per_tok=2))
    write("four", model="hf", change=given(num_experts_per_tok=NATIVE))
    frame = load_experiments([write.folder]).frame
    stock = frame[(frame["task"] == WIKITEXT) & (frame["mode"] == "native")]
    assert stock["strategy"].tolist() == ["top-2 (hf)", "top-4 (hf)", "top-4 (hf)"]
    assert stock["max_k"].tolist() == stock["avg_experts"].tolist() == [2, 4, 4]
    assert stock["native_top_k"].tolist() == [4, 4, 4]
    assert stock["configuration"].nunique() == 2
    assert stock["flops_reduction_pct"].tolist()[1:] == [0, 0]
    assert stock["flops_reduction_pct"].tolist()[0] > 0


def test_another_engine_is_no_repeat_of_hf(write):
    def engine(content):
        content["config"]["model"] = "vllm"

    write("bh")
    write("stock", model="hf")
    write("vllm", model="hf", change=engine)
    frame = load_experiments([write.folder]).frame
    names = frame[frame["task"] == WIKITEXT].set_index("strategy")["configuration"]
    assert names["top-4 (hf)"] != names["top-4 (vllm)"]


def test_a_refusal_of_many_files_stays_short(write):
    write("bh")
    for number in range(7):
        write(f"other{number}", change=change_of(WIKITEXT, "versions", 2.0 + number))
    with pytest.raises(DataError, match="and 2 more files differ too"):
        load_experiments([write.folder])


def test_different_task_hashes_are_refused(write):
    write("bh")
    write("other", change=change_of(WIKITEXT, "task_hashes", "another"), samples=False)
    with pytest.raises(DataError, match="hash of bh_wikitext hash of bh_wikitext and another"):
        load_experiments([write.folder])


def test_several_processes_see_the_same_documents_in_another_order(write):
    """lm-eval hashes them in the order of gathering; the documents themselves agree."""
    write("one")
    file = write("two", change=change_of(WIKITEXT, "task_hashes", "of another order"))
    (samples,) = file.parent.glob(f"samples_{WIKITEXT}*")
    lines = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(lines[::2] + lines[1::2]))
    assert len(load_experiments([write.folder]).groups) == 1
    samples.write_text("".join(lines).replace('"doc_hash": "', '"doc_hash": "x'))
    with pytest.raises(DataError, match="hash of bh_wikitext"):
        load_experiments([write.folder])


def test_documents_are_known_from_samples_where_the_results_do_not_tell(write):
    import hashlib

    def digest_of(*documents):
        hashes = [hashlib.sha256(f"{WIKITEXT}doc{i}".encode()).hexdigest() for i in documents]
        return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()

    def on(*documents):
        def change(content):
            content["config"]["bh"]["documents"] = {WIKITEXT: digest_of(*documents)}

        return change

    write("stock", model="hf")
    write("same", change=on(3, 2, 1, 0), samples=False)
    assert len(load_experiments([write.folder]).groups) == 1
    write("other", change=on(4, 5, 6, 7), samples=False, alpha=0.5)
    with pytest.raises(DataError, match=f"documents of {WIKITEXT}"):
        load_experiments([write.folder])


def test_a_missing_count_of_documents_is_no_difference(write):
    def old(content):
        del content["n-samples"]

    write("new")
    write("old", change=old, samples=False, alpha=0.5)
    assert len(load_experiments([write.folder]).groups) == 1

    def fewer(content):
        old(content)
        for values in content["results"].values():
            values["sample_len"] = 3

    write("fewer", change=fewer, samples=False, alpha=0.3)
    with pytest.raises(DataError, match="number of documents of bh_hellaswag 3 and 4"):
        load_experiments([write.folder])


def test_unknown_is_no_difference(write):
    write("bh", samples=False)  # has no hashes
    write("other", alpha=0.3)
    write("old", alpha=0.5, change=lambda content: content.pop("max_length"))
    assert len(load_experiments([write.folder]).groups) == 1


def test_a_limit_beyond_the_documents_is_no_limit(write):
    every = {"original": 4, "effective": 4}

    def change(limit):
        def apply(content):
            content["config"]["limit"] = limit
            content["n-samples"] = dict.fromkeys(content["n-samples"], every)

        return apply

    write("all", change=change(None))
    write("most", change=change(1000), alpha=0.5)
    assert len(load_experiments([write.folder]).groups) == 1


def test_a_folder_of_the_model_has_the_models_name(write):
    write("stock", model="hf", pretrained="/models/tiny-olmoe")
    write("bh", pretrained="tiny-olmoe")
    frame = load_experiments([write.folder]).frame
    assert set(frame["model"]) == {"tiny-olmoe"}
    assert set(frame["native_top_k"]) == {4}


# Damaged files


def damage(content):
    content["config"]["bh"]["summary"]["tasks"][WIKITEXT]["layers"][0].pop("histogram")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("results"), "it has no results"),
        (lambda content: content.pop("config"), "it has no configuration"),
        (lambda content: content["config"]["bh"].pop("run_id"), "lacks run_id"),
        (lambda content: content["config"]["bh"].update(schema_version=99), "upgrade lm-eval-bh"),
        (lambda content: content.update(results=[1]), "it has no results"),
        (damage, "layers[0] lacks histogram"),
    ],
)
def test_broken_files_are_listed_and_skipped(write, change, said):
    write("bh")
    broken = write("broken", alpha=0.5, change=change)
    loaded = load_experiments([write.folder])
    assert len(loaded.frame) == 3
    ((path, sentence),) = loaded.problems
    assert path == broken
    assert said in sentence
    assert str(broken) in sentence


def test_half_a_file_is_listed_and_skipped(write):
    file = write("bh")
    file.with_name("results_2026-02-02T00-00-00.0.json").write_text(file.read_text()[:500])
    loaded = load_experiments([write.folder])
    assert len(loaded.frame) == 3
    assert "could not be read" in loaded.problems[0][1]


def test_only_broken_files_make_an_empty_table(write):
    write("bh", change=lambda content: content.pop("results"))
    loaded = load_experiments([write.folder])
    assert loaded.frame.empty
    assert loaded.layers.empty
    assert {name: str(kind) for name, kind in loaded.frame.dtypes.items()} == COLUMNS
    assert len(loaded.problems) == 1
    write_tables(loaded.frame, write.folder / "tables")


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"There is no results_\*\.json below"):
        load_experiments([tmp_path])
    with pytest.raises(DataError, match="There is no folder"):
        load_experiments([tmp_path / "missing"])


def test_files_named_by_the_user_and_single_files_are_read(write):
    file = write("bh")
    named = file.with_name(file.name.replace("results_", "mine_"))
    file.rename(named)
    (named.parent / "notes.json").write_text("{}")
    assert len(load_experiments([write.folder]).frame) == 3
    loaded = load_experiments([named])
    assert len(loaded.frame) == 3
    assert loaded.documents("run-1", WIKITEXT) is not None


def test_copies_are_read_once(write):
    file = write("bh")
    shutil.copytree(file.parent, write.folder / "copy")
    loaded = load_experiments([write.folder])
    assert len(loaded.frame) == 3
    assert "is a copy of" in loaded.notes[0][1]
    assert loaded.problems == []
    content = json.loads(file.read_text()) | {"date": 77.0}
    (write.folder / "copy" / file.name).write_text(json.dumps(content))
    assert "run id run-1" in load_experiments([write.folder]).problems[0][1]


def test_requests_from_a_cache_are_told(write):
    def cached(content):
        content["config"]["bh"]["summary"]["cached_requests"] = 3

    write("bh", change=cached)
    loaded = load_experiments([write.folder])
    assert loaded.frame["cached_requests"].tolist() == [3, 3, 3]
    assert "3 requests" in loaded.notes[0][1]


def test_documents_that_are_missing_are_a_problem_once_they_are_needed(write):
    file = write("bh")
    (samples,) = file.parent.glob(f"samples_{LAMBADA}*")
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:3]))
    loaded = load_experiments([write.folder])
    assert loaded.documents("run-1", LAMBADA) is None
    assert loaded.documents("run-1", LAMBADA) is None
    ((path, sentence),) = loaded.problems
    assert (path, "3 of 4 documents" in sentence) == (samples, True)
    samples.write_text("{")
    with pytest.raises(DataError, match="Line 1 of"):
        read_documents(samples)


# Routing logs


def test_one_routing_log_gives_all_runs_their_token_perplexity(write):
    write("stock", model="hf", loss=(1.0, 2.0, 3.0, 1.5))
    write("bh", loss=2.0, log=True)
    write("unlogged", alpha=0.5, loss=3.0, samples=False)
    loaded = load_experiments([write.folder])
    for task in (WIKITEXT, LAMBADA):
        frame = loaded.frame[loaded.frame["task"] == task].set_index("strategy")["perplexity"]
        nats = np.dot(write.lengths, (1.0, 2.0, 3.0, 1.5))
        assert frame["top-4 (hf)"] == pytest.approx(math.exp(nats / TOKENS))
        assert frame["BH a=0.40, max 4"] == pytest.approx(math.exp(2.0))
        assert math.isnan(frame["BH a=0.50, max 4"])  # no samples: no loglikelihoods
    assert loaded.frame[loaded.frame["task"] == HELLASWAG]["perplexity"].isna().all()
    assert loaded.documents("run-2", WIKITEXT)["tokens"].tolist() == list(write.lengths)


def test_a_routing_log_may_be_written_in_another_way(write):
    """Keys in another order and more spaces: it cannot be searched, so it is parsed."""
    write("bh", loss=2.0, log=True)
    expected = load_experiments([write.folder]).frame["perplexity"]
    assert expected.notna().sum() == 2
    for file in (write.folder / "logs").rglob("*_internal_routing.json"):
        file.write_text(json.dumps(json.loads(file.read_text()), indent=2, sort_keys=True))
    pd.testing.assert_series_equal(load_experiments([write.folder]).frame["perplexity"], expected)


def test_two_tasks_of_one_data_set_have_a_log_each(write):
    """hf-bh puts the task's name in front of the second log of a name."""
    write("bh", tasks=(WIKITEXT,), log=True)
    (log,) = (write.folder / "logs").rglob("*_internal_routing.json")
    manifest = log.with_name("routing.json")
    content = json.loads(manifest.read_text())
    content["files"].append(f"{WIKITEXT}_{log.name}")
    manifest.write_text(json.dumps(content))
    own = log.with_name(content["files"][1])
    shutil.copy(log, own)
    assert load_experiments([write.folder]).internal_routing_file("run-1", WIKITEXT) == own


def test_a_routing_log_of_some_documents_gives_no_token_perplexity(write):
    write("bh", log=True)
    for file in (write.folder / "logs").rglob("*_internal_routing.json"):
        content = json.loads(file.read_text())
        content["samples"].pop()
        file.write_text(json.dumps(content))
    assert "token" not in load_experiments([write.folder]).frame["perplexity_of"].tolist()


def test_a_routing_log_is_found_where_it_was_moved_to(write, tmp_path_factory):
    write("bh", log=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(write.folder / "logs", elsewhere / "moved")
    loaded = load_experiments([write.folder])
    assert loaded.log_folder("run-1") is None
    assert "give the folder that it was moved to" in loaded.notes[0][1]
    loaded = load_experiments([write.folder, elsewhere])
    assert loaded.notes == []
    assert loaded.log_folder("run-1") == elsewhere / "moved" / "run-1"
    assert loaded.internal_routing_file("run-1", WIKITEXT).is_file()


def test_a_routing_log_without_manifest_is_a_problem(write):
    file = write("bh", log=True)
    (write.folder / "logs" / "run-1" / "routing.json").unlink()
    loaded = load_experiments([write.folder])
    assert len(loaded.frame) == 3
    ((path, sentence),) = loaded.problems
    assert path == file
    assert "did not finish" in sentence
    assert loaded.internal_routing_file("run-1", WIKITEXT) is None


def test_stability_of_repeated_runs(write):
    write("first", log=True, seed=1, loss=(1.0, 2.0, 3.0, 4.0))
    write("second", log=True, seed=1, loss=(1.0, 2.0, 3.0, 5.0))
    write("other", log=True, alpha=0.5)
    frame = load_experiments([write.folder]).frame
    repeated = frame[frame["alpha"] == 0.4]
    assert repeated["configuration"].nunique() == 1
    assert repeated["output_determinism"].tolist() == [75.0] * 6
    assert repeated["expert_overlap_score"].tolist() == [1.0] * 6
    single = frame[frame["alpha"] == 0.5]
    assert single[["output_determinism", "expert_overlap_score"]].isna().all(axis=None)


def test_a_run_without_logs_has_no_overlap(write):
    write("first", log=True)
    write("second")
    frame = load_experiments([write.folder]).frame
    assert frame["expert_overlap_score"].isna().all()
    assert frame["output_determinism"].tolist() == [100.0] * 6


def test_average_accuracy_is_over_the_same_tasks_for_all(write):
    write("all", right=(1, 1, 0, 0))
    write("lambada", alpha=0.5, tasks=(WIKITEXT, LAMBADA), right=(1, 1, 1, 1))
    frame = load_experiments([write.folder]).frame
    assert frame[frame["alpha"] == 0.4]["avg_task_accuracy"].tolist() == [0.5] * 3
    assert frame[frame["alpha"] == 0.5]["avg_task_accuracy"].isna().all()
    # What the first run lacks, a further run of the configuration may bring.
    write("hellaswag", alpha=0.5, tasks=(HELLASWAG,), right=(0, 0, 0, 0))
    frame = load_experiments([write.folder]).frame
    assert frame[frame["alpha"] == 0.5]["avg_task_accuracy"].tolist() == [0.5] * 3


# Tables


def test_tables(write):
    write("top", rule="topk")
    write("bh", log=True)
    frame = load_experiments([write.folder]).frame
    paths = write_tables(frame, write.folder / "tables")
    assert [path.name for path in paths] == [
        f"bh_routing_results.{suffix}" for suffix in ("csv", "json", "md", "tex")
    ]
    csv, records = pd.read_csv(paths[0]), json.loads(paths[1].read_text())
    assert list(csv) == list(records[0]) == list(COLUMNS)
    assert len(csv) == len(records) == 6
    for name in ("avg_experts", "perplexity", "gini_coefficient"):
        assert csv[name].to_numpy() == pytest.approx(frame[name].to_numpy(), nan_ok=True)
        assert [record[name] for record in records] == [
            None if math.isnan(value) else value for value in frame[name]
        ]
    assert records[0]["baseline"] is True
    assert records[0]["alpha"] is None
    assert records[0]["max_k"] == 4
    assert ",top-4," in paths[0].read_text()
    lines = paths[2].read_text().splitlines()
    assert len(lines) == 8
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "top-k at equal experts" in lines[0]  # empty here, but it must be asked for
    assert "group" not in lines[0]
    latex = paths[3].read_text()
    assert "bh\\_wikitext" in latex
    assert latex.count(r"\\") == 7


def test_tables_are_the_same_whatever_the_order_of_folders(write):
    write("b", alpha=0.5)
    write("a", alpha=0.3, log=True)
    write("c", rule="topk", max_k=2)
    folders = [write.folder / name for name in ("a", "b", "c", "logs")]
    contents = []
    for number, order in enumerate((folders, folders[::-1])):
        paths = write_tables(load_experiments(order).frame, write.folder / f"tables{number}")
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]


def test_reading_needs_no_torch():
    code = (
        "import sys, lm_eval_bh.analysis.table.experiments, lm_eval_bh.analysis.compare.paired, "
        "lm_eval_bh.analysis.table.flops\n"
        "print({'torch', 'transformers', 'lm_eval', 'scipy', 'statsmodels'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_earlier_prototypes_readers_find_their_columns(write, tmp_path):
    write("top", rule="topk", max_k=2)
    write("bh", alpha=0.4)
    write("by", rule="by", alpha=0.35, statistic="contribution", target_experts=3.0, budget="model")
    write("stock", model="hf")
    frame = load_experiments([write.folder]).frame
    write_tables(frame, tmp_path)
    table = pd.read_csv(tmp_path / "bh_routing_results.csv")
    assert list(table)[:8] == [
        "config_name",
        "routing_type",
        "k_or_max_k",
        "alpha",
        "dataset",
        "perplexity",
        "avg_experts",
        "perplexity_of",
    ]
    assert not {"mean_experts", "mean_experts_model"} & set(table)
    rows = table[table["dataset"] == "wikitext"].set_index("config_name")
    assert rows["routing_type"].to_dict() == {
        "2experts_topk_baseline": "topk",
        "4experts_topk_baseline_hf": "topk",
        "4experts_bh_a040": "bh",
        "4experts_by_target_3_contribution": "by",
    }
    assert rows["k_or_max_k"].tolist() == rows["max_k"].tolist()
    assert rows.loc["4experts_bh_a040", "alpha"] == 0.4


def test_a_task_without_token_perplexity_shows_its_own_and_says_so(write, tmp_path):
    write("bh")
    frame = load_experiments([write.folder]).frame.set_index("task")
    kinds = {WIKITEXT: "word", LAMBADA: "target word", HELLASWAG: None}
    assert frame["perplexity_of"].to_dict() == kinds
    for task, own in ((WIKITEXT, "word_perplexity"), (LAMBADA, "target_perplexity")):
        row = frame.loc[task]
        assert row["perplexity"] == row[own]
        assert row["perplexity_stderr"] == pytest.approx(row[f"{own}_stderr"], nan_ok=True)
    assert pd.isna(frame.loc[HELLASWAG, "perplexity"])
    # For people, each kind has its own column.
    write_tables(frame.reset_index(), tmp_path)
    head = (tmp_path / "bh_routing_results.md").read_text().splitlines()[0]
    assert "target ppl" in head
    assert "token ppl" not in head


def test_a_task_that_has_token_perplexity_is_never_given_another():
    names = ["perplexity", "word_perplexity", "target_perplexity", "byte_perplexity"]
    frame = pd.DataFrame({"group": 1, "task": [WIKITEXT] * 2} | dict.fromkeys(names, math.nan))
    frame = frame.assign(perplexity=[7.0, math.nan], word_perplexity=[90.0, 95.0])
    frame = frame.assign(perplexity_of=None, **{f"{name}_stderr": math.nan for name in names})
    fill_perplexity(frame)
    assert frame["perplexity"].tolist() == pytest.approx([7.0, math.nan], nan_ok=True)
    assert frame["perplexity_of"].tolist() == ["token", None]


def test_tables_of_earlier_releases_are_read_by_their_names(write, tmp_path):
    write("bh")
    frame = load_experiments([write.folder]).frame
    earlier = {"avg_experts": "mean_experts", "avg_experts_model": "mean_experts_model"}
    frame.rename(columns=earlier).to_csv(tmp_path / "earlier.csv", index=False)
    pd.testing.assert_series_equal(
        read_table(tmp_path / "earlier.csv")["avg_experts"], frame["avg_experts"]
    )


@pytest.mark.parametrize("name", ["./m", "../work/m", "m"])
def test_a_path_is_one_model_however_it_is_given(name, write, tmp_path, monkeypatch):
    folder = tmp_path / "work" / "m"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    write("bh", pretrained=str(folder))
    write("top4", rule="topk", alpha=None, pretrained=name)
    assert load_experiments([write.folder]).frame["group"].nunique() == 1
    write("other", alpha=0.3, pretrained=str(tmp_path / "other" / "m"))
    with pytest.raises(DataError, match="model"):
        load_experiments([write.folder])
