"""Chooses the number of threads for a model, and watches for competing processes.

Torch starts one thread per core, and waiting threads spin: two processes that do so on the same
cores take ten times as long as one alone. A model with small layers does not gain from a second
thread, so it gets one.
"""

from __future__ import annotations

import logging
import os
import time

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Size of the largest matrix up to which a second thread does not pay: tiny-olmoe's has 2**19
# numbers, and one thread is as fast there; a layer of OLMoE-1B-7B's width has 2**22.
SMALL = 2**20
LEAST_SHARE = 0.6  # share of its threads' time for which a process has the cores


def use_threads_that_pay(model: nn.Module) -> None:
    """Use one thread for a small model on a CPU, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" in os.environ or any(p.device.type != "cpu" for p in model.parameters()):
        return
    # Matrices of stacked experts are multiplied one by one.
    largest = max((p[0] if p.ndim > 2 else p).numel() for p in model.parameters())
    if largest <= SMALL:
        torch.set_num_threads(1)


class CoresWatch:
    """Warns once if a process gets much less CPU time than its threads need."""

    def __init__(self) -> None:
        self._told = False
        self.start()

    def start(self) -> None:
        """Start measuring."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def check(self) -> bool:
        """Return whether the process lacked cores since :meth:`start`, and warn once.

        Less than two seconds are ignored, as is an accelerator, on which the host waits. A process
        with one thread gets no warning, since it has no thread that spins.
        """
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if wall < 2 or torch.cuda.is_available():
            return False
        share = cpu / wall / torch.get_num_threads()
        starved = share < LEAST_SHARE and os.getloadavg()[0] > (os.cpu_count() or 1)
        if starved and torch.get_num_threads() > 1 and not self._told:
            self._told = True
            logger.warning(
                "Other processes use the cores: this one got %.0f %% of the CPU time that its %d "
                "threads need. Wait for the others, or set OMP_NUM_THREADS=1 for all of them.",
                100 * share,
                torch.get_num_threads(),
            )
        return starved
