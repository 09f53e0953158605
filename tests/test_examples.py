"""The training example: its measurements equal those of its loaded output."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import BHRoutingIntegration
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.tables.texts import text_batches

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LENGTH = 64


@pytest.fixture
def train(monkeypatch):
    """Return examples/train.py as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train")


@pytest.fixture
def texts(tmp_path):
    """Two text files of the shipped articles: for training, and held out."""
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line)["page"] for line in lines]
    files = {"train_text": tmp_path / "train.txt", "held_out_text": tmp_path / "held_out.txt"}
    for file, part in zip(files.values(), (pages[:30], pages[30:]), strict=True):
        file.write_text("\n".join(part), encoding="utf-8")
    return files


@pytest.fixture
def run(train, texts, tmp_path):
    """Return a function that trains for some steps."""

    def run(**options):
        return train.main(
            output=tmp_path / "trained",
            batch=4,
            length=LENGTH,
            calibration_tokens=2048,
            held_out_tokens=2048,
            device="cpu",
            **texts,
            **options,
        )

    return run


def windows_of(file):
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    found = text_batches(tokenizer, [file.read_text()], tokens=2048, length=LENGTH, batch=4)
    return [ids for ids in found if ids.shape[1] == LENGTH]


@pytest.mark.filterwarnings("ignore")
def test_a_trained_model_and_its_policy_give_again_what_was_measured(run, train, texts, tmp_path):
    found = run(steps=12, recalibrate_every=5, rate=1e-3)
    assert found["before, top-k"].experts == found["after, top-k"].experts == 8
    assert 1 < found["after, routed"].experts < 8
    # 3,000 tokens of the same kind of text teach it something, routed or not
    for how in ("top-k", "routed"):
        assert found[f"after, {how}"].perplexity < found[f"before, {how}"].perplexity
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    policy = Policy.load(tmp_path / "trained" / "policy.safetensors")
    again = train.measure(
        model,
        BHRoutingIntegration(model, policy=policy),
        windows_of(texts["held_out_text"]),
    )
    assert again.experts == found["after, routed"].experts
    assert again.perplexity == pytest.approx(found["after, routed"].perplexity, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_null_model_is_refitted_on_its_schedule(run, train, monkeypatch):
    """Every third step, on routers that have changed, and at the end."""
    seen = []
    calibrate = train.calibrate

    def noting(*args, **kwargs):
        made = calibrate(*args, **kwargs)
        seen.append(made.header.fingerprint)
        return made

    monkeypatch.setattr(train, "calibrate", noting)
    run(steps=7, recalibrate_every=3)
    assert len(seen) == len(set(seen)) == 3
    seen.clear()
    run(steps=3, recalibrate_every=0)
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_trained_under_a_policy_and_leave_all_else_alone(run, train, texts, tmp_path):
    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(tiny_olmoe())
    policy = tmp_path / "policy.safetensors"
    BHRoutingIntegration(plain, rule="top_p", alpha=0.5, max_k=6).policy().save(policy)
    found = run(steps=6, lora_rank=2, policy=policy, rate=1e-2)
    assert found["after, routed"].perplexity < found["before, routed"].perplexity
    saved = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name and "self_attn" in name for name in saved)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "trained")
    routing = BHRoutingIntegration(adapted, policy=tmp_path / "trained" / "policy.safetensors")
    again = train.measure(adapted, routing, windows_of(texts["held_out_text"]))
    assert again == found["after, routed"]
