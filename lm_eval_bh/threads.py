"""How many threads a model is worth, and whether another process takes the cores away.

Torch starts a thread on every core, and threads that wait spin: two processes that do so on the
same cores take ten times as long as one alone. A model whose layers are small gains nothing by a
second thread, so it gets one.
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
LEAST_SHARE = 0.6  # of the time of its threads that a process has the cores for


def use_threads_that_pay(model: nn.Module) -> None:
    """Let a small model on a CPU compute with one thread, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" in os.environ or any(p.device.type != "cpu" for p in model.parameters()):
        return
    # The matrices of stacked experts are multiplied one by one.
    largest = max((p[0] if p.ndim > 2 else p).numel() for p in model.parameters())
    if largest <= SMALL:
        torch.set_num_threads(1)


class CoresWatch:
    """Says once if a process gets much less of the cores than its threads ask for."""

    def __init__(self) -> None:
        self._told = False
        self.start()

    def start(self) -> None:
        """Begin to measure."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def check(self) -> bool:
        """Say whether the process was short of cores since :meth:`start`, and warn the first time.

        Less than two seconds tell nothing. On an accelerator the host waits, so nothing is said.
        A process of one thread is not warned: none of its threads spins while it waits.
        """
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if wall < 2 or torch.cuda.is_available():
            return False
        share = cpu / wall / torch.get_num_threads()
        starved = share < LEAST_SHARE and os.getloadavg()[0] > (os.cpu_count() or 1)
        if starved and torch.get_num_threads() > 1 and not self._told:
            self._told = True
            logger.warning(
                "Other processes take the cores: this one had %.0f %% of the time that its %d "
                "threads asked for. Wait for the others, or set OMP_NUM_THREADS=1 for all of them.",
                100 * share,
                torch.get_num_threads(),
            )
        return starved
