"""Time and memory of aggregating a full sweep, and of reading a long token log.

The runs are synthetic, in the formats and at the size of OLMoE-1B-7B: 20 configurations x 3 tasks,
60 experiments, each with lm-eval's samples of its documents. One configuration has an internal
routing log, the only file with the number of scored tokens.

python scripts/bench_aggregate.py                               # about two minutes, 2 GB of disk
python scripts/bench_aggregate.py --documents 20 --rows 100000  # seconds
python scripts/bench_aggregate.py --keep runs                   # also keeps the runs
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from lm_eval_bh.files import replacing
from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    MANIFEST,
    SCHEMA_VERSION,
    experiment_name,
    token_schema,
)

LAYERS, EXPERTS, NATIVE = 16, 64, 8
SIZES, ALPHAS = (8, 16, 32, 64), (0.3, 0.4, 0.5, 0.6)
WIKITEXT, LAMBADA, HELLASWAG = "bh_wikitext", "bh_lambada", "bh_hellaswag"
MODEL_CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50304,
    "num_experts": EXPERTS,
    "num_experts_per_tok": NATIVE,
}
TOKENS_A_DOCUMENT = 60

# Measured separately, so that the peak belongs to reading only.
READ = """
import json, resource, sys, time
import numpy as np, pyarrow.dataset as ds
start = time.perf_counter()
table = ds.dataset(sys.argv[1], format="parquet")
total, rows = np.zeros(int(sys.argv[2]) + 1, dtype=np.int64), 0
for batch in table.to_batches(columns=["layer", "count", "experts"]):
    total += np.bincount(batch["count"].to_numpy(), minlength=len(total))
    rows += batch.num_rows
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": rows, "seconds": seconds, "peak_mb": peak / 1024,
                  "mean_experts": float(total @ np.arange(len(total)) / rows)}))
"""
AGGREGATE = """
import json, resource, sys, time
start = time.perf_counter()
from lm_eval_bh.analysis.show.plots import create_comprehensive_visualization
from lm_eval_bh.analysis.results import load_experiments, write_tables
from lm_eval_bh.analysis.significance import compare
steps = {"import": time.perf_counter() - start}
def step(name, work):
    start = time.perf_counter()
    result = work()
    steps[name] = time.perf_counter() - start
    return result
loaded = step("read and join", lambda: load_experiments([sys.argv[1]]))
compared = step("compare", lambda: compare(loaded))
step("write tables", lambda: write_tables(loaded.frame, sys.argv[2]))
step("nine panels", lambda: create_comprehensive_visualization(
    loaded.frame, sys.argv[2] + "/figure.png", layers=loaded.layers))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": steps, "peak_mb": peak / 1024, "experiments": len(loaded.frame),
                  "comparisons": int(compared["p_value"].notna().sum()),
                  "problems": len(loaded.problems)}))
