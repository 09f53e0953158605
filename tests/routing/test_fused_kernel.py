"""The fused kernel, run by Triton's interpreter, or on the card that LM_EVAL_BH_DEVICE names."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lm_eval_bh import NullModel
from lm_eval_bh.resources import shipped
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.patching.fused_choice import fuse_by_measuring, fuse_if_faster
from lm_eval_bh.routing.selector import Selector

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux only")
CASES = Path(__file__).with_name("fused_kernel_cases.py")


@NEEDS_TRITON
def test_the_kernel_does_what_its_cases_say():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if os.environ.get("LM_EVAL_BH_DEVICE", "cpu") == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", str(CASES)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.split(" passed")[0].split()[-1]) > 50


@NEEDS_TRITON
def test_where_the_kernel_cannot_be_made_the_calls_stay(caplog):
    """Here Triton has no card to make one for, as on a card it may have no compiler."""
    null = NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors")
    for _ in range(2):
        selector = Selector(RoutingConfig(alpha=0.4, max_k=8), null, 0, 64)
        fuse_by_measuring(selector, torch.device("cpu"), torch.float32)
        assert selector.fused is None
    [record] = caplog.records
    assert "calls into torch" in record.getMessage()


def test_nothing_is_tried_without_cuda():
    null = NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors")
    selector = Selector(RoutingConfig(alpha=0.4, max_k=8), null, 0, 64)
    for device in ("cpu", "meta"):
        fuse_if_faster(selector, torch.empty(64, 8, device=device))
    assert selector.fused is None
