"""Rows decoded together: grouped independently of the batch size, counted as routed."""

from __future__ import annotations

import pyarrow.dataset
import pytest
import torch

from lm_eval_bh import BHRoutingIntegration, RoutingConfig
from lm_eval_bh.harness.decode_batches import decode_batches
from lm_eval_bh.routing.releases import returned_cache

DEMO = ["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag"]
METHODS = {
    "topk": "rule=topk,max_k=3",
    "min_w": "rule=min_w,alpha=0.05",
    "oea": "rule=oea,k0=1",
    "batch_min_w": "rule=batch_min_w,alpha=0.05,mass=0.2",
}


@pytest.mark.parametrize("rows", [5, 8, 33])
def test_groups_are_of_one_task_and_hold_every_request_once(rows):
    names = [("a", n // 2) for n in range(rows)] + [("b", n) for n in range(rows)]
    groups = decode_batches(names, 4, seed=0)
    assert sorted(position for group in groups for position in group) == list(range(2 * rows))
    for group in groups:
        assert len({names[position][0] for position in group}) == 1
        assert len({names[position] for position in group}) <= 4
    sizes = [len({names[position] for position in group}) for group in groups]
    assert sizes.count(4) == -(-rows // 2) // 4 + rows // 4
    assert groups != decode_batches(names, 4, seed=1)
    assert groups == decode_batches(names, 4, seed=0)


def recount(logs):
    """Return the mean number of distinct experts per layer and step, from the Parquet log."""
    folder = next(logs.glob("*/tokens"))
    table = pyarrow.dataset.dataset(folder, format="parquet").to_table().to_pandas()
    steps = table[table["step"] >= 0].groupby(["step", "layer"])["experts"]
    return steps.apply(lambda rows: len({e for experts in rows for e in experts})).mean()


@pytest.mark.parametrize("name", METHODS)
def test_numbers_do_not_depend_on_the_batch_size_and_equal_a_recount(name, evaluate, tmp_path):
    found = []
    for batch_size in (2, 64):
        folder = tmp_path / str(batch_size)
        results = evaluate(
            "hf-bh",
            f"pretrained=tiny-olmoe,{METHODS[name]},decode_batch=3,log_routing=full,"
            f"log_dir={folder}",
            DEMO,
            limit=4,
            batch_size=batch_size,
        )
        bh = results["config"]["bh"]
        assert (bh["config"]["decode_batch"], bh["summary"]["decode_batch"]) == (3, 3)
        assert bh["summary"]["distinct_experts"] == pytest.approx(recount(folder), abs=1e-12)
        rows = bh["summary"]["tasks"]["bh_demo_lambada"]["steps_by_rows"]
        assert set(rows) <= {"1", "2", "3"}
        tasks = {task: dict(values) for task, values in bh["summary"]["tasks"].items()}
        for values in tasks.values():
            del values["seconds"]
        found.append((results["results"], tasks))
    assert found[0] == found[1]


def test_a_token_alone_has_as_many_distinct_experts_as_experts(evaluate):
    args = "pretrained=tiny-olmoe,rule=min_w,alpha=0.05,decode_batch=1"
    summary = evaluate("hf-bh", args, DEMO[:1], limit=2)["config"]["bh"]["summary"]
    assert summary["distinct_experts"] == pytest.approx(summary["mean_experts_per_token"])


def test_without_decode_batch_nothing_is_counted(evaluate):
    summary = evaluate("hf-bh", "pretrained=tiny-olmoe,rule=topk", DEMO[:1], limit=2)
    assert "distinct_experts" not in summary["config"]["bh"]["summary"]


@pytest.mark.parametrize("more", ["", ",decode_batch=2"])
def test_a_step_that_depends_on_the_batch_size_is_said_once(evaluate, caplog, more):
    evaluate("hf-bh", f"pretrained=tiny-olmoe,rule=oea{more}", DEMO[1:], limit=2, batch_size=2)
    assert caplog.text.count("its results depend on --batch_size") == (not more)


def test_a_group_larger_than_the_documents_is_counted_as_what_it_is(evaluate):
    args = "pretrained=tiny-olmoe,rule=oea,decode_batch=500"
    summary = evaluate("hf-bh", args, DEMO[:1], limit=2)["config"]["bh"]["summary"]
    assert max(map(int, summary["steps_by_rows"])) < 30


def test_prompts_take_the_models_own_top_k_where_only_decoding_has_a_budget(evaluate):
    args = "pretrained=tiny-olmoe,rule=xshare,step_budget=2,max_k=2,decode_batch=4"
    every = evaluate("hf-bh", args, DEMO[1:], limit=4)["config"]["bh"]["summary"]
    decode = evaluate("hf-bh", f"{args},phase=decode", DEMO[1:], limit=4)["config"]["bh"]["summary"]
    assert decode["mean_experts_per_token"] == every["mean_experts_per_token"] == 2
    steps = [sum(found["steps_by_rows"].values()) for found in (every, decode)]
    assert 0 < steps[1] < steps[0]


@pytest.fixture(scope="module")
def tiny(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["oea", "batch_min_w", "xshare"])
def test_one_pass_over_rows_equals_decoding_them_side_by_side(name, tiny):
    """With a cache of keys and values, token by token."""
    own = {"oea": {"k0": 1}, "batch_min_w": {"alpha": 0.2}, "xshare": {"step_budget": 12}}[name]
    config = RoutingConfig(rule=name, decode_batch=8, **own)
    ids = torch.randint(4, 4000, (8, 12), generator=torch.Generator().manual_seed(0))
    with BHRoutingIntegration(tiny, config) as routing, torch.no_grad():
        whole = tiny(ids).logits
        distinct = routing.get_routing_stats()["distinct_experts"]
        routing.reset_stats()
        cache, steps = {}, []
        for position in range(ids.shape[1]):
            out = tiny(ids[:, position : position + 1], **cache, use_cache=True)
            cache = returned_cache(out)
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
        assert routing.get_routing_stats()["distinct_experts"] == pytest.approx(distinct)


def test_a_row_depends_on_the_rows_beside_it_and_on_no_padding(tiny):
    ids = torch.randint(4, 4000, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    other = torch.where(mask.bool(), ids, 17)
    config = RoutingConfig(rule="oea", k0=1, decode_batch=4)
    with BHRoutingIntegration(tiny, config), torch.no_grad():
        ours = tiny(ids, attention_mask=mask).logits[mask.bool()]
        theirs = tiny(other, attention_mask=mask).logits[mask.bool()]
        alone = tiny(ids[:1]).logits[0]
    torch.testing.assert_close(ours, theirs)
    assert (alone - ours[:9]).abs().max() > 1e-3


def test_generation_counts_the_steps_it_really_decoded(evaluate, tmp_path):
    task = {
        "task": "answer",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "prompts.json")},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"max_gen_toks": 5, "until": ["\n\n"]},
        "metric_list": [{"metric": "bypass"}],
    }
    prompts = ["The", "A ship of", "In the year", "Her", "The river runs"]
    (tmp_path / "prompts.json").write_text(
        "\n".join(f'{{"text": "{text}"}}' for text in prompts), encoding="utf-8"
    )
    args = "pretrained=tiny-olmoe,rule=oea,decode_batch=4,phase=decode,log_routing=full"
    results = evaluate("hf-bh", f"{args},log_dir={tmp_path / 'log'}", [task], batch_size=1)
    summary = results["config"]["bh"]["summary"]
    assert summary["distinct_experts"] == pytest.approx(recount(tmp_path / "log"))
    assert set(summary["steps_by_rows"]) <= {"1", "2", "3", "4"}
