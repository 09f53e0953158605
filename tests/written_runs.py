"""Folders of experiments: written by hand in the formats of schema.py, and by lm-eval itself."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    MANIFEST,
    SCHEMA_VERSION,
    RuleInfo,
    RunInfo,
    TaskSummary,
    experiment_name,
)

LAYERS, EXPERTS, NATIVE = 3, 16, 4
LENGTHS = (5, 9, 4, 7)  # tokens of the documents
WIKITEXT, LAMBADA, HELLASWAG = "bh_wikitext", "bh_lambada", "bh_hellaswag"
MODEL_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 8,
    "moe_intermediate_size": None,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
    "vocab_size": 100,
    "num_experts": EXPERTS,
    "num_experts_per_tok": NATIVE,
    "tie_word_embeddings": True,
}


def select(rng: np.random.Generator, min_k: int, max_k: int) -> np.ndarray:
    """Return experts of every token, int [layers, tokens, max_k], padded with -1."""
    chosen = np.full((LAYERS, sum(LENGTHS), max_k), -1)
    for layer in range(LAYERS):
        for token in range(chosen.shape[1]):
            count = rng.integers(min_k, max_k + 1)
            chosen[layer, token, :count] = rng.permutation(EXPERTS)[:count]
    return chosen


def summarize(selected: np.ndarray, seconds: float) -> TaskSummary:
    """Return the exact counters of a selection."""
    counts = (selected >= 0).sum(-1)
    return {
        "tokens": counts.shape[1],
        "seconds": seconds,
        "mean_experts_per_token": float(counts.mean()),
        "std_experts_per_token": float(counts.std()),
        "layers": [
            {
                "layer": layer,
                "mean_experts": float(counts[layer].mean()),
                "std_experts": float(counts[layer].std()),
                "histogram": np.bincount(counts[layer], minlength=EXPERTS + 1).tolist(),
                "usage": [int((selected[layer] == expert).sum()) for expert in range(EXPERTS)],
                "cross": int((counts[layer] * counts[layer - 1]).sum()) if layer else 0,
            }
            for layer in range(LAYERS)
        ],
    }


def internal_routing(run_id: str, name: str, task: str, selected: np.ndarray, losses) -> Any:
    samples, start = [], 0
    for doc_id, (length, loss) in enumerate(zip(LENGTHS, losses, strict=True)):
        part = selected[:, start : start + length]
        samples.append(
            {
                "sample_id": doc_id,
                "request": 0,
                "repeat": 0,
                "num_tokens": length,
                "token_ids": list(range(start, start + length)),
                "loss": loss,
                "layers": [
                    {"layer": layer, "selected_experts": part[layer].tolist()}
                    for layer in range(LAYERS)
                ],
            }
        )
        start += length
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "config": name,
        "strategy": "bh",
        "num_experts": EXPERTS,
        "dataset": task,
        "samples": samples,
        "aggregate_stats": {},
    }


def rule_info(name: str) -> RuleInfo:
    """Return a rule's description in results files of this release."""
    fixed_count = name in ("topk", "random_k")
    labels = {"topk": "top-k", "top_p": "top-p", "min_p": "min-p", "random_k": "random-k"}
    labels |= {"bh": "BH", "by": "BY"} | {n: n.title() for n in ("holm", "hochberg", "bonferroni")}
    return {
        "name": name,
        "label": labels.get(name, name),
        "source": "a paper",
        "fixed_count": fixed_count,
        "tests": not fixed_count and name not in ("top_p", "min_p"),
        "random": name == "random_k",
        "alpha": "level",
    }


