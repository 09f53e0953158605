"""Cost of distinct experts: a layer's time by experts read per step and used per token.

python scripts/bench_steps.py                             # one layer at OLMoE's true size
python scripts/bench_steps.py --rows 8 --rounds 15
python scripts/bench_steps.py --device cuda --dtype bfloat16
python scripts/bench_steps.py --small --rounds 2          # seconds: only to see that it works

A step of ``--rows`` tokens runs through one layer whose weights are random: its quality is
meaningless, its time is not. Experts are drawn so that a step reads exactly the number of distinct
experts of a row, and each token uses its number. All rows run in turn in shuffled rounds; ratios to
the first row (every expert read, 8 per token) are medians over the rounds, with 95 % bootstrap
intervals over rounds. A linear fit gives the cost of an expert read, and of an expert applied to a
token.

Then each method of a step decides for such a step, and its time is compared with the layer's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeModel

from lm_eval_bh import BHRoutingIntegration, NullModel, RoutingConfig
from lm_eval_bh.files import write_text
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.patching.hook import RouterHook
from lm_eval_bh.routing.patching.patch import Patch

# Experts read per step, and used per token.
CELLS = (
    *((64, k) for k in (8, 4, 2)),
    *((40, k) for k in (6, 4, 2)),
    *((24, k) for k in (8, 4, 1)),
    *((16, k) for k in (4, 1)),
)
LIMIT = 0.03  # largest share of the layer's time for a decision
STEP: dict[str, dict[str, Any]] = {
    "batch_min_w": {"statistic": "benefit", "mass": 0.2},
    "batch_mass": {"step_budget": 40},
    "xshare": {"step_budget": 40},
}


def experts_of_step(
    rows: int, distinct: int, k: int, experts: int, generator: torch.Generator
) -> Tensor:
    """Return int64 ``[rows, k]``: each token's experts, which together read all of ``distinct``."""
    pool = torch.randperm(experts, generator=generator)[:distinct]
    drawn = torch.stack([torch.randperm(distinct, generator=generator)[:k] for _ in range(rows)])
    missing = sorted(set(range(distinct)) - set(drawn.flatten().tolist()))
    for place, expert in enumerate(missing):  # in turn, into a slot whose expert occurs elsewhere
        for row in range(rows):
            at = (place + row) % rows
            counts = torch.bincount(drawn.flatten(), minlength=distinct)
            spare = [slot for slot in range(k) if counts[drawn[at, slot]] > 1]
            if spare and expert not in drawn[at]:
                drawn[at, spare[0]] = expert
                break
    assert len(drawn.unique()) == distinct
    return pool[drawn]


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round, with a random order per round."""
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):  # the first one warms up
        for name in order.permutation(list(calls)):
            _wait(device)
            start = time.perf_counter()
            calls[name]()
            _wait(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios of each round, and its 95 % interval."""
    ratios = np.array(ours) / np.array(theirs)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def main(
    rows: Annotated[int, typer.Option(help="Tokens of a step.")] = 32,
    rounds: Annotated[int, typer.Option(help="How often everything runs.")] = 11,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    small: Annotated[bool, typer.Option(help="A small layer, to see that it works.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write a JSON file.")] = None,
) -> None:
    """Measure the cost of the experts that a step reads."""
    torch.manual_seed(0)
    hidden, width = (64, 32) if small else (2048, 1024)
    config = OlmoeConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=1, vocab_size=64
    )
    where, kind = torch.device(device), getattr(torch, dtype)
    model = OlmoeModel(config).to(where, kind).eval()
    block = model.layers[0].mlp
    states = torch.randn(rows, hidden, device=where, dtype=kind)
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {}
    for distinct, k in CELLS:
        if rows * k < distinct:
            continue
        index = experts_of_step(rows, distinct, k, config.num_experts, generator).to(where)
        weights = torch.full(index.shape, 1 / k, device=where, dtype=kind)
        calls[f"{distinct}/{k}"] = lambda i=index, w=weights: block.experts(states, i, w)
    with torch.inference_mode():
        with BHRoutingIntegration(model, RoutingConfig(rule="oea")):
            seconds = interleaved(calls, rounds, where)
        layer = next(iter(seconds))
        table = _layer_table(seconds, layer, rows)
        decisions = interleaved(_decisions(model, states), rounds * 20, where)
    whole = float(np.median(seconds[layer]))
    shares = {name: float(np.median(found)) / whole for name, found in decisions.items()}
    console = Console()
    _show(console, table, shares, rows, whole)
    if output is not None:
        content = {
            "rows": rows,
            "device": device,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "layer_seconds": seconds,
            "decision_share": shares,
        } | table
        write_text(output, json.dumps(content, indent=1) + "\n")


