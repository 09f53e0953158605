"""Speedup by one loaded model: lm-eval-bh sweep against a loop over the lm_eval command.

python scripts/bench_sweep.py                    # the quick preset
python scripts/bench_sweep.py --grid full        # the 60 experiments on tiny-olmoe, --limit 4
python scripts/bench_sweep.py --grid full --loop-sample 6   # only every tenth in the loop

Both run the same experiments in turn, as whole processes with all their start-up time, and must
give the same results: every metric of the harness is compared. With --loop-sample the loop runs
that many experiments, spread evenly over the grid, and its time is scaled to all of them, which the
output states.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lm_eval_bh.files import replacing
from lm_eval_bh.harness.sweep.sweep_config import PRESETS, Experiment, SweepConfig
from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder

WANTED = {"quick": 5.0, "full": 15.0}
SWEEP_SH = Path(__file__).with_name("sweep.sh")
console = Console(width=110)


def results(folder: Path) -> dict[str, float]:
    """Return every number of lm-eval's results of the run in a folder, and the mean experts."""
    (file,) = folder.glob("*/results_*.json")
    content = json.loads(file.read_text())
    found = {
        f"{task} {name}": value
        for task, values in content["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float))
    }
    summary = content["config"]["bh"]["summary"]
    return found | {"mean experts": summary["mean_experts_per_token"], "tokens": summary["tokens"]}


def clock(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - start


def loop(experiment: Experiment, config: SweepConfig, folder: Path) -> float:
    """Run one experiment of the loop and return its seconds."""
    baseline = experiment.alpha is None
    environment = {
        "LM_EVAL": str(Path(sys.executable).with_name("lm_eval")),
        "PRETRAINED": config.pretrained,
        "TASKS": experiment.task,
        "LIMIT": str(config.limit),
        "BATCH_SIZE": str(config.batch_size),
        "DEVICE": "cpu",
        "BASELINES": str(experiment.max_k) if baseline else " ",
        "MAX_K": " " if baseline else str(experiment.max_k),
        "ALPHAS": " " if baseline else str(experiment.alpha),
    }
    return clock(["bash", str(SWEEP_SH), str(folder)], environment)


def main(
    grid: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    limit: Annotated[
        int | None, typer.Option(help="Documents; default: 50 for quick, 4 for full.")
    ] = None,
    loop_sample: Annotated[
        int | None, typer.Option(min=1, help="Experiments that the loop runs; default: all.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time both on the same experiments, and compare their results."""
    documents = limit or (50 if grid == "quick" else 4)
    settings = PRESETS["quick" if grid == "quick" else "seeds"] | {
        "pretrained": "tiny-olmoe",
        "tasks": ["bh_demo"],
        "policies": [],  # not supported by the loop
        "limit": documents,
    }
    config = SweepConfig(**settings)
    experiments = config.experiments()
    count = min(loop_sample or len(experiments), len(experiments))
    chosen = [experiments[i * len(experiments) // count] for i in range(count)]
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary, "sweep"), Path(temporary, "shell")
        command = [sys.executable, "-m", "lm_eval_bh", "sweep", "--device", "cpu"]
        for name in ("pretrained", "tasks", "baselines", "max_k", "alphas", "limit"):
            value = settings[name]
            given = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            command += [f"--{name.replace('_', '-')}", given]
        command += ["--output-dir", str(ours)]
        seconds = clock(command, {})
        console.print(f"lm-eval-bh sweep: {len(experiments)} experiments in {seconds:.1f} s")
        times = []
        for experiment in chosen:
            times.append(loop(experiment, config, theirs))
            console.print(f"sweep.sh: {experiment.name} in {times[-1]:.1f} s", highlight=False)
        differing = [
            experiment.name
            for experiment in chosen
            if results(SweepFolder(ours, config).run(experiment))
            != results(SweepFolder(theirs, config).run(experiment))
        ]
    whole = sum(times) / len(times) * len(experiments)
    numbers: dict[str, Any] = {
        "grid": grid,
        "experiments": len(experiments),
        "limit": documents,
        "sweep_seconds": seconds,
        "loop_seconds": times,
        "loop_experiments": count,
        "ratio": whole / seconds,
        "wanted": WANTED[grid],
        "different_results": differing,
        "load": os.getloadavg(),
    }
    measured = "measured" if count == len(experiments) else f"scaled from {count}"
    table = Table(
        "way", "experiments", "seconds", "each, median", title=f"{grid}, --limit {documents}"
    )
    table.add_row(
        "sweep.sh", str(count), f"{whole:.0f} ({measured})", f"{statistics.median(times):.1f}"
    )
    table.add_row(
        "lm-eval-bh sweep",
        str(len(experiments)),
        f"{seconds:.1f}",
        f"{seconds / len(experiments):.1f}",
    )
    console.print(table)
    console.print(
        f"{whole / seconds:.1f} times as fast; wanted: {WANTED[grid]:g}. "
        f"Load: {os.getloadavg()[0]:.1f}"
    )
    console.print(f"Results that differ: {', '.join(differing) or 'none'}")
    if output:
        with replacing(output) as file:
            file.write_text(json.dumps(numbers, indent=2) + "\n")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
