"""What the fused kernel must do; test_fused_kernel.py runs this in a process of its own.

Without an accelerator Triton's interpreter runs the kernel's code with NumPy, which the variable
TRITON_INTERPRET has to say before Triton is imported. With LM_EVAL_BH_DEVICE=cuda the same cases
run on the card.
"""

from __future__ import annotations

import copy
import itertools
import os
import pickle

import numpy as np
import pytest
import torch

from lm_eval_bh import NullModel
from lm_eval_bh.routing import fused_kernel
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.patching import fused_choice
from lm_eval_bh.routing.patching.fused_choice import fused_step, takes_less
from lm_eval_bh.routing.selection import select
from lm_eval_bh.routing.selector import Selector

DEVICE = torch.device(os.environ.get("LM_EVAL_BH_DEVICE", "cpu"))
STEPS = ["bh", "by", "holm", "hochberg", "bonferroni"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(experts: int, **options: object) -> Selector:
    drawn = np.random.default_rng(0).normal(size=(400, experts))
    null = NullModel.fit({0: torch.from_numpy(drawn)})
    return Selector(RoutingConfig(**options), null, 0, experts)


def given(tokens: int, experts: int, slots: int, dtype: torch.dtype):
    """Router logits with many ties, and the softmax weights and the top-k of a router."""
    generator = torch.Generator().manual_seed(tokens)
    logits = (2 * torch.randn(tokens, experts, generator=generator)).round(decimals=1).to(dtype)
    weights, indices = logits.float().softmax(-1).topk(slots)
    return logits.to(DEVICE), (weights.to(dtype).to(DEVICE), indices.to(DEVICE))


def both(selector: Selector, logits, own, **options):
    """Return the selections by calls into torch, and by the kernel."""
    selector.fused = None
    calls = select(logits, selector, own, **options)
    selector.fused = fused_step(selector)
    assert selector.fused is not None
    kernel = select(logits, selector, own, **options)
    return calls, kernel


def same(calls, kernel) -> None:
    """Assert that two selections are equal to the last bit, and of equal dtypes."""
    for one, other in zip(calls, kernel, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [*itertools.product([8, 60], DTYPES), (64, torch.float32), (256, torch.bfloat16)],
)
@pytest.mark.parametrize("rule", STEPS)
def test_the_kernel_selects_what_calls_into_torch_do(rule, experts, dtype, monkeypatch):
    monkeypatch.setattr(fused_kernel, "NUMBERS", 256)  # so that few tokens take several programs
    counts = set()
    for alpha, min_k, max_k in [(0.05, 1, 8), (0.6, 1, 8), (0.9, 2, 5)]:
        selector = made(experts, rule=rule, alpha=alpha, min_k=min_k, max_k=max_k)
        calls, kernel = both(selector, *given(5, experts, max_k, dtype))
        same(calls, kernel)
        same(*both(selector, *given(1, experts, max_k, dtype)))
        counts |= set(calls.counts.tolist())
    assert len(counts) > 1


def test_the_kernel_selects_what_statsmodels_rejects():
    from statsmodels.stats.multitest import multipletests

    selector = made(64, rule="bh", alpha=0.5, min_k=1, max_k=64)
    logits, own = given(9, 64, 64, torch.float32)
    _, kernel = both(selector, logits, own)
    p_values = selector._null_model.p_values(0, logits.cpu().double()).numpy()
    wanted = [max(multipletests(p, 0.5, method="fdr_bh")[0].sum(), 1) for p in p_values]
    assert kernel.counts.tolist() == wanted


def test_a_logit_at_its_threshold_is_rejected():
    selector = made(8, rule="bonferroni", alpha=0.4, min_k=1, max_k=8)
    thresholds, _ = selector.step()
    logits = torch.full((1, 8), -9.0)
    logits[0, :3] = -thresholds[0]
    logits[0, 2] = torch.nextafter(-thresholds[0], torch.tensor(-torch.inf))
    own = logits.softmax(-1).topk(8)
    calls, kernel = both(
        selector, logits.to(DEVICE), (own.values.to(DEVICE), own.indices.to(DEVICE))
    )
    same(calls, kernel)
    assert kernel.counts.tolist() == [2]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"renormalize": True}, {}),
        ({"mass": 1.0}, {}),
        ({"temperature": 2.0}, {}),
        ({}, {"normalizes": True}),
        ({"renormalize": False}, {"normalizes": True}),
    ],
)
def test_weights_are_scaled_afterwards_as_ever(changes, options):
    selector = made(64, rule="bh", alpha=0.4, max_k=6, **changes)
    logits, own = given(6, 64, 8, torch.float32)
    same(*both(selector, logits, own, native_k=8, **options))
    same(*both(selector, logits, None, **options))


def test_no_token_is_no_token():
    selector = made(64, rule="bh", alpha=0.4, max_k=8)
    same(*both(selector, *given(0, 64, 8, torch.float32)))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "storey"},
        {"rule": "fdr_tsbh"},
        {"rule": "p_value"},
        {"rule": "min_w", "alpha": 0.05},
        {"rule": "top_p"},
        {"rule": "topk"},
        {"rule": "bh", "statistic": "weight"},
        {"rule": "bh", "min_k": 8},
    ],
)
def test_there_is_no_kernel_for_what_it_does_not_do(options):
    assert fused_step(made(64, **({"max_k": 8} | options))) is None


def test_nor_for_more_experts_than_it_sorts():
    assert fused_step(made(257, rule="bh", alpha=0.4)) is None


def test_a_gradient_and_float64_take_the_calls():
    selector = made(64, rule="bh", alpha=0.4, max_k=8)
    selector.fused = fused_step(selector)
    logits = given(5, 64, 8, torch.float32)[0]
    assert selector.fused.serves(logits)
    assert not selector.fused.serves(logits.double())
    wanted = logits.clone().requires_grad_()
    assert not selector.fused.serves(wanted)
    select(wanted, selector).weights.sum().backward()
    assert wanted.grad is not None
    with torch.no_grad():
        assert selector.fused.serves(wanted)


def test_copies_take_the_calls_where_there_may_be_no_triton():
    selector = made(64, rule="bh", alpha=0.4, max_k=8)
    selector.fused = fused_step(selector)
    for again in (copy.deepcopy(selector), pickle.loads(pickle.dumps(selector))):
        assert again.fused is None


def test_what_takes_less_time_is_measured(monkeypatch):
    """The interpreter is slow by far; a card decides for itself, and always the same."""
    monkeypatch.setattr(fused_choice, "TOKENS", (1, 2))
    selector = made(64, rule="bh", alpha=0.4, max_k=8)
    faster = takes_less(selector, fused_step(selector), DEVICE, torch.float32)
    assert selector.fused is None
    if DEVICE.type == "cpu":
        assert not faster


def test_what_is_faster_goes_into_the_rule():
    if DEVICE.type != "cuda":
        pytest.skip("on a card only: elsewhere no kernel is chosen")
    selector = made(64, rule="bh", alpha=0.4, max_k=8)
    weight = torch.empty(64, 32, device=DEVICE, dtype=torch.bfloat16)
    fused_choice.fuse_if_faster(selector, weight)
    assert (selector.fused is not None) == next(iter(fused_choice._known.values()))
