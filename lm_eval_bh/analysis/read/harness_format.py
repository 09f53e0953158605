"""The fields that tables need from lm-eval's files, with types; some are optional."""

from __future__ import annotations

from typing import Any, TypedDict

# A measured value, its standard error ("N/A" if missing), or a task's own entry.
Measured = float | bool | str | list[Any] | dict[str, Any] | None


class SampleCounts(TypedDict):
    """Numbers of a task's documents, and of those evaluated."""

    original: int
    effective: int


class HarnessConfig(TypedDict, total=False):
    """``config``."""

    model: str | None
    model_args: dict[str, Any] | str | None
    model_num_parameters: int | None
    model_dtype: str | None
    model_sha: str | None
    limit: float | None
    fewshot_seed: int | None


class HarnessSettings(TypedDict, total=False):
    """Settings of an evaluation; later releases of lm-eval write more of them."""

    configs: dict[str, Any] | None
    versions: dict[str, Any] | None
    task_hashes: dict[str, str] | None
    higher_is_better: dict[str, dict[str, bool | None] | None] | None
    date: float | None
    max_length: int | None
    model_name: str | None
    model_source: str | None
    system_instruction_sha: str | None
    chat_template_sha: str | None
    fewshot_as_multiturn: bool | None


# Two names with a hyphen.
HarnessTables = TypedDict(
    "HarnessTables",
    {"n-samples": dict[str, SampleCounts] | None, "n-shot": dict[str, int | str | None] | None},
    total=False,
)


class HarnessResults(HarnessSettings, HarnessTables):
    """``results_*.json``."""

    results: dict[str, dict[str, Measured]]
    config: HarnessConfig


class _OfSomeTasks(TypedDict, total=False):
    doc_hash: str | None
    prompt_hash: str | None
    target_hash: str | None
    word_perplexity: list[float] | float | None  # log-likelihood in nats, and words
    byte_perplexity: list[float] | float | None
    perplexity: list[Any] | float | None  # log-likelihood in nats
    acc: float | bool | list[Any] | dict[str, Any] | None
    acc_norm: float | bool | list[Any] | dict[str, Any] | None
    exact_match: float | bool | list[Any] | dict[str, Any] | None


class HarnessSample(_OfSomeTasks):
    """A line of ``samples_<task>_<time>.jsonl``."""

    doc_id: int
    resps: list[Any]