"""


class Runs:
    """Writes synthetic runs of a full sweep, with one results file per experiment.

    Parameters
    ----------
    folder : Path
        Output folder.
    documents : int
        Number of documents per task.
    """

    def __init__(self, folder: Path, documents: int) -> None:
        self.folder, self.documents = folder, documents
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(TOKENS_A_DOCUMENT // 2, 2 * TOKENS_A_DOCUMENT, documents)
        self.difficulty = rng.normal(0, 0.3, documents)
        self.luck = rng.random(documents)
        self.written = 0

    def write(self) -> None:
        """Write all of them."""
        configurations = [("topk", None, size) for size in SIZES]
        configurations += [("bh", alpha, size) for size, alpha in product(SIZES, ALPHAS)]
        for rule, alpha, size in configurations:
            for task in (WIKITEXT, LAMBADA, HELLASWAG):
                self.experiment(rule, alpha, size, task)

    def experiment(self, rule: str, alpha: float | None, max_k: int, task: str) -> None:
        self.written += 1
        rng = np.random.default_rng(self.written)
        run_id, name = f"run-{self.written}", experiment_name(rule, max_k, alpha, task)
        summary, mean = self.summary(rng, alpha, max_k)
        excess = self.excess(rule, mean)
        losses = math.log(16.8) + excess + self.difficulty + rng.normal(0, 0.02, self.documents)
        samples = [self.sample(task, i, loss, excess) for i, loss in enumerate(losses)]
        logged = (rule, alpha, max_k) == ("bh", ALPHAS[0], SIZES[0])
        content = self.results(task, samples)
        content["config"]["bh"] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "config": {"alpha": alpha or 0.4, "rule": rule, "min_k": 1, "max_k": max_k}
            | {"temperature": 1.0, "renormalize": "auto", "mode": "patch", "layers": "all"},
            "experts": "auto",
            "log_routing": "samples" if logged else "summary",
            "log_dir": str(self.folder / "logs") if logged else None,
            "routed_layers": list(range(LAYERS)),
            "num_layers": LAYERS,
            "num_experts": EXPERTS,
            "native_top_k": NATIVE,
            "model_config": MODEL_CONFIG,
            "null_model": {"fingerprint": "f" * 64} if rule == "bh" else None,
            "summary": summary
            | {"tasks": {task: summary}, "computed_tokens": summary["tokens"]}
            | {"padding_tokens": 0, "cached_requests": 0},
        }
        time_of = f"2026-01-01T00-{self.written:02}-00.5"
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / f"results_{time_of}.json").write_text(json.dumps(content))
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"samples_{task}_{time_of}.jsonl").write_text(lines)
        if logged:
            self.log(run_id, name, task, losses)

    @staticmethod
    def excess(rule: str, mean: float) -> float:
        """Return the loss in nats per token of fewer experts than in training, or more."""
        if rule == "topk":
            return 0.048 * math.log2(mean / NATIVE) ** 2.9 if mean > NATIVE else 0.0
        return 0.05 * abs(math.log2(mean / NATIVE)) ** 1.7 + 0.02

    def summary(
        self, rng: np.random.Generator, alpha: float | None, max_k: int
    ) -> tuple[dict[str, Any], float]:
        """Return exact counters, and the mean number of experts."""
        tokens = int(self.lengths.sum())
        layers, previous = [], None
        for layer in range(LAYERS):
            if alpha is None:
                counts = np.full(tokens, max_k)
            else:
                level = 16 * alpha**1.5 * (0.7 + 0.6 * layer / LAYERS)
                counts = np.clip(rng.gamma(1.2, level / 1.2, tokens).astype(int), 1, max_k)
            share = rng.dirichlet(np.full(EXPERTS, 2.0 if alpha is None else 0.6))
            layers.append(
                {
                    "layer": layer,
                    "mean_experts": float(counts.mean()),
                    "std_experts": float(counts.std()),
                    "histogram": np.bincount(counts, minlength=EXPERTS + 1).tolist(),
                    "usage": rng.multinomial(counts.sum(), share).tolist(),
                    "cross": 0 if previous is None else int((counts * previous).sum()),
                }
            )
            previous = counts
        mean = float(np.mean([layer["mean_experts"] for layer in layers]))
        deviation = float(np.mean([layer["std_experts"] for layer in layers]))
        return {
            "tokens": tokens,
            "seconds": tokens / 900 * (0.4 + 0.6 * mean / NATIVE) * rng.normal(1, 0.03),
            "mean_experts_per_token": mean,
            "std_experts_per_token": deviation,
            "layers": layers,
        }, mean

    def sample(self, task: str, number: int, loss: float, excess: float) -> dict[str, Any]:
        tokens = int(self.lengths[number])
        right = float(self.luck[number] < 0.65 - 0.35 * excess)
        metrics: dict[str, Any] = {
            WIKITEXT: {
                "word_perplexity": [-loss * tokens, round(0.8 * tokens)],
                "byte_perplexity": [-loss * tokens, 4 * tokens],
            },
            LAMBADA: {"perplexity": -loss * tokens, "acc": bool(right)},
            HELLASWAG: {"acc": right, "acc_norm": right},
        }[task]
        hashes = {
            f"{part}_hash": hashlib.sha256(f"{task}{part}{number}".encode()).hexdigest()
            for part in ("doc", "prompt", "target")
        }
        return {
            "doc_id": number,
            "doc": {"text": "word " * tokens},
            "resps": [[[str(-loss * tokens), "False"]]],
            "filter": "none",
            "metrics": list(metrics),
            **hashes,
            **metrics,
        }

    def results(self, task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {"alias": task, "sample_len": self.documents}
        for name in samples[0]["metrics"]:
            logged = np.array([sample[name] for sample in samples], dtype=float)
            if logged.ndim == 2:
                value, error = np.exp(-logged[:, 0].sum() / logged[:, 1].sum()), "N/A"
            elif name == "perplexity":
                value = np.exp(-logged.mean() / TOKENS_A_DOCUMENT)
                error = float(value * logged.std() / TOKENS_A_DOCUMENT / math.sqrt(len(logged)))
            else:
                value, error = logged.mean(), float(logged.std() / math.sqrt(len(logged)))
            values |= {f"{name},none": float(value), f"{name}_stderr,none": error}
        return {
            "results": {task: values},
            "configs": {task: {"task": task}},
            "versions": {task: 1.0},
            "n-shot": {task: 0},
            "n-samples": {task: {"original": 5000, "effective": self.documents}},
            "config": {
                "model": "hf-bh",
                "model_args": {"pretrained": "made-up/OLMoE"},
                "model_num_parameters": 6_919_161_856,
                "model_dtype": "torch.bfloat16",
                "limit": self.documents,
            },
            "date": float(self.written),
            "max_length": 512,
            "task_hashes": {task: f"hash of {task}"},
            "model_name": "made-up/OLMoE",
        }

    def log(self, run_id: str, name: str, task: str, losses: np.ndarray) -> None:
        """Write an internal routing log, and the manifest that marks it as complete."""
        rng = np.random.default_rng(self.written)
        samples = []
        for number, length in enumerate(self.lengths.tolist()):
            layers = [
                {
                    "layer": layer,
                    "selected_experts": rng.integers(0, EXPERTS, (length, SIZES[0])).tolist(),
                    "expert_weights": rng.random((length, SIZES[0])).round(6).tolist(),
                }
                for layer in range(LAYERS)
            ]
            samples.append(
                {"sample_id": number, "request": 0, "repeat": 0, "num_tokens": length}
                | {"token_ids": list(range(length)), "loss": float(losses[number])}
                | {"layers": layers}
            )
        folder = self.folder / "logs" / run_id
        folder.mkdir(parents=True)
        content = {"schema_version": SCHEMA_VERSION, "run_id": run_id, "config": name}
        content |= {"strategy": "bh", "num_experts": EXPERTS, "dataset": task}
        content |= {"samples": samples, "aggregate_stats": {}}
        (folder / f"{name}{INTERNAL_ROUTING}").write_text(json.dumps(content))
        manifest = {"schema_version": SCHEMA_VERSION, "run_id": run_id, "token_rows": 0}
        manifest["files"] = [f"{name}{INTERNAL_ROUTING}"]
        (folder / MANIFEST).write_text(json.dumps(manifest))


def write_tokens(folder: Path, rows: int, chunk: int = 250_000) -> int:
    """Write a token log with a number of rows, and return its size in bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    schema = token_schema(with_logits=False, num_experts=EXPERTS)
    for part, start in enumerate(range(0, rows, chunk)):
        size = min(chunk, rows - start)
        counts = rng.integers(1, NATIVE + 1, size)
        offsets = pa.array(np.concatenate(([0], np.cumsum(counts))), pa.int32())
        number = np.arange(start, start + size)
        columns = {
            "task": pa.DictionaryArray.from_arrays(np.zeros(size, np.int32), [WIKITEXT]),
            "doc_id": number // (LAYERS * TOKENS_A_DOCUMENT),
            "request": np.zeros(size),
            "repeat": np.zeros(size),
            "layer": number % LAYERS,
            "position": number // LAYERS % TOKENS_A_DOCUMENT,
            "token_id": rng.integers(0, 50304, size),
            "count": counts,
            "experts": pa.ListArray.from_arrays(
                offsets, pa.array(rng.integers(0, EXPERTS, counts.sum()), pa.int16())
            ),
            "weights": pa.ListArray.from_arrays(
                offsets, pa.array(rng.random(counts.sum(), np.float32))
            ),
            "loss": pa.array(rng.exponential(3.0, size), pa.float32()),
        }
        arrays = [
            value
            if isinstance(value, pa.Array)
            else pa.array(value.astype("int32")).cast(field.type)
            for field, value in ((field, columns[field.name]) for field in schema)
        ]
        pq.write_table(pa.table(arrays, schema=schema), folder / f"part-{part:05}.parquet")
    return sum(file.stat().st_size for file in folder.iterdir())


