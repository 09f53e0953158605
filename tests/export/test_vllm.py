"""In vLLM policies give hf-bh's log-probabilities: ``scripts/verify_vllm.sh`` runs this."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import BHRoutingIntegration, Policy
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.verification import verify
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


@pytest.mark.parametrize("name", ["bh", "static", "tuned", "top8", "own"])
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
