import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from lm_eval_bh.errors import DataError, ModelError, NullModelError, ParameterError
from lm_eval_bh.routing.tables.calibration import (
    calibrate,
    calibrate_and_check,
    collect_router_logits,
    text_batches,
    wikitext_train_texts,
)
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.null_health import LayerHealth, health
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.routing.tables.null_match import check_routers
from lm_eval_bh.routing.tables.null_model import NullModel

SHARED = Path(
    os.environ.get("LM_EVAL_BH_SHARED", Path(__file__).resolve().parents[3].parent / "shared")
)
TEXTS = ["The first document.", "", "A second one, which is a little longer. " * 8, "The third."]


@pytest.fixture(scope="module")
def model():
    config = OlmoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=257,
        eos_token_id=256,
        bos_token_id=256,
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).eval()
    for layer in model.model.layers:  # as spread out as a trained router's logits
        nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    return model


@pytest.fixture
def routers(model):
    return [layer.mlp.gate for layer in model.model.layers]


def byte_tokenizer(**special):
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<eos>")


class TestTextBatches:
    def test_uses_every_token_once_and_no_padding(self, tokenizer):
        batches = text_batches(tokenizer, TEXTS, tokens=200, length=16, batch=5)
        assert [tuple(b.shape) for b in batches] == [(5, 16), (5, 16), (2, 16), (1, 8)]
        assert all(b.dtype == torch.int64 for b in batches)
        ids = torch.cat([b.flatten() for b in batches])
        whole = "<eos>" + "<eos>".join(text for text in TEXTS if text)
        assert whole.startswith(tokenizer.decode(ids))

    def test_stops_at_the_end_of_the_text(self, tokenizer):
        batches = text_batches(tokenizer, ["abc", "de"], tokens=10**6, length=4, batch=2)
        eos = tokenizer.eos_token_id
        assert [b.shape for b in batches] == [(1, 4), (1, 3)]
        assert batches[0][0, 0] == batches[1][0, 0] == eos
        assert tokenizer.decode(batches[1][0, 1:]) == "de"

    def test_stops_reading_when_it_has_enough(self, tokenizer):
        def endless():
            while True:
                yield "text without end. "

        assert text_batches(tokenizer, endless(), tokens=100, length=10, batch=20)[0].numel() == 100

    def test_prefix_is_bos_then_eos_then_none(self):
        for special, prefix in (
            ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
            ({"eos_token": "</s>"}, "</s>"),
            ({}, ""),
        ):
            tokenizer = byte_tokenizer(**special)
            (batch,) = text_batches(tokenizer, ["ab"], tokens=9, length=9, batch=1)
            assert tokenizer.decode(batch[0]) == prefix + "ab"

    @pytest.mark.parametrize("name", ["tokens", "length", "batch"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_bad_parameters(self, tokenizer, name, value):
        parameters = {"tokens": 8, "length": 4, "batch": 2} | {name: value}
        with pytest.raises(ParameterError, match=f"{name}="):
            text_batches(tokenizer, TEXTS, **parameters)

    def test_no_text(self, tokenizer):
        with pytest.raises(DataError, match="empty"):
            text_batches(tokenizer, ["", ""], tokens=8, length=4, batch=2)


class TestCollect:
    BATCHES = torch.arange(60).view(3, 2, 10)

    @staticmethod
    def hooks(model):
        """List all hooks; transformers leaves some of its own after output_router_logits."""
        return [list(module._forward_hooks) for module in model.modules()]

    def test_is_what_the_model_itself_reports(self, model, routers, capfd):
        collected = collect_router_logits(model, routers, self.BATCHES)
        assert capfd.readouterr() == ("", "")  # no bar where there is no terminal
        with torch.no_grad():
            outputs = [model(input_ids=b, output_router_logits=True) for b in self.BATCHES]
        assert list(collected) == [0, 1, 2]
        for layer, logits in collected.items():
            assert logits.dtype == torch.float32
            assert logits.shape == (60, 8)
            expected = torch.cat([output.router_logits[layer] for output in outputs])
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)

    def test_bfloat16_model(self, model):
        half = OlmoeForCausalLM(model.config).bfloat16()
        gates = [layer.mlp.gate for layer in half.model.layers]
        collected = collect_router_logits(half, gates, self.BATCHES, progress=False)
        assert collected[2].dtype == torch.float32

    @pytest.mark.parametrize("training", [False, True])
    def test_leaves_the_model_as_it_was(self, model, routers, training):
        before = self.hooks(model)
        model.train(training)
        collect_router_logits(model, routers, self.BATCHES)
        assert model.training == training
        assert self.hooks(model) == before
        model.eval()

    def test_leaves_no_hook_after_an_error(self, model, routers):
        before = self.hooks(model)
        projection = model.model.layers[0].self_attn.q_proj
        with pytest.raises(IndexError):
            collect_router_logits(model, routers, [torch.tensor([[10**6]])])
        with pytest.raises(ModelError, match=r"Router 1 \(Linear\) does not return a tuple"):
            collect_router_logits(model, [routers[0], projection], self.BATCHES)
        assert self.hooks(model) == before

    def test_unfit_routers_and_texts(self, model, routers):
        with pytest.raises(ModelError, match="no routers"):
            collect_router_logits(model, [], self.BATCHES)
        with pytest.raises(DataError, match="at least one batch"):
            collect_router_logits(model, routers, [])
        with pytest.raises(ModelError, match="Router 1 never ran"):
            collect_router_logits(model, [routers[0], nn.Linear(2, 2)], self.BATCHES)


class TestCalibrate:
    def run(self, model, tokenizer, routers, **changes):
        parameters = {
            "model_name": "a/b",
            "revision": "c0ffee",
            "text_name": "words",
            "tokens": 300,
            "length": 32,
        } | changes
        return calibrate(model, tokenizer, routers, TEXTS, **parameters)

    def test_header_and_tables(self, model, tokenizer, routers):
        null = self.run(model, tokenizer, routers, kind=NullKind(trim=1), experts=8)
        header = null.header
        assert (header.model, header.revision, header.text) == ("a/b", "c0ffee", "words")
        assert (header.num_layers, header.num_experts, header.tokens) == (3, 8, 300)
        assert (header.kernel, header.trim) == ("gaussian", 1)
        assert header.fingerprint == router_fingerprint(r.weight for r in routers)
        assert {"torch", "transformers"} <= set(header.versions)
        batches = text_batches(tokenizer, TEXTS, tokens=300, length=32, batch=8)
        logits = collect_router_logits(model, routers, batches)
        again = NullModel.fit(logits, trim=1)
        for layer in range(3):
            np.testing.assert_array_equal(null.cdf(layer), again.cdf(layer))

    def test_saved_and_loaded(self, model, tokenizer, routers, tmp_path):
        null = self.run(model, tokenizer, routers)
        null.save(tmp_path / "null.safetensors")
        again = NullModel.load(tmp_path / "null.safetensors")
        assert again.header == null.header
        check_routers(again.header, router_fingerprint(r.weight for r in routers), 3, 8, "a/b")

    def test_errors(self, model, tokenizer, routers):
        with pytest.raises(ParameterError, match="kernel='box'"):
            self.run(model, tokenizer, routers, kernel="box")
        with pytest.raises(ParameterError, match="tokens=0"):
            self.run(model, tokenizer, routers, tokens=0)
        with pytest.raises(NullModelError, match="give 8 logits per token, not 64"):
            self.run(model, tokenizer, routers, experts=64)
        with pytest.raises(ModelError, match="ReLU has no weight"):
            self.run(model, tokenizer, [nn.ReLU()])


class TestCheck:
    """The text after the null model's own shows how well it fits."""

    def run(self, model, tokenizer, routers, tokens, texts=TEXTS):
        return calibrate_and_check(
            model,
            tokenizer,
            routers,
            texts,
            model_name="a/b",
            revision=None,
            text_name="words",
            tokens=tokens,
            length=32,
        )

    @pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100, 300])
    def test_whatever_the_number_of_tokens(self, model, tokenizer, routers, tokens):
        null, report = self.run(model, tokenizer, routers, tokens)
        assert null.header.tokens == tokens
        assert [layer.layer for layer in report] == [0, 1, 2]
        assert [layer["ks_distance"] for layer in null.header.health] == [
            layer.ks_distance for layer in report
        ]
        skipped = -(-tokens // 32)
        windows = text_batches(
            tokenizer, TEXTS, tokens=32 * (skipped + max(1, tokens // 8 // 32)), length=32, batch=1
        )[skipped:]
        held_out = collect_router_logits(model, routers, windows)
        assert health(null, held_out) == report

    def test_a_text_that_leaves_nothing_to_check_on_is_fitted_all_the_same(
        self, model, tokenizer, routers
    ):
        null, report = self.run(model, tokenizer, routers, 10**6)
        assert report == []
        assert null.header.health is None
        assert 0 < null.header.tokens < 10**6


class TestHealth:
    LOGITS = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    OTHERS = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))

    def test_same_distribution(self):
        (layer,) = health(NullModel.fit({0: self.LOGITS}), {0: self.OTHERS})
        assert isinstance(layer, LayerHealth)
        assert layer.ks_distance < 0.02
        assert (layer.layer, layer.tokens) == (0, 2000)
        assert (layer.floor_share, layer.ceiling_share) == (0, 0)

    def test_distance_is_between_the_distributions(self):
        """Two normal distributions a standard deviation apart: 0.383 at most."""
        null = NullModel.fit({0: self.LOGITS, 1: self.LOGITS})
        (layer,) = health(null, {1: self.OTHERS + 1})
        assert layer.layer == 1
        assert layer.ks_distance == pytest.approx(0.383, abs=0.02)
        p = null.p_values(1, self.OTHERS + 1).flatten()
        assert layer.ks_distance == kstest(p.numpy(), "uniform").statistic

    def test_experts_with_distributions_of_their_own_do_not_make_up_for_each_other(self):
        null = NullModel.fit({0: self.LOGITS}, null_scope="expert")
        shift = torch.ones(16)
        shift[::2] = -1
        (layer,) = health(null, {0: self.OTHERS + shift})
        assert layer.ks_distance == pytest.approx(0.383, abs=0.02)
        p = null.p_values(0, self.OTHERS + shift).numpy()
        assert kstest(p.ravel(), "uniform").statistic < 0.25
        own = [kstest(column, "uniform").statistic for column in p.T]
        assert layer.ks_distance == pytest.approx(np.mean(own))

    def test_floor_and_ceiling(self):
        logits = self.OTHERS.clone()
        logits[:500] = 100.0
        logits[500:600] = -100.0
        null = NullModel.fit({0: self.LOGITS}, kernel="epanechnikov")
        (layer,) = health(null, {0: logits})
        assert layer.ceiling_share == pytest.approx(0.25, abs=1e-3)
        assert layer.floor_share == pytest.approx(0.05, abs=1e-3)

    def test_unfit_logits(self):
        null = NullModel.fit({0: self.LOGITS})
        for logits in (torch.zeros(0, 16), torch.tensor([[torch.nan]])):
            with pytest.raises(NullModelError, match="held-out logits of layer 0"):
                health(null, {0: logits})
        with pytest.raises(ParameterError, match=r"layer must be one of .* layers 0 to 0: found 3"):
            health(null, {3: self.OTHERS})


class TestWikitext:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
        monkeypatch.setattr("datasets.config.IN_MEMORY_MAX_SIZE", 10**9)  # writes nothing beside it

    @pytest.mark.skipif(
        not (SHARED / "hf_home").is_dir(),
        reason=f"no WikiText in {SHARED}/hf_home; set LM_EVAL_BH_SHARED to the parent of hf_home",
    )
    def test_articles_are_detokenised(self, tmp_path):
        name = "EleutherAI___wikitext_document_level"
        (tmp_path / name).symlink_to(SHARED / "hf_home" / "datasets" / name)
        texts = wikitext_train_texts()
        assert len(texts) >= 58  # all 629 where the cache was filled from the hub
        assert all("=" in text for text in texts)
        assert not any(" @-@ " in text or " , " in text for text in texts)

    def test_not_in_reach(self):
        with pytest.raises(DataError) as caught:
            wikitext_train_texts()
        message = str(caught.value)
        assert message.startswith(
            "WikiText-2 (EleutherAI/wikitext_document_level) cannot be loaded"
        )
        assert message.endswith("; pass a text file or a null model.")
        assert "\n" not in message
