"""Device and dtype of a model: as in lm-eval, and refused if unusable."""

from __future__ import annotations

import pytest
import torch

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.placement import LM_EVAL_DEFAULT, placement

DEFAULT = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("given", "device"),
    [(None, DEFAULT), ("cpu", "cpu"), ("cpu:0", "cpu"), (torch.device("cpu"), "cpu")],
)
def test_devices_are_named_as_lm_eval_names_them(given, device):
    assert placement(given)["device"] == device


@pytest.mark.parametrize("dtype", ["auto", None, "float16", "half", "bfloat16", torch.float64])
def test_dtypes_that_models_compute_in_are_taken_as_they_are(dtype):
    assert placement("cpu", dtype) == {"device": "cpu", "dtype": dtype}


@pytest.mark.parametrize("device", ["cup", "cuda:77", "cuda:", "cuda:-1", "meta", "", "3"])
def test_devices_that_lm_eval_would_replace_by_another_are_refused(device):
    with pytest.raises(ParameterError, match="device"):
        placement(device)


@pytest.mark.parametrize("dtype", ["float99", "float8_e4m3fn", torch.int8, "nn", 16])
def test_dtypes_that_models_do_not_compute_in_are_refused(dtype):
    with pytest.raises(ParameterError, match="dtype must be auto"):
        placement("cpu", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_lm_eval_passes_by_default_is_the_cpu_on_a_machine_without_cuda():
    assert placement(LM_EVAL_DEFAULT, unset=LM_EVAL_DEFAULT)["device"] == "cpu"
    with pytest.raises(ParameterError, match="cuda:0"):
        placement(LM_EVAL_DEFAULT)