class Writer:
    """Writes runs as lm-eval and hf-bh do: every document is scored on all its tokens."""

    layers, experts, native = LAYERS, EXPERTS, NATIVE
    lengths = LENGTHS
    model_config = MODEL_CONFIG
    select = staticmethod(select)

    def __init__(self, folder: Path, first_release: bool = False) -> None:
        self.folder = folder
        self.first_release = first_release  # which neither described rules nor named null_scope
        self.runs = 0

    def __call__(
        self,
        name: str,
        *,
        rule: str = "bh",
        alpha: float = 0.4,
        max_k: int = NATIVE,
        min_k: int = 1,
        loss: float | tuple[float, ...] = 2.0,  # nats a token, of all documents or of each
        right: tuple[int, ...] = (1, 0, 1, 0),  # of lambada and hellaswag
        tasks: tuple[str, ...] = (WIKITEXT, LAMBADA, HELLASWAG),
        seed: int = 0,
        samples: bool = True,
        log: bool = False,
        model: str = "hf-bh",
        pretrained: str = "some/model",
        run_id: str | None = None,
        change: Callable[[dict[str, Any]], object] | None = None,
        **config: Any,
    ) -> Path:
        """Write one run and return its results file."""
        self.runs += 1
        run_id = run_id or f"run-{self.runs}"
        losses = np.broadcast_to(loss, len(LENGTHS)).astype(float)
        selected = select(
            np.random.default_rng(seed), max_k if rule_info(rule)["fixed_count"] else min_k, max_k
        )
        summary = summarize(selected, seconds=0.5)
        info: RunInfo = {
            "schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "config": {
                "alpha": alpha,
                "rule": rule,
                "min_k": min_k,
                "max_k": max_k,
                "temperature": 1.0,
                "renormalize": "auto",
                "mode": "patch",
                "layers": "all",
            }
            | config,
            "rule": rule_info(rule),
            "experts": "auto",
            "log_routing": "samples" if log else "summary",
            "log_dir": str(self.folder / "logs") if log else None,
            "routed_layers": list(range(LAYERS)),
            "num_layers": LAYERS,
            "num_experts": EXPERTS,
            "native_top_k": NATIVE,
            "model_config": MODEL_CONFIG,
            "null_model": None
            if rule == "topk"
            else {"fingerprint": "f" * 64, "bandwidth": [0.1], "versions": {"numpy": "2"}},
            "summary": summary
            | {
                "tasks": {task: copy.deepcopy(summary) for task in tasks},
                "computed_tokens": sum(LENGTHS),
                "padding_tokens": 3,
                "cached_requests": 0,
            },
        }
        documents = {task: self.documents(task, losses, right) for task in tasks}
        content = {
            "results": {task: self.results(task, documents[task]) for task in tasks},
            "configs": {task: {"task": task} for task in tasks},
            "versions": dict.fromkeys(tasks, 1.0),
            "n-shot": dict.fromkeys(tasks, 0),
            "n-samples": {t: {"original": 10, "effective": len(LENGTHS)} for t in tasks},
            "config": {
                "model": model,
                "model_args": {"pretrained": pretrained},
                "model_num_parameters": 1000,
                "model_dtype": "torch.float32",
                "model_sha": "",
                "limit": len(LENGTHS),
                "fewshot_seed": 1234,
                "gen_kwargs": None,
            },
            "date": float(self.runs),
            "max_length": 64,
            "task_hashes": {task: f"hash of {task}" for task in tasks} if samples else {},
            "model_name": pretrained,
        }
        if self.first_release:
            del info["rule"]
            if scope := info["config"].pop("null_scope", None):
                info["config"]["null"] = {"layer": "pooled"}.get(scope, scope)
        if model == "hf-bh":
            content["config"]["bh"] = info
        if change is not None:
            change(content)
        folder = self.folder / name
        folder.mkdir(parents=True)
        time = f"2026-01-01T00-00-{self.runs:02}.5"
        for task in tasks if samples else ():
            lines = "".join(json.dumps(line) + "\n" for line in documents[task])
            (folder / f"samples_{task}_{time}.jsonl").write_text(lines)
        if log:
            self.log(run_id, info, selected, losses)
        file = folder / f"results_{time}.json"
        file.write_text(json.dumps(content))
        return file

    def log(self, run_id: str, info: RunInfo, selected: np.ndarray, losses: np.ndarray) -> None:
        folder = self.folder / "logs" / run_id
        folder.mkdir(parents=True)
        config, files = info["config"], []
        assert info["summary"] is not None
        for task in info["summary"]["tasks"]:
            alpha = None if rule_info(config["rule"])["fixed_count"] else config["alpha"]
            name = experiment_name(config["rule"], config["max_k"], alpha, task)
            files.append(name + INTERNAL_ROUTING)
            content = internal_routing(run_id, name, task, selected, losses.tolist())
            (folder / files[-1]).write_text(json.dumps(content) + "\n")
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "files": files,
            "token_rows": 0,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest))

    @staticmethod
    def documents(task: str, losses: np.ndarray, right: tuple[int, ...]) -> list[dict[str, Any]]:
        found = []
        for doc_id, (length, loss) in enumerate(zip(LENGTHS, losses, strict=True)):
            loglikelihood = -float(loss) * length
            metrics: dict[str, Any] = {
                WIKITEXT: {
                    "word_perplexity": [loglikelihood, length - 1],
                    "byte_perplexity": [loglikelihood, 4 * length],
                },
                LAMBADA: {"perplexity": loglikelihood, "acc": bool(right[doc_id])},
                HELLASWAG: {"acc": 1.0, "acc_norm": float(right[doc_id])},
            }[task]
            found.append(
                {
                    "doc_id": doc_id,
                    "resps": [[[str(loglikelihood), "False"]]] * (4 if task == HELLASWAG else 1),
                    "filter": "none",
                    "metrics": list(metrics),
                    **{
                        f"{part}_hash": hashlib.sha256(f"{task}{part}{doc_id}".encode()).hexdigest()
                        for part in ("doc", "prompt", "target")
                    },
                    **metrics,
                }
            )
        return found

    @staticmethod
    def results(task: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
        def mean(name: str) -> float:
            return float(np.mean([document[name] for document in documents]))

        def weighted(name: str) -> float:
            pairs = np.array([document[name] for document in documents])
            return float(np.exp(-pairs[:, 0].sum() / pairs[:, 1].sum()))

        values: dict[str, Any] = {"alias": task, "sample_len": len(documents)}
        if task == WIKITEXT:
            for name in ("word_perplexity", "byte_perplexity"):
                values |= {f"{name},none": weighted(name), f"{name}_stderr,none": "N/A"}
        if task == LAMBADA:
            values |= {"perplexity,none": float(np.exp(-mean("perplexity")))}
            values |= {"perplexity_stderr,none": 0.25}
        for name in {LAMBADA: ("acc",), HELLASWAG: ("acc", "acc_norm")}.get(task, ()):
            values |= {f"{name},none": mean(name), f"{name}_stderr,none": 0.125}
        return values


@pytest.fixture(scope="session")
def new_writer() -> type[Writer]:
    """Return the class, for tests that share what they write."""
    return Writer


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that lm-eval itself wrote: the stock model, and twice the same BH routing."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from lm_eval_bh.resources import shipped, tiny_olmoe

    folder = tmp_path_factory.mktemp("runs")
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    ours = f"pretrained=tiny-olmoe,alpha=0.4,log_routing=samples,log_dir={folder / 'logs'}"
    for name, model, arguments in (
        ("stock", "hf", f"pretrained={tiny_olmoe()}"),
        ("bh", "hf-bh", ours),
        ("again", "hf-bh", ours),
    ):
        tracker = EvaluationTracker(output_path=str(folder / name))
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag"],
            task_manager=manager,
            limit=4,
            batch_size=8,
            bootstrap_iters=100,
            device="cpu",
            evaluation_tracker=tracker,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results, samples)
        for task, some in samples.items():
            tracker.save_results_samples(task, some)
    return folder
