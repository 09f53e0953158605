"""Measure the cost of a grid: `lm-eval-bh tune --preview` with 16 configurations against one.

    python scripts/bench_analyze.py

Ratios of times in one run, the sides interleaved, on tiny-olmoe and on one layer at OLMoE's true
size with random weights. "None" is the same forward pass without hooks. No data sets are needed,
since tokens are random. It runs on the CPU and measures processor time, so that other work on the
machine has little influence.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from lm_eval_bh import NullModel, RoutingConfig
from lm_eval_bh.files import replacing
from lm_eval_bh.policies.preview import analyze_grid
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.parameter_grid import grid_of
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.calibration import collect_router_logits, listen
from lm_eval_bh.routing.tables.null_kind import NullKind

ALPHAS, MAX_KS = (0.3, 0.4, 0.5, 0.6), (8, 16, 32, 64)
GRIDS: dict[str, list[RoutingConfig]] = {
    "none": [],
    "1": grid_of(["bh"], [0.4], [8]),
    "16: 4 levels x 4 max_k": grid_of(["bh"], ALPHAS, MAX_KS),
    "16: 16 levels": grid_of(["bh"], np.linspace(0.05, 0.8, 16).tolist(), [8]),
    "16: 4 rules x 4 levels": grid_of(["bh", "by", "fdr_tsbh", "top_p"], ALPHAS, [8]),
}


def tiny() -> tuple[Any, NullModel]:
    """Return tiny-olmoe and its null model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe())
    return model, NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors")


def one_layer(batches: Sequence[torch.Tensor]) -> tuple[Any, NullModel]:
    """Return one layer at OLMoE's true size, and a null model of its logits on these tokens."""
    torch.manual_seed(0)
    config = OlmoeConfig(num_hidden_layers=1, vocab_size=4096)
    model = OlmoeForCausalLM(config).eval()
    logits = collect_router_logits(model, [r.module for r in find_routers(model)], batches, False)
    return model, NullModel.fit(logits)


def seconds(model: Any, batches: Sequence[torch.Tensor], grid: str, null: NullModel) -> float:
    """Return how long one pass over the tokens takes with a grid."""
    routers = find_routers(model)
    start = time.process_time()
    if GRIDS[grid]:
        analyze_grid(model, routers, batches, GRIDS[grid], {NullKind(trim=None): null}, False)
    else:
        listen(model, [r.module for r in routers], batches, lambda layer, said: None, False)
    return time.process_time() - start


def main(
    repeats: int = 7,
    tokens: Annotated[
        int, typer.Option(help="Tokens per pass; the large layer gets a 32nd.")
    ] = 32768,
    output: Annotated[Path | None, typer.Option(help="JSON file for all times.")] = None,
) -> None:
    """Print the ratios of the medians, with the smallest and largest ratio of a repeat."""
    generator = torch.Generator().manual_seed(0)
    everything: dict[str, dict[str, list[float]]] = {}
    print("| model | grid | CPU seconds per pass | to one configuration | to none |")
    print("|---|---|---:|---:|---:|")
    for name in ("tiny-olmoe", "one layer of OLMoE's size"):
        amount = tokens if name == "tiny-olmoe" else tokens // 32
        ids = torch.randint(0, 4096, (-(-amount // 512), 512), generator=generator)
        batches = list(ids.split(8))
        model, null = tiny() if name == "tiny-olmoe" else one_layer(batches)
        times: dict[str, list[float]] = {grid: [] for grid in GRIDS}
        for repeat in range(repeats + 1):
            for grid in GRIDS:
                took = seconds(model, batches, grid, null)
                if repeat:  # the first is a warm-up
                    times[grid].append(took)
        everything[name] = times
        for grid, taken in times.items():
            cells = [name, grid, f"{np.median(taken):.3f}"]
            for base in ("1", "none"):
                ratios = np.array(taken) / np.array(times[base])
                cells.append(f"{np.median(ratios):.3f} ({ratios.min():.2f} to {ratios.max():.2f})")
            print(f"| {' | '.join(cells)} |")
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
