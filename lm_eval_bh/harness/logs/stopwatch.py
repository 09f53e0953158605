"""Clocks of a device's work that never make the host wait for it."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Moment(Protocol):
    """A point in the work of a device."""

    def until(self, later: Any) -> float:
        """Return the seconds from here to a later moment of the same device."""


class HostMoment:
    """For a device whose work is done when a call returns."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def until(self, later: HostMoment) -> float:
        """Return the seconds in between."""
        return later._time - self._time


class CudaMoment:
    """For a CUDA device: an event in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def until(self, later: CudaMoment) -> float:
        """Return the seconds in between; waits until the device has reached it."""
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000


def moment(device: torch.device) -> Moment:
    """Return the current moment in the work given to a device."""
    return CudaMoment(device) if device.type == "cuda" else HostMoment()


class Span:
    """The time from one moment to a later one, minus breaks."""

    def __init__(self, start: Moment, end: Moment, breaks: list[tuple[Moment, Moment]]) -> None:
        self._start, self._end, self._breaks = start, end, breaks

    def seconds(self) -> float:
        """Return the length; only here the host may wait."""
        breaks = sum(start.until(end) for start, end in self._breaks)
        return max(0.0, self._start.until(self._end) - breaks)
