"""In vLLM policies give hf-bh's log-probabilities: ``scripts/verify_vllm.sh`` runs this."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import BHRoutingIntegration, Policy
from lm_eval_bh.export import verification
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.model_folder import export_folder
from lm_eval_bh.export.verification import TOLERANCE, verify
from lm_eval_bh.export.vllm_folder import write_for_vllm
from lm_eval_bh.harness.demo_texts import demo_documents
from lm_eval_bh.resources import tiny_olmoe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None,
        reason="needs vLLM, which is not installed: scripts/verify_vllm.sh makes an environment",
    ),
]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """Return the file of a policy whose threshold was solved for a mean of four experts."""
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    integration = BHRoutingIntegration(
        model,
        rule="min_w",
        target_experts=4,
        tokenizer=AutoTokenizer.from_pretrained(tiny_olmoe()),
        texts=demo_documents(100),
    )
    path = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    integration.policy().save(path)
    return path


@pytest.mark.parametrize("name", ["bh", "static", "tuned", "top8", "own", "benefit"])
@pytest.mark.parametrize("engine", ["vllm", "vllm-plugin"])
def test_it_scores_as_hf_bh(engine, name, policies, tuned):
    file = tuned if name == "tuned" else policies[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    found = verify(
        Policy.load(file),
        Checkpoint.find(str(tiny_olmoe())),
        [tokenizer(text).input_ids[:511] for text in demo_documents(50)],
        engine=engine,
        name="tiny-olmoe",
        policy_file=file,
    )
    assert found.agrees, found
    assert found.same_text


@pytest.mark.parametrize("how", ["exported folder", "hf_overrides"])
def test_other_ways_to_its_own_model(how, policies, documents, tmp_path):
    """With the plugin, an exported folder needs neither its code nor an environment variable."""
    checkpoint = Checkpoint.find(str(tiny_olmoe()))
    folder, options = tmp_path / "out", {}
    if how == "exported folder":
        policy = Policy.load(policies["bh"])
        export_folder(policy, checkpoint, folder, name="tiny-olmoe", link=True, untie=True)
    else:
        write_for_vllm(checkpoint, folder)
        options = {"hf_overrides": {"lm_eval_bh_policy": str(policies["bh"])}}
    found = verification.in_engine(
        sys.executable,
        tmp_path,
        engine="vllm-plugin",
        documents=documents,
        folder=folder,
        options=options,
    )
    expected = verification.reference(Policy.load(policies["bh"]), tiny_olmoe(), documents)
    for ours, theirs in zip(expected["log_probs"], found["log_probs"], strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < TOLERANCE
