"""Which of several ways to compute the same takes the least time here: measured, not guessed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def fastest(
    ways: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int = 9, calls: int = 10
) -> str:
    """Return the name of the way with the smallest median time; of equals the first.

    Parameters
    ----------
    ways : mapping of str to callable
        What each does has no effect but on its own result.
    device : torch.device
        Where they compute; the host waits for it before and after each repeat.
    repeats, calls : int
        In each repeat every way is called so often, in turn, after two that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-2, repeats):
        for name, way in ways.items():
            _wait_for(device)
            start = time.perf_counter()
            for _ in range(calls):
                way()
            _wait_for(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
