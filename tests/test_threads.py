"""Small models use one thread, and a process without enough cores warns."""

from __future__ import annotations

import logging
import os
import time

import pytest
import torch
from torch import nn

from lm_eval_bh import threads
from lm_eval_bh.threads import CoresWatch, use_threads_that_pay


@pytest.fixture(autouse=True)
def as_many_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("width", "variable", "expected"),
    [(64, None, 1), (1025, None, 2), (64, "2", 2)],
    ids=["small", "large", "the user has said how many"],
)
def test_a_small_model_takes_one_thread(monkeypatch, width, variable, expected):
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(2)
    use_threads_that_pay(nn.Linear(width, width))
    assert torch.get_num_threads() == expected


def test_stacked_experts_count_one_by_one(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    module = nn.Module()
    module.experts = nn.Parameter(torch.zeros(64, 128, 256))
    use_threads_that_pay(module)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("used", "load", "share", "starved"),
    [(2, 4.0, 0.3, True), (2, 4.0, 0.95, False), (2, 0.5, 0.3, False), (1, 4.0, 0.3, True)],
    ids=["others take the cores", "enough of them", "it waits for a disk", "one thread"],
)
def test_a_process_that_is_short_of_cores_says_so_once(
    monkeypatch, caplog, used, load, share, starved
):
    torch.set_num_threads(used)
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    watch = CoresWatch()
    with caplog.at_level(logging.WARNING, threads.__name__):
        for _ in range(2):
            watch.start()
            now["wall"] += 10
            now["cpu"] += 10 * share * used
            assert watch.check() is starved
    assert caplog.text.count("OMP_NUM_THREADS=1") == int(starved and used > 1)
