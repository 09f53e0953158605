"""The registered hf-bh: its arguments, its reports, and its errors."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lm_eval.api.registry import get_model

from lm_eval_bh import BHError, ModelError, NullModelError, ParameterError
from lm_eval_bh.harness.model import BHLM, DEFAULT_MODEL
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.schema import experiment_name

DEMO = ["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag"]

TINY = "pretrained=tiny-olmoe"


def numbers(results):
    """Return the metrics of every task, without names and missing standard errors."""
    return {
        (task, metric): value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }


def test_the_registry_knows_hf_bh():
    assert get_model("hf-bh") is BHLM


@pytest.mark.parametrize(
    "arguments", ["rule=topk,max_k=8", "min_k=8,max_k=8,alpha=0.4", "mode=analyze,alpha=0.4"]
)
def test_eight_fixed_experts_are_the_stock_model_to_the_last_digit(evaluate, arguments):
    stock = evaluate("hf", f"pretrained={tiny_olmoe()}", DEMO, limit=8)
    ours = evaluate("hf-bh", f"{TINY},{arguments}", DEMO, limit=8)
    assert numbers(ours) == numbers(stock)
    assert len(numbers(ours)) >= 6


def test_mean_experts_rise_with_the_level_and_are_reported(evaluate):
    means = []
    for alpha in (0.3, 0.4, 0.5, 0.6):
        results = evaluate("hf-bh", f"{TINY},alpha={alpha},max_k=8", DEMO, limit=4)
        bh = results["config"]["bh"]
        assert bh["config"]["alpha"] == alpha
        assert bh["config"]["rule"] == "bh"
        assert (bh["num_layers"], bh["num_experts"], bh["native_top_k"]) == (4, 64, 8)
        assert bh["null_model"]["model"] == "tiny-olmoe"
        summary = bh["summary"]
        assert set(summary["tasks"]) == set(DEMO)
        assert len(summary["layers"]) == 4
        layer_means = [layer["mean_experts"] for layer in summary["layers"]]
        assert sum(layer_means) / 4 == pytest.approx(summary["mean_experts_per_token"])
        assert sum(task["tokens"] for task in summary["tasks"].values()) == summary["tokens"]
        means.append(summary["mean_experts_per_token"])
    assert 1 < means[0] < means[1] < means[2] < means[3] < 8


def test_a_solved_target_is_in_the_results(evaluate, monkeypatch, tmp_path):
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text().splitlines()[:8]
    pages = [json.loads(line)["page"] for line in lines]
    monkeypatch.setattr("lm_eval_bh.routing.heard.wikitext_texts", lambda *_: pages)
    arguments = f"{TINY},target_experts=5,budget=layer,log_routing=samples,log_dir={tmp_path}"
    results = evaluate("hf-bh", arguments, DEMO[1:2], limit=2)
    config = json.loads(json.dumps(results["config"]["bh"]["config"]))
    assert (config["target_experts"], config["budget"]) == (5, "layer")
    assert list(config["solved"]["layer_means"].values()) == pytest.approx([5] * 4, rel=0.02)
    assert config["alpha"] == pytest.approx(sum(config["solved"]["alphas"].values()) / 4)
    name = experiment_name("bh", 8, config["alpha"], DEMO[1])
    assert list(tmp_path.rglob(f"{name}_internal_routing.json"))


@pytest.mark.parametrize("arguments", ["rule=random_k,seed=1,max_k=4", "rule=min_p,alpha=0.3"])
def test_controls_route_and_say_so(evaluate, arguments):
    bh = evaluate("hf-bh", f"{TINY},{arguments}", DEMO[1:2], limit=2)["config"]["bh"]
    assert bh["null_model"] is None
    assert 1 < bh["summary"]["mean_experts_per_token"] <= 8
    repeated = evaluate("hf-bh", f"{TINY},{arguments}", DEMO[1:2], limit=2, batch_size=1)
    assert repeated["config"]["bh"]["summary"]["layers"] == bh["summary"]["layers"]


def test_results_are_plain_json_values(evaluate):
    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for item in value.values():
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (str, int, float, bool)

    check(evaluate("hf-bh", f"{TINY},alpha=0.4", DEMO[1:2], limit=2)["config"]["bh"])


def test_padding_does_not_count(evaluate):
    """One document per batch has no padding; the same documents in one batch have padding."""
    summaries = [
        evaluate("hf-bh", f"{TINY},alpha=0.4,dtype=float32", DEMO, limit=6, batch_size=size)[
            "config"
        ]["bh"]["summary"]
        for size in (1, 6)
    ]
    assert [s["padding_tokens"] > 0 for s in summaries] == [False, True]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    assert summaries[0]["mean_experts_per_token"] == summaries[1]["mean_experts_per_token"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("alpha=1.5", "strictly between 0 and 1"),
        ("alpha=high", "found 'high'"),
        ("max_k=0", "1 or more: found 0"),
        ("max_k=4.5", "max_k must be an integer"),
        ("max_k=2,min_k=4", "max_k=2 is less than min_k=4"),
        ("rule=bhh", "did you mean 'bh'"),
        ("mode=analyse", "did you mean 'analyze'"),
        ("kde=nowhere.safetensors", "not a file or folder"),
        ("alhpa=0.4", "did you mean 'alpha'"),
        ("experts=fast", "found 'fast'"),
        ("layers=some", "found 'some'"),
        ("rule=topk,alpha=0.4", "alpha=0.4 has no meaning with rule=topk"),
        ("rule=topk,max_k=8,min_k=2", "min_k=2 contradicts rule=topk"),
        ("rule=random_k,alpha=0.4", "alpha=0.4 has no meaning with rule=random_k"),
        ("rule=top_p,kde=auto", "null_model='auto' has no meaning with rule=top_p"),
        ("rule=top_p,null=expert", "null_scope='expert' has no meaning with rule=top_p"),
        ("rule=bh,seed=3", "seed=3 has no meaning with rule=bh"),
        ("alpha=0.4,target_experts=5", "alpha=0.4 contradicts target_experts=5"),
        ("target_experts=9", "between min_k=1 and max_k=8"),
        ("budget=layer", "without target_experts"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_looked_for(arguments, sentence):
    with pytest.raises(ParameterError) as caught:
        BHLM.create_from_arg_string(f"pretrained=no/such-model,{arguments}")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_experts_than_the_model_has_is_refused_before_weights_load(monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises(ParameterError, match="more than the model's 64 experts"):
        BHLM(pretrained="tiny-olmoe", alpha=0.4, max_k=65, device="cpu")


def test_without_pretrained_it_means_olmoe_and_offline_the_error_names_what_needs_no_network():
    arguments = {"alpha": 0.4}
    with pytest.raises(ModelError, match=DEFAULT_MODEL) as caught:
        BHLM.create_from_arg_obj(arguments, {"device": "cpu"})
    assert "pretrained=tiny-olmoe" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert arguments["pretrained"] == DEFAULT_MODEL


def test_a_dense_model_is_refused(tmp_path, tiny_model_folder):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=4096,
        )
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no MoE routers"):
        BHLM(pretrained=str(tmp_path), alpha=0.4, device="cpu")


def test_a_null_model_of_another_model_is_refused(tmp_path, shared):
    from lm_eval_bh import NullModel

    NullModel.from_pickles(shared / "olmoe_kde", model="allenai/OLMoE-1B-7B-0924").save(
        tmp_path / "olmoe.safetensors"
    )
    with pytest.raises(NullModelError, match="allenai/OLMoE-1B-7B-0924"):
        BHLM(
            pretrained="tiny-olmoe",
            alpha=0.4,
            kde=str(tmp_path / "olmoe.safetensors"),
            device="cpu",
        )


@pytest.mark.slow
def test_the_stock_command_understands_the_literal_line(tmp_path):
    """It states the size of the download before it contacts the hub, which is empty here."""
    said = tmp_path / "stderr"
    at_requests = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            at_requests.append(said.read_text())
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    line = "--model hf-bh --model_args alpha=0.4,max_k=8 --tasks lambada"
    command = [str(Path(sys.executable).with_name("lm_eval")), *line.split()]
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    try:
        with said.open("w") as errors:
            run = subprocess.run(command, stderr=errors, env=os.environ | hub, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    assert run.returncode == 1
    assert f"{DEFAULT_MODEL} is not on this machine: it has 14 GB to download" in at_requests[0]
    last = said.read_text().strip().splitlines()[-1]
    assert last.startswith(f"lm-eval-bh: error: The model '{DEFAULT_MODEL}' could not be loaded")
    assert "Traceback" not in said.read_text()


def test_every_error_has_one_base():
    assert all(issubclass(kind, BHError) for kind in (ParameterError, ModelError, NullModelError))
