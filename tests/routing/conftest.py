"""Models for testing routing: the shipped one, and tiny ones of other families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import NullModel
from lm_eval_bh.resources import shipped

TEXT = (
    "The city lies on the northern bank of the river . In 1864 the old bridge was replaced by a "
    "stone arch , and the market moved to the square in front of the town hall . The album was "
    "released in May and reached number four in the charts ; critics praised the drums and the "
    "quiet second half . Three ships of the fleet reached the island before the storm ."
)


@pytest.fixture(scope="session")
def olmoe_null(shared: Path) -> NullModel:
    """Return the null model of the real OLMoE, imported from the shared tables."""
    return NullModel.from_pickles(shared / "olmoe_kde")


@pytest.fixture(scope="session")
def null() -> NullModel:
    """Return the shipped null model of tiny-olmoe."""
    return NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors")


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder: Path):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="session")
def ids(tokenizer) -> torch.Tensor:
    """Token ids int64 [2, 40] of an English text."""
    return tokenizer(TEXT, return_tensors="pt").input_ids[:, :80].reshape(2, 40)


@pytest.fixture
def tiny(tiny_model_folder: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    """Return the shipped demo articles, about 10,000 tokens."""
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["page"] for line in lines]
