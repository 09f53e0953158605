"""Paths of the runs' files that tests of readers damage."""

from __future__ import annotations

WIKITEXT = "bh_wikitext"
HUGE = 10**400
LONG = "x" * 300

SUMMARY_OF_A_SWEEP = {
    "schema_version": 1,
    "run_id": "run-1",
    "config": "8experts_bh_a040_wikitext",
    "strategy": "bh",
    "k_or_max_k": 8,
    "alpha": 0.4,
    "num_experts": 64,
    "dataset": WIKITEXT,
    "metrics": {"perplexity": 3.0, "accuracy": None},
    "summary": {"total_samples": 4, "elapsed_time_seconds": 1.5},
    "settings": {"limit": 3},
    "files": {"runs/x": "0"},
    "digest": "0",
}


def results_of(folder):
    return next((folder / "one").glob("results_*.json"))


def samples_of(folder):
    return next((folder / "one").glob(f"samples_{WIKITEXT}_*.jsonl"))


def manifest_of(folder):
    return folder / "logs" / "run-1" / "routing.json"


def log_of(folder):
    return next((folder / "logs" / "run-1").glob("*_wikitext_internal_routing.json"))