def _null_of(scores: Tensor, config: RoutingConfig) -> NullModel | None:
    """Return the method's tables, of the router's log weights; factors and tables are random."""
    if not config.needs_null:
        return None
    kind, experts, draw = config.null_kind.made(), scores.shape[-1], np.random.default_rng(0)
    factors = draw.uniform(0.5, 1.5, (1, experts)) if STATISTICS[kind.statistic].table else None
    tables = {name: draw.uniform(0, 1, (1, experts, experts)) for name in kind.tables}
    return NullModel.from_scores([scores], kind, factors, tables)


def _decisions(model: OlmoeModel, states: Tensor) -> dict[str, Callable[[], Any]]:
    """Return a call of each step method's hook."""
    gate = model.layers[0].mlp.gate
    output = gate(states)
    scores = torch.log_softmax(gate(torch.randn(2000, *states.shape[1:]).to(states))[0].float(), -1)
    calls: dict[str, Callable[[], Any]] = {}
    for name, method in METHODS.items():
        if not method.joint or method.tests:
            continue  # a test needs its own null model, and takes as long
        config = RoutingConfig(rule=name, **STEP.get(name, {}))
        null = _null_of(scores.cpu(), config)
        routing = BHRoutingIntegration(
            model, config, null_model=null or "auto", collect_stats=False
        )
        hook = RouterHook(Patch(config, [], None), 0, routing.routers[0], routing.method(0))
        calls[name] = lambda hook=hook: hook(gate, (states,), output)
    return calls


def _layer_table(seconds: dict[str, list[float]], first: str, rows: int) -> dict[str, Any]:
    """Return each cell's ratio to the first, and the linear fit of their times."""
    cells = {name: ratio(found, seconds[first]) for name, found in seconds.items()}
    sizes = np.array([[1, int(d), rows * int(k)] for d, k in (name.split("/") for name in seconds)])
    times = np.array([np.median(found) for found in seconds.values()])
    (base, read, applied), *_ = np.linalg.lstsq(sizes, times, rcond=None)
    left = times - sizes @ [base, read, applied]
    return {
        "cells": cells,
        "line": {
            "seconds": float(base),
            "seconds_per_expert_read": float(read),
            "seconds_per_expert_applied": float(applied),
            "r_squared": float(1 - (left**2).sum() / ((times - times.mean()) ** 2).sum()),
        },
    }


def _show(
    console: Console, found: dict[str, Any], shares: dict[str, float], rows: int, whole: float
) -> None:
    table = Table(
        title=f"One layer, a step of {rows} rows; {1000 * whole:.1f} ms at the first cell"
    )
    for name in ("distinct experts", "experts per token", "times", "95 % interval"):
        table.add_column(name, justify="right")
    for cell, (middle, low, high) in found["cells"].items():
        table.add_row(*cell.split("/"), f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    line = found["line"]
    console.print(
        f"{1e3 * line['seconds']:.2f} ms, {1e3 * line['seconds_per_expert_read']:.3f} ms for each "
        f"expert read, {1e6 * line['seconds_per_expert_applied']:.1f} us for each expert of a "
        f"token; R² {line['r_squared']:.3f}"
    )
    table = Table(title="What a method of a step adds to a layer")
    table.add_column("method")
    table.add_column("share of the layer", justify="right")
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.2f} %" + ("" if share <= LIMIT else ", missed"))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
