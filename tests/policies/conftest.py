"""Fixtures of policy searches: tiny-olmoe, and a text of many short paragraphs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh.policies.tuning.splits import Splits
from lm_eval_bh.resources import shipped


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """Return the paragraphs of the shipped demo articles."""
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line)["page"] for line in lines]
    return [part.strip() for page in pages for part in page.split("\n") if len(part) > 200]


@pytest.fixture(scope="session")
def splits(paragraphs) -> Splits:
    return Splits("demo", paragraphs[:-24], paragraphs[-24:-12], paragraphs[-12:])


@pytest.fixture(scope="session")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="session")
def tiny(tiny_model_folder):
    """Return the model that ships, for all tests: who patches it takes everything out again."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
