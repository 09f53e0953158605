"""lm-eval's own tests of ``hf``, put to ``hf-bh``: eight of eight.

After ``tests/models/test_huggingface.py`` of EleutherAI/lm-evaluation-harness 0.4.13 (MIT).
There the answers are constants of pythia-70m, which is not a mixture of experts; here they are
those of ``hf`` on tiny-olmoe in the same process, and ``hf-bh`` must give them to the last digit
where every token gets the native number of experts.
"""

from __future__ import annotations

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.resources import shipped, tiny_olmoe

NATIVE_K = 8
TEXT = "foo bar"


@pytest.fixture(scope="module")
def stock():
    return HFLM(pretrained=str(tiny_olmoe()), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ours():
    return BHLM(
        pretrained=str(tiny_olmoe()),
        device="cpu",
        dtype="float32",
        alpha=0.4,
        min_k=NATIVE_K,
        max_k=NATIVE_K,
    )


@pytest.fixture(scope="module")
def requests():
    """Return a function: the requests of the first ten documents of a task."""
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    lambada = manager.load(["bh_demo_lambada"])["tasks"]["bh_demo_lambada"]
    generation = {
        "task": "demo_generation",
        "custom_dataset": lambada.config.custom_dataset,
        "dataset_kwargs": lambada.config.dataset_kwargs,
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 10},
        "test_split": "test",
    }

    def of(task):
        (loaded,) = manager.load([generation if task == "generation" else task])["tasks"].values()
        loaded.build_all_requests(limit=10, rank=0, world_size=1)
        return loaded.instances

    return of


def test_loglikelihood(stock, ours, requests):
    choices = requests("bh_demo_hellaswag")
    answers = ours.loglikelihood(choices)
    assert answers == stock.loglikelihood(choices)
    assert len(answers) == 4 * 10


def test_generate_until(stock, ours, requests):
    prompts = requests("generation")
    answers = ours.generate_until(prompts)
    assert answers == stock.generate_until(prompts)
    assert all(answers)


def test_loglikelihood_rolling(stock, ours, requests):
    documents = requests("bh_demo_wikitext")
    answers = ours.loglikelihood_rolling(documents)
    assert answers == stock.loglikelihood_rolling(documents)
    assert all(answer < 0 for answer in answers)


def test_tok_encode(stock, ours):
    assert ours.tok_encode(TEXT) == stock.tok_encode(TEXT)


def test_tok_decode(ours):
    assert ours.tok_decode(ours.tok_encode(TEXT)) == TEXT


def test_tok_batch_encode(stock, ours):
    texts = [TEXT, "bar foo and more"]
    for found, expected in zip(
        ours.tok_batch_encode(texts), stock.tok_batch_encode(texts), strict=True
    ):
        assert torch.equal(found, expected)


def test_model_generate(stock, ours):
    context, _ = ours.tok_batch_encode([TEXT])
    answers = [lm._model_generate(context, max_length=10, stop=["\n\n"]) for lm in (stock, ours)]
    assert torch.equal(*answers)
    assert answers[0].shape[1] > context.shape[1]


def test_loglikelihood_refuses_enable_thinking(ours, requests, monkeypatch):
    monkeypatch.setattr(ours, "enable_thinking", True)
    with pytest.raises(ValueError, match=r"enable_thinking=True.*bh_demo_hellaswag"):
        ours.loglikelihood(requests("bh_demo_hellaswag"))
