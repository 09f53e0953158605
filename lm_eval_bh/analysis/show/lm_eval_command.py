"""The stock ``lm_eval`` command that repeats an experiment."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from lm_eval_bh.analysis.read.earlier_release import upgraded
from lm_eval_bh.analysis.read.model_arguments import pretrained_of

DEFAULT_SEEDS = (0, 1234, 1234, 1234)
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
# Characters with a meaning in --model_args.
SPECIAL = frozenset(",[](){}'\"")


def lm_eval_command(content: Mapping[str, Any], task: str) -> str:
    """Return the command that evaluates one task with the settings of a results file.

    Parameters
    ----------
    content : mapping
        A ``results_*.json`` of lm-eval.
    task : str
        One of its tasks.

    Returns
    -------
    str
        Quoted for a POSIX shell, without settings that the file lacks: an output path, and an
        ``--include_path`` for custom tasks.
    """
    config = content["config"]
    words = ["lm_eval", "--model", "hf-bh" if config.get("bh") else config.get("model") or "hf-bh"]
    words += ["--model_args", _joined(_model_args(content))]
    words += ["--tasks", task]
    if shots := (content.get("n-shot") or {}).get(task):
        words += ["--num_fewshot", str(shots)]
    for option in ("batch_size", "device"):
        if config.get(option) is not None:
            words += [f"--{option}", str(config[option])]
    if config.get("limit") is not None:
        words += ["--limit", f"{config['limit']:g}"]
    if config.get("gen_kwargs"):
        kwargs = config["gen_kwargs"]
        words += ["--gen_kwargs", kwargs if isinstance(kwargs, str) else _joined(kwargs)]
    if content.get("system_instruction"):
        words += ["--system_instruction", content["system_instruction"]]
    if content.get("chat_template_sha"):
        words.append("--apply_chat_template")
        if content.get("fewshot_as_multiturn"):  # has no effect without a template
            words += ["--fewshot_as_multiturn", "true"]
    seeds = tuple(config.get(name, usual) for name, usual in zip(SEEDS, DEFAULT_SEEDS, strict=True))
    if seeds != DEFAULT_SEEDS:
        words += ["--seed", ",".join(map(str, seeds))]
    words += ["--output_path", "runs", "--log_samples"]
    return shlex.join(map(str, words))


def _model_args(content: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return the arguments as given, or spelt out if the model was given as an object."""
    config = content["config"]
    if given := config.get("model_args"):
        return given  # type: ignore[no-any-return]
    if not config.get("bh"):
        return {"pretrained": pretrained_of(content)}
    info = upgraded(config["bh"], "the results file")
    routing = info["config"]
    foreign = {"solved"}  # parameters that are refused if the rule does not take them
    if info["rule"]["fixed_count"]:
        foreign |= {"alpha", "min_k"}
    if routing.get("target_experts") is not None:
        foreign.add("alpha")
    routing = {k: v for k, v in routing.items() if k not in foreign and v is not None}
    return {"pretrained": pretrained_of(content)} | routing


def _joined(arguments: str | Mapping[str, Any]) -> str:
    if isinstance(arguments, str):
        return arguments
    if any(SPECIAL & set(str(value)) for value in arguments.values()):
        return json.dumps(dict(arguments))
    return ",".join(f"{name}={value}" for name, value in arguments.items())
