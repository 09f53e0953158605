"""Generation is logged by position for any passes of ``generate``, and never interrupted."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from reference import Reference
from routing_runs import ARGS, instances

from lm_eval_bh import NullModel
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.resources import shipped, tiny_olmoe

PROMPTS = ["The river ran past the mill and past the", "In the year of the storm the storm", "A"]


def options_of(**options):
    return {"until": ["no such text"], "max_gen_toks": 9, "do_sample": False} | options


def generate(lm, **options):
    requests = instances("generate_until", *((prompt, options_of(**options)) for prompt in PROMPTS))
    if isinstance(lm, BHLM):
        lm.begin_evaluation()
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def models():
    """Return an adaptive model at two batch sizes."""
    return {
        size: BHLM.create_from_arg_string(ARGS, {"device": "cpu", "batch_size": size})
        for size in (1, 3)
    }


@pytest.fixture
def outputs(models, monkeypatch):
    """Return a list that takes the prompts and answers of every batch."""
    found = []
    for lm in models.values():
        real = lm._model_generate

        def keep(*args, real=real, **kwargs):
            found.append(real(*args, **kwargs))
            return found[-1]

        monkeypatch.setattr(lm, "_model_generate", keep)
    return found


@pytest.fixture(scope="module")
def slow():
    stock = HFLM(str(tiny_olmoe()), dtype="float64", experts_implementation="eager", device="cpu")
    return Reference(
        stock, NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors"), 0.5, 6
    )


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [
        (1, {}),
        (3, {}),
        (1, {"prompt_lookup_num_tokens": 3}),
        (1, {"assistant_early_exit": 2}),
        (1, {"prefill_chunk_size": 4}),
        (3, {"prefill_chunk_size": 4}),
        (1, {"guidance_scale": 1.5}),
        (3, {"guidance_scale": 1.5}),
        (3, {"cache_implementation": "static"}),
        (3, {"do_sample": True, "temperature": 3.0, "top_k": 9}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*generation_config.*:FutureWarning")
def test_counters_are_those_of_the_text_fed_alone(models, outputs, slow, batch_size, options):
    lm = models[batch_size]
    generate(lm, **options)
    (layers,) = (task["layers"] for task in lm.log.summary()["tasks"].values())
    for counts in (slow.histogram, slow.usage, slow.cross):
        counts.clear()
    (instance,) = instances("generate_until", ("", {}))
    tokens = 0
    for row in (row for output in outputs for row in output.tolist()):
        fed = [token for token in row if token != lm.tokenizer.pad_token_id][:-1]
        tokens += len(fed)
        slow.forward(instance, fed, 0)
    assert lm.log.summary()["tokens"] == lm.log.summary()["computed_tokens"] == tokens
    assert [layer["histogram"] for layer in layers] == slow.histogram["by_hand"]
    assert [layer["usage"] for layer in layers] == slow.usage["by_hand"]
    assert [layer["cross"] for layer in layers] == slow.cross["by_hand"]


def test_the_token_log_of_guesses_holds_every_position_once(tmp_path):
    tables = []
    for name, options in (("plain", {}), ("guesses", {"prompt_lookup_num_tokens": 3})):
        arguments = f"{ARGS},log_routing=full,log_dir={tmp_path / name}"
        lm = BHLM.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})
        requests = instances("generate_until", *((p, options_of(**options)) for p in PROMPTS))
        lm.generate_until(requests, disable_tqdm=True)
        lm.get_model_info()
        table = pq.read_table(tmp_path / name / lm.log.run_id / "tokens")
        keys = [(key, "ascending") for key in ("doc_id", "layer", "position")]
        tables.append(table.drop_columns("weights").sort_by(keys).to_pylist())
    assert tables[0] == tables[1]


@pytest.mark.parametrize("in_the_model", [False, True])
def test_beams_are_not_logged_and_said_once(models, monkeypatch, caplog, in_the_model):
    lm = models[1]
    if in_the_model:
        monkeypatch.setattr(lm.model.generation_config, "num_beams", 2)
    generate(lm, **({} if in_the_model else {"num_beams": 2}))
    assert lm.log.summary()["tokens"] == 0
    assert sum("is not logged" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 2},
        {"prefill_chunk_size": 4},
        {"guidance_scale": 1.5},
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"do_sample": True, "temperature": 3.0},
        {"repetition_penalty": 1.3},
        {"eos_token_id": 5},
    ],
)
@pytest.mark.filterwarnings("ignore:.*generation_config.*:FutureWarning")
def test_what_works_with_hf_works_here(options):
    stock = HFLM(str(tiny_olmoe()), device="cpu", batch_size=1)
    ours = BHLM(pretrained="tiny-olmoe", alpha=0.5, min_k=8, max_k=8, device="cpu", batch_size=1)
    answers = []
    for lm in (stock, ours):
        torch.manual_seed(0)
        answers.append(generate(lm, **options))
    assert answers[0] == answers[1]


def test_a_prompt_with_two_sets_of_options_is_credited_to_both():
    lm = BHLM.create_from_arg_string(f"{ARGS},batch_size=2", {"device": "cpu"})
    prompts = ["The river", "In the year of the storm"]
    requests = []
    for task, tokens in (("long", 9), ("short", 4)):
        options = options_of(max_gen_toks=tokens)
        requests += instances("generate_until", *((p, options) for p in prompts), task=task)
    lm.generate_until(requests)
    fed = sum(len(lm.tok_encode(prompt)) for prompt in prompts)
    tasks = lm.log.summary()["tasks"]
    assert tasks["long"]["tokens"] == fed + 2 * 8
    assert tasks["short"]["tokens"] == fed + 2 * 3


def test_a_call_by_hand_belongs_to_nobody():
    lm = BHLM.create_from_arg_string(ARGS, {"device": "cpu"})
    context, mask = lm.tok_batch_encode(["The river", "In the year of the storm"])
    plain = lm._model_generate(context[1:], max_length=12, stop=["\n\n"])
    masked = lm._model_generate(context, max_length=12, stop=["\n\n"], attention_mask=mask)
    assert torch.equal(plain[0], masked[1])
    assert lm.log.summary()["tokens"] == 0


def test_an_empty_document_works_as_it_does_with_hf():
    lm = BHLM.create_from_arg_string(ARGS, {"device": "cpu"})
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("",), ("A text.",)))[0] == 0
