"""Fit one layer's null model: binning and FFT against scipy's exact kernel CDF, side by side.

python scripts/bench_kde.py                      # all grid points: about two minutes
python scripts/bench_kde.py --quick              # a sample of the grid points: seconds
python scripts/bench_kde.py --output kde.json    # also writes the numbers
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import gaussian_kde
from tqdm import tqdm

from lm_eval_bh.files import replacing
from lm_eval_bh.routing.tables.kde import POINTS, fit_cdf

QUICK_POINTS = 200


def router_like_logits(count: int, seed: int) -> np.ndarray:
    """Return float64 [count]: a normal bulk, and the heavier right tail of relevant experts."""
    rng = np.random.default_rng(seed)
    called = rng.random(count) < 0.1
    return np.where(called, 1.0 + rng.gamma(2.0, 0.6, count), rng.normal(-0.4, 0.8, count))


def timed(work: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Return ([wall-clock seconds, CPU seconds], result)."""
    start = time.perf_counter(), time.process_time()
    result = work()
    return np.subtract((time.perf_counter(), time.process_time()), start), result


def main(
    samples: Annotated[int, typer.Option(min=2, help="Logits to fit.")] = 320_000,
    grid: Annotated[int, typer.Option(min=2, help="Grid points of scipy.")] = 10_000,
    points: Annotated[int, typer.Option(min=4, help="Grid points of our own fit.")] = POINTS,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of our fit; the median counts.")] = 9,
    seed: Annotated[int, typer.Option(help="Seed of the logits.")] = 0,
    quick: Annotated[bool, typer.Option(help="Time scipy on a sample of the grid points.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time both fits on the same logits and compare their CDFs at the same grid points."""
    logits = router_like_logits(samples, seed)
    at = np.linspace(logits.min() - 1, logits.max() + 1, grid)
    if quick:
        at = at[np.linspace(0, grid - 1, min(QUICK_POINTS, grid)).round().astype(int)]

    runs = [timed(lambda: fit_cdf(logits, points=points)) for _ in range(repeats)]
    ours, (x, cdf) = np.median([seconds for seconds, _ in runs], axis=0), runs[0][1]
    kde = gaussian_kde(logits)
    theirs, exact = timed(
        lambda: np.array(
            [kde.integrate_box_1d(-np.inf, z) for z in tqdm(at, "scipy", leave=False, disable=None)]
        )
    )
    largest = float(np.abs(np.interp(at, x, cdf) - exact).max())
    whole = theirs * grid / len(at)

    title = f"{samples:,} logits, {grid:,} grid points, Gaussian kernel, Scott's rule"
    ratio = whole / ours
    table = Table("fit", "seconds", "CPU seconds", "CPU ratio", "CDF within", title=title)
    table.add_row("scipy gaussian_kde", f"{whole[0]:.1f}", f"{whole[1]:.1f}", "1", "exact")
    table.add_row(
        "lm_eval_bh fit_cdf",
        f"{ours[0]:.4f}",
        f"{ours[1]:.4f}",
        f"{ratio[1]:,.0f}",
        f"{largest:.1e}",
    )
    console = Console()
    console.print(table)
    if len(at) < grid:
        console.print(
            f"Quick: scipy was timed, and compared with, at {len(at)} of {grid:,} grid points "
            f"({theirs[0]:.2f} s); its seconds and the ratio are scaled up from there."
        )
    if output:
        numbers = {
            "samples": samples,
            "grid": grid,
            "grid_points_evaluated": len(at),
            "points": points,
            "seed": seed,
            "scipy_seconds": whole[0],
            "scipy_cpu_seconds": whole[1],
            "scipy_seconds_measured": theirs[0],
            "scipy_cpu_seconds_measured": theirs[1],
            "fit_cdf_seconds": ours[0],
            "fit_cdf_cpu_seconds": ours[1],
            "ratio_of_seconds": ratio[0],
            "ratio_of_cpu_seconds": ratio[1],
            "largest_cdf_difference": largest,
            "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        }
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(numbers, indent=2) + "\n")
        console.print(f"Written to {output}")


if __name__ == "__main__":
    typer.run(main)
