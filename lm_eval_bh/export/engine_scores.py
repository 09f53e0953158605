"""Scores documents in an engine: a script for another Python, without this package.

``python -I engine_scores.py job.json scores.json`` reads the job and writes the scores that
:func:`~lm_eval_bh.export.verification.verify` exchanges with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3  # exit code
GENERATED = 16  # tokens


def in_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """Score each document alone, with the code in the folder."""
    sys.modules["lm_eval_bh"] = None  # type: ignore[assignment]  # the folder must not need it
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"]), trust_remote_code=job["adaptive"]
    )
    model.to(device)
    counts: list[list[int]] = []

    def count(module: Any, args: Any, output: Any) -> None:
        counts.append((output[1] > 0).sum(-1).tolist())

    def score(ids: Any) -> list[float]:
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0].float()
        return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].tolist()  # type: ignore[no-any-return]

    documents = [torch.tensor(ids, device=device) for ids in job["documents"]]
    hooks = [
        module.register_forward_hook(count)
        for name, module in model.named_modules()
        if name.endswith(".mlp.gate")
    ]
    log_probs = [score(ids) for ids in documents]
    for hook in hooks:
        hook.remove()
    started = time.perf_counter()
    for ids in documents:
        score(ids)
    seconds = time.perf_counter() - started
    prompt = documents[0][None, : job["prompt"]]
    mask = torch.ones_like(prompt)
    text = model.generate(prompt, attention_mask=mask, max_new_tokens=GENERATED, do_sample=False)
    generated = text[0, prompt.shape[1] :].tolist()
    return {
        "log_probs": log_probs,
        "counts": counts,
        "seconds": seconds,
        "generated": generated,
        "engine": f"transformers {sys.modules['transformers'].__version__}",
    }


def in_vllm(job: dict[str, Any]) -> dict[str, Any]:
    """Score all documents in one batch."""
    os.environ.update(job["environment"])
    import torch
    import vllm

    model = vllm.LLM(
        model=job["folder"],
        dtype=job["dtype"],
        max_model_len=job["length"],
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        **job["options"],
    )
    greedy = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in job["documents"]]
    outputs = model.generate(prompts, greedy, use_tqdm=False)
    log_probs = [
        [at[token].logprob for token, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
        for ids, out in zip(job["documents"], outputs, strict=True)
    ]
    started = time.perf_counter()
    model.generate(prompts, greedy, use_tqdm=False)
    seconds = time.perf_counter() - started
    longer = vllm.SamplingParams(max_tokens=GENERATED, temperature=0)
    prompt = {"prompt_token_ids": job["documents"][0][: job["prompt"]]}
    [out] = model.generate([prompt], longer, use_tqdm=False)
    return {
        "log_probs": log_probs,
        "counts": None,
        "seconds": seconds,
        "generated": list(out.outputs[0].token_ids),
        "engine": f"vLLM {vllm.__version__} ({'CUDA' if torch.cuda.is_available() else 'CPU'})",
    }


def main() -> int:
    """Run the job, and return an exit code."""
    source, target = map(Path, sys.argv[1:])
    job = json.loads(source.read_text(encoding="utf-8"))
    needed = {"hf": ["transformers"], "vllm": ["vllm"], "vllm-plugin": ["vllm", "lm_eval_bh"]}
    try:
        for name in needed[job["engine"]]:  # vLLM goes on without a plugin that it cannot import
            __import__(name)
    except ImportError:
        return NOT_INSTALLED
    scores = in_transformers(job) if job["engine"] == "hf" else in_vllm(job)
    target.write_text(json.dumps(scores), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
