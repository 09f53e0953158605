"""The count of FLOPs: by hand, and against torch's own counter."""

from __future__ import annotations

import pytest

from lm_eval_bh.analysis.table.flops import Architecture

OLMOE_1B_7B = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50304,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}


def test_olmoe_1b_7b_by_hand():
    olmoe = Architecture.from_config(OLMOE_1B_7B, moe_layers=16)
    # A multiply-add is 2 FLOPs; a token through a matrix of m x n takes 2 m n.
    query_key_value_output = 4 * 2 * 2048 * 2048
    assert query_key_value_output == 33_554_432
    # With 2048 positions: 16 heads of 128, a product for the scores and one for the values.
    scores = 2 * 2 * 16 * 128 * 2048
    assert scores == 16_777_216
    router = 2 * 2048 * 64
    assert router == 262_144
    one_expert = 3 * 2 * 2048 * 1024  # gate, up, down
    assert one_expert == 12_582_912
    layer = 33_554_432 + 16_777_216 + 262_144 + 8 * 12_582_912
    assert layer == 151_257_088
    head = 2 * 2048 * 50304
    assert head == 206_045_184
    assert olmoe.flops(8, context_length=2048) == 16 * 151_257_088 + 206_045_184 == 2_626_158_592

    # Half the experts save 4 * 16 of them: 805,306,368 of 2,626,158,592 FLOPs, by no means half.
    assert olmoe.flops(4, 2048) == 2_626_158_592 - 805_306_368
    assert olmoe.breakdown(8, 2048) == {
        "projections": 16 * 33_554_432,
        "scores": 16 * 16_777_216,
        "routers": 16 * 262_144,
        "experts": 16 * 8 * 12_582_912,
        "head": 206_045_184,
    }


def test_active_parameters_are_half_the_flops():
    """The model card says 1.3 billion active parameters; the embeddings multiply nothing."""
    olmoe = Architecture.from_config(OLMOE_1B_7B, moe_layers=16)
    parts = olmoe.breakdown(8, context_length=1)
    matrices = (sum(parts.values()) - parts["scores"]) / 2
    assert matrices + 2048 * 50304 == pytest.approx(1.28e9, rel=0.01)


def test_key_value_heads_head_size_and_expert_size_are_read():
    config = OLMOE_1B_7B | {"num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 512}
    parts = Architecture.from_config(config, moe_layers=16).breakdown(2, context_length=10)
    assert parts["projections"] == 16 * 2 * 2048 * (2 * 16 * 64 + 2 * 4 * 64)
    assert parts["scores"] == 16 * 2 * 2 * 10 * 16 * 64
    assert parts["experts"] == 16 * 2 * 3 * 2 * 2048 * 512


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "num_experts",
    ],
)
def test_a_count_with_a_gap_is_none(name):
    assert Architecture.from_config(OLMOE_1B_7B | {name: None}, moe_layers=16) is None


def test_layers_without_experts_are_not_guessed():
    assert Architecture.from_config(OLMOE_1B_7B, moe_layers=15) is None


@pytest.mark.slow
def test_torch_counts_the_same(tiny_model_folder):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, attn_implementation="eager", experts_implementation="eager"
    )
    length, config = 48, model.config.to_dict()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.arange(length).unsqueeze(0), use_cache=False)
    tiny = Architecture.from_config(config, moe_layers=config["num_hidden_layers"])
    expected = tiny.flops(config["num_experts_per_tok"], context_length=length)
    assert counter.get_total_flops() == length * expected
