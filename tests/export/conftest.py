"""Policies of tiny-olmoe, and the texts for comparing them."""

from __future__ import annotations

import pytest
import torch
from made_policies import PARAMETERS, random_benefits, random_null
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import BHRoutingIntegration, NullModel
from lm_eval_bh.harness.demo_texts import demo_documents
from lm_eval_bh.resources import shipped, tiny_olmoe


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    """Return the token ids of a few demo texts."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    return [tokenizer(text).input_ids[:120] for text in demo_documents(4)]


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """Return the files of the policies, by name."""
    folder = tmp_path_factory.mktemp("policies")
    loaded = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    shipped_null = NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors")
    nulls = {"own": random_null(4, 64), "benefit": random_benefits(4, 64)}
    found = {}
    for name, parameters in PARAMETERS.items():
        null = nulls.get(name, shipped_null)
        integration = BHRoutingIntegration(loaded, null_model=null, **parameters)
        found[name] = folder / f"{name}.safetensors"
        integration.policy(made_for="tests").save(found[name])
    return found
