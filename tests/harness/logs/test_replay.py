"""A log is replayed: every token gets its logged experts, whatever runs the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_bh import BHRoutingIntegration, DataError, ParameterError, RoutingConfig
from lm_eval_bh.analysis.compare.route_diff import diff_routes
from lm_eval_bh.analysis.compare.same_texts import same_tokens
from lm_eval_bh.errors import RoutingError
from lm_eval_bh.logged_rows import read_logged_rows
from lm_eval_bh.resources import tiny_olmoe
from lm_eval_bh.routing.releases import returned_cache

ARGS = "pretrained=tiny-olmoe,max_length=48,dtype=float32"


def test_its_own_log_gives_the_same_log_probabilities(run, tmp_path):
    """In windows and in generations too, at another batch size; generations one row at a time."""
    rules = {"before": "min_w,alpha=0.05", "after": f"replay,routes={tmp_path / 'before'}"}
    logs, answers, used = [], [], []
    for name, rule in rules.items():
        how = f"rule={rule},mass=0.2,log_routing=full,log_dir={tmp_path / name}"
        size = 4 if name == "before" else 1
        results = run(how, model_args=ARGS, batch_size=size, log_samples=True)
        logs.append(read_logged_rows(tmp_path / name))
        used.append([x["usage"] for x in results["config"]["bh"]["summary"]["layers"]])
        answers.append([x["resps"] for x in results["samples"]["demo_generation"]])
    same = same_tokens(*logs)
    assert same.left_out == (0, 0)
    before, after = logs[0].loss[same.a], logs[1].loss[same.b]
    assert (~np.isnan(before)).sum() > 1000
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    np.testing.assert_allclose(logs[1].weights[same.b], logs[0].weights[same.a], rtol=0, atol=1e-5)
    assert diff_routes(*logs).pairs_differ == 0
    assert answers[0] == answers[1]
    assert used[0] == used[1]
    assert results["config"]["bh"]["config"]["alpha"] is None


def test_another_precision_is_brought_to_the_same_experts(run, full_logs, tmp_path):
    """The purpose of routing replay: bfloat16 routes like float32."""
    arguments = f"rule=replay,routes={full_logs['float32']},log_routing=full,log_dir={tmp_path}"
    model = "pretrained=tiny-olmoe,max_length=48,dtype=bfloat16"
    tasks = ["bh_demo_wikitext", "bh_demo_hellaswag"]
    run(arguments, model_args=model, tasks=tasks, batch_size=4)
    replayed, float32, bfloat16 = (
        read_logged_rows(path) for path in (tmp_path, full_logs["float32"], full_logs["bfloat16"])
    )
    assert diff_routes(float32, bfloat16).share > 0.01
    assert diff_routes(replayed, float32).pairs_differ == 0
    weights = [log.weights[log.token_ids == 0][:1].ravel() for log in (replayed, bfloat16)]
    assert weights[0] == pytest.approx(weights[1], abs=0.02)  # its own, of the recorded experts


@pytest.fixture
def replaying(full_logs):
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    with BHRoutingIntegration(model, rule="replay", routes=full_logs["float32"]):
        yield model, torch.from_numpy(first_row(full_logs))[None]


def first_row(full_logs):
    log = read_logged_rows(full_logs["float32"])
    return log.ids(next(row for row in log.rows if row.task == "bh_demo_wikitext"))


def test_a_cache_knows_what_it_holds(replaying):
    model, ids = replaying
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        cache = returned_cache(first)
        for past in (cache, copy.deepcopy(cache)):
            rest = model(ids[:, 7:], **past).logits
            torch.testing.assert_close(rest, expected[:, 7:], atol=2e-5, rtol=0)
    with pytest.raises(RoutingError, match=r"token with the id 3 at place 7.*, after nothing"):
        model(torch.tensor([[3]]), **returned_cache(model(ids[:, :7])))


def test_padding_on_either_side_stands_nowhere(replaying):
    model, ids = replaying
    mask = torch.ones(1, ids.shape[1] + 5, dtype=torch.int64)
    with torch.no_grad():
        expected = model(ids).logits
        for side in (slice(0, 5), slice(-5, None)):
            padded, own = torch.full_like(mask, 9), mask.clone()
            own[:, side] = 0
            padded[own.bool()] = ids[0]
            found = model(padded, attention_mask=own).logits[own.bool()]
            torch.testing.assert_close(found, expected[0], atol=2e-5, rtol=0)


def test_a_token_that_the_log_lacks_is_named(replaying, full_logs):
    model, ids = replaying
    other = ids.clone()
    other[0, 9] = 77
    with pytest.raises(RoutingError) as caught:
        model(other)
    shown = " ".join(map(str, ids[0, 3:9].tolist()))
    assert f"the token with the id 77 at place 9 of its row, after {shown}: " in str(caught.value)
    model(ids)  # and the next pass is served
    with pytest.raises(RoutingError, match="give the model input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(RoutingError, match="outside of its model"):
        model.model.layers[0].mlp(torch.zeros(1, 2, model.config.hidden_size))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "give routes="),
        ({"routes": "nowhere"}, "There is no folder nowhere"),
        ({"routes": "LOG", "max_k": 4}, "up to 8 experts per token, and max_k is 4: give max_k=8"),
        ({"routes": "LOG", "target_experts": 4}, "has no meaning with rule=replay"),
        ({"routes": "LOG", "rule": "topk"}, "routes=.* has no meaning with rule=topk"),
        ({"routes": 3}, "routes must be the folder of a full routing log: found 3"),
    ],
)
def test_what_cannot_be_replayed(arguments, sentence, full_logs):
    given = {"rule": "replay"} | arguments
    if given.get("routes") == "LOG":
        given["routes"] = full_logs["float32"]
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe())
    with pytest.raises((ParameterError, DataError), match=sentence):
        BHRoutingIntegration(model, config=RoutingConfig(**given)).patch_model()
