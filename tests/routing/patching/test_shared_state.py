"""Other users of a model, its masks and its caches: used only if understood."""

from __future__ import annotations

import logging

import lm_eval
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import lm_eval_bh
from lm_eval_bh import BHRoutingIntegration
from lm_eval_bh.errors import ModelError
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.harness.sweep.task_names import new_task_manager

SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else it takes most memory


@pytest.fixture
def padded(ids):
    """Return token ids int64 [2, 40] and a mask whose second row is padded on the left."""
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    return ids, mask


@pytest.mark.parametrize(
    "call",
    [
        lambda base, ids, mask: base(ids, mask),
        lambda base, ids, mask: base(ids, attention_mask=mask),
        lambda base, ids, mask: base(input_ids=ids, attention_mask=mask),
    ],
    ids=["by position", "ids by position", "by keyword"],
)
def test_a_mask_is_seen_however_it_is_given(tiny, null, padded, call):
    ids, mask = padded
    with BHRoutingIntegration(tiny, alpha=0.4, kde=null) as routing, torch.no_grad():
        call(tiny.model, ids, mask)
        assert routing.counters.tokens(0) == int(mask.sum())


@pytest.mark.parametrize("options", [{"rule": "topk", "max_k": 8}, {"alpha": 0.4}], ids=str)
def test_continuous_batching_generates_what_generate_does(tiny, null, tokenizer, caplog, options):
    texts = [
        "The river flows through the city and",
        "The history of the old castle on the hill above the town",
    ]
    prompts = [tokenizer(text).input_ids for text in texts]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=0, pad_token_id=1)
    with BHRoutingIntegration(tiny, kde=null, **options), caplog.at_level(logging.WARNING):
        expected = [
            tiny.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
            for ids in prompts
        ]
        found = tiny.generate_batch(prompts, config, SMALL, progress_bar=False)
    assert [list(one.generated_tokens) for one in found.values()] == [e.tolist() for e in expected]
    assert caplog.text.count("padding cannot be told from text") == 1


def test_continuous_batching_decodes_its_requests_together(tiny, tokenizer):
    """As generate does with both prompts in a batch, which take the model's own top-k."""
    texts = ["The river flows through the city and", "The history of the old castle on the hill"]
    prompts = [tokenizer(text).input_ids for text in texts]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=1)
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    own = {"rule": "oea", "k0": 1, "max_k": 3, "decode_batch": 2, "phase": "decode"}
    found, distinct = [], []
    with BHRoutingIntegration(tiny, **own) as routing:
        both = tiny.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
        distinct.append(routing.counters.mean_distinct())
        routing.reset_stats()
        for one in tiny.generate_batch(prompts, config, SMALL, progress_bar=False).values():
            found.append(list(one.generated_tokens))
        distinct.append(routing.counters.mean_distinct())
    assert found == both.tolist()
    assert distinct[0] == pytest.approx(distinct[1])
    assert 1 < distinct[0] <= 2  # alone, each row would read its first expert


@pytest.mark.parametrize("decode_batch", [None, 1])
def test_a_batch_of_one_is_said_once(tiny, ids, caplog, decode_batch):
    with BHRoutingIntegration(tiny, rule="oea", decode_batch=decode_batch):
        for rows in (ids[:2, :8], ids[:1, :8], ids[:1, :6]):
            tiny.generate(rows, max_new_tokens=3, do_sample=False)
    said = "rule=oea decides for the rows that are decoded together, and one row is decoded"
    assert caplog.text.count(said) == (decode_batch is None)


class TestTwoObjectsAroundOneModel:
    """The second one was made after lm_eval_bh.unpatch; then the first one is evaluated."""

    @staticmethod
    def made(model, tokenizer, k):
        return BHLM(pretrained=model, tokenizer=tokenizer, rule="topk", max_k=k, batch_size=2)

    @staticmethod
    def perplexity(lm):
        manager, task = new_task_manager(defaults=False), "bh_demo_wikitext"
        found = lm_eval.simple_evaluate(
            lm, tasks=[task], task_manager=manager, limit=2, bootstrap_iters=0
        )
        return found["results"][task]["word_perplexity,none"]

    def test_each_has_its_own_numbers_or_says_that_it_cannot(self, tiny, tokenizer):
        two = self.made(tiny, tokenizer, 2)
        alone = self.perplexity(two)
        lm_eval_bh.unpatch(tiny)
        four = self.made(tiny, tokenizer, 4)
        assert self.perplexity(four) != alone
        with pytest.raises(ModelError, match="no longer routed by this hf-bh object"):
            self.perplexity(two)
        lm_eval_bh.unpatch(tiny)
        assert self.perplexity(two) == alone
