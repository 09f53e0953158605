"""Time the cost of routing logs: whole scoring runs with log_routing off, summary and full.

    python scripts/bench_logging.py --output bench_logging.json

Two models: tiny-olmoe, which is so cheap that logging is most visible, and one layer of random
weights at the true size of OLMoE-1B-7B. The text is WikiText-2's test split from the Hugging Face
cache. Ratios are medians over repeats in which the levels take turns, so that a busy machine slows
all of them alike. Peak memory is that of new processes that log n and 4 n documents in full.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from lm_eval_bh import NullModel
from lm_eval_bh.files import replacing
from lm_eval_bh.harness.logs.log_options import LogOptions
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.calibration import collect_router_logits

LEVELS = ("off", "summary", "full")


def documents(number: int) -> list[Instance]:
    """Return the first documents of WikiText-2's test split, as lm-eval requests them."""
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    task = manager.load(["bh_wikitext"])["tasks"]["bh_wikitext"]
    task.build_all_requests(limit=number, rank=0, world_size=1)
    return list(task.instances)


def tiny(batch_size: int) -> BHLM:
    return BHLM(pretrained="tiny-olmoe", alpha=0.4, batch_size=batch_size, device=device())


def true_size_layer(batch_size: int, folder: Path) -> BHLM:
    """Return one OLMoE layer of true size, with random weights and tiny-olmoe's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_experts_per_tok=8,
        num_experts=64,
        max_position_embeddings=512,
    )
    model = OlmoeForCausalLM(config).eval().to(device())
    routers = find_routers(model)
    for router in routers:
        torch.nn.init.normal_(router.weight, std=0.02)
    ids = torch.randint(2, len(tokenizer), (4, 256))
    logits = collect_router_logits(model, [r.module for r in routers], [ids], progress=False)
    NullModel.fit(logits).save(folder / "null.safetensors")
    return BHLM(
        pretrained=model,
        tokenizer=tokenizer,
        alpha=0.4,
        kde=str(folder / "null.safetensors"),
        batch_size=batch_size,
    )


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def time_levels(lm: BHLM, instances: list[Instance], repeats: int, folder: Path) -> dict[str, Any]:
    """Score the documents at every level in turn, and return seconds and ratios to "off"."""
    seconds: dict[str, list[float]] = {level: [] for level in LEVELS}
    for repeat in range(repeats + 1):  # the first round warms up
        for level in LEVELS:
            lm.start_log(LogOptions(level, str(folder) if level == "full" else None))
            start = time.perf_counter()
            lm.loglikelihood_rolling(instances, disable_tqdm=True)
            lm.log.finish()
            if repeat:
                seconds[level].append(time.perf_counter() - start)
    tokens = sum(len(lm.tok_encode(instance.args[0])) for instance in instances)
    ratios = {
        level: [a / b for a, b in zip(seconds[level], seconds["off"], strict=True)]
        for level in LEVELS
    }
    return {
        "tokens": tokens,
        "seconds": {level: statistics.median(times) for level, times in seconds.items()},
        "ratio": {level: statistics.median(values) for level, values in ratios.items()},
        "spread": {level: (min(values), max(values)) for level, values in ratios.items()},
    }


def peak_memory(number: int) -> float:
    """Return the peak memory, in MiB, of a process that logs everything about some documents."""
    code = f"import bench_logging; bench_logging.log_everything({number})"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(run.stdout.strip().splitlines()[-1])


def log_everything(number: int) -> None:
    """Log every token of some documents, and print this process's peak memory in MiB."""
    lm, instances = tiny(8), documents(number)
    with tempfile.TemporaryDirectory() as folder:
        lm.start_log(LogOptions("full", folder))
        lm.loglikelihood_rolling(instances, disable_tqdm=True)
        lm.log.finish()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(
    repeats: int = 5,
    number: Annotated[int, typer.Option(help="Documents for tiny-olmoe.")] = 6,
    number_true_size: Annotated[int, typer.Option(help="Documents for the true-size layer.")] = 1,
    batch_size: int = 8,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Print the table of ratios."""
    table = Table(title=f"Routing logs, median of {repeats} interleaved repeats (min to max)")
    for column in ("model", "tokens", "off, s", "summary / off", "full / off"):
        table.add_column(column, justify="right")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, lm, instances in (
            ("tiny-olmoe", tiny(batch_size), documents(number)),
            (
                "one true-size layer",
                true_size_layer(batch_size, folder),
                documents(number_true_size),
            ),
        ):
            result = results[label] = time_levels(lm, instances, repeats, folder)
            cells = [
                f"{result['ratio'][level]:.3f} ({result['spread'][level][0]:.3f} to "
                f"{result['spread'][level][1]:.3f})"
                for level in LEVELS[1:]
            ]
            table.add_row(label, str(result["tokens"]), f"{result['seconds']['off']:.2f}", *cells)
    Console(width=120).print(table)
    if memory:
        few, many = number, 4 * number
        results["peak_memory_mib"] = {few: peak_memory(few), many: peak_memory(many)}
        print(
            f"Peak memory, log_routing=full: {results['peak_memory_mib'][few]:.0f} MiB for {few} "
            f"documents, {results['peak_memory_mib'][many]:.0f} MiB for {many}."
        )
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