def in_a_process(code: str, *arguments: str) -> dict[str, Any]:
    """Run Python code by itself and return what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main(
    documents: Annotated[int, typer.Option(min=2, help="Documents per task.")] = 200,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the token log.")] = 10_000_000,
    keep: Annotated[Path | None, typer.Option(help="New folder to keep the runs in.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Write the synthetic runs, then measure in separate processes."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = keep or Path(scratch) / "runs"
        Runs(runs, documents).write()
        start = time.perf_counter()
        aggregated = in_a_process(AGGREGATE, str(runs), str(Path(scratch) / "tables"))
        aggregated["seconds"]["all, with the start of Python"] = time.perf_counter() - start
        size = write_tokens(Path(scratch) / "tokens", rows)
        read = in_a_process(READ, str(Path(scratch) / "tokens"), str(EXPERTS))

    table = Table(title=f"{aggregated['experiments']} experiments of {documents} documents")
    for column, side in (("step", "left"), ("seconds", "right")):
        table.add_column(column, justify=side)
    for name, seconds in aggregated["seconds"].items():
        table.add_row(name, f"{seconds:.2f}")
    Console().print(table)
    print(f"{aggregated['comparisons']} comparisons; peak {aggregated['peak_mb']:.0f} MB")
    print(
        f"Token log: {read['rows']:,} rows, {size / 2**20:.0f} MB on disk: read in "
        f"{read['seconds']:.1f} s, peak {read['peak_mb']:.0f} MB"
    )
    if output is not None:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
        content = {"aggregate": aggregated, "tokens": read | {"bytes": size}, "machine": machine}
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(content | {"documents": documents}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
