"""``lm-eval-bh export``: takes a policy to an engine that does not know this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.printing import say
from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.files import check_output
from lm_eval_bh.resources import model_path

ENGINES = ("hf", "vllm", "llama.cpp")


def export(
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    to: Annotated[str, typer.Option(help=f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}.")],
    pretrained: Annotated[
        str | None, typer.Option(help="Hub name or folder of the model; default: the policy's.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Link to the weights instead of copying them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a model folder that routes by a policy, or print what llama.cpp is started with."""
    if to not in ENGINES:
        raise ParameterError(
            f"--to must be one of {', '.join(ENGINES)}: found {to!r}{did_you_mean(to, ENGINES)}."
        )
    from lm_eval_bh.export.checkpoint import Checkpoint
    from lm_eval_bh.export.llama_cpp import llama_cpp_options
    from lm_eval_bh.export.model_folder import check_apart, check_folder, export_folder
    from lm_eval_bh.routing.policy import Policy

    loaded = Policy.load(policy)
    name = pretrained or loaded.model
    if name is None:
        raise ParameterError("The policy does not say what model it is for: give --pretrained.")
    revision = loaded.revision if pretrained is None else None
    if to == "llama.cpp":
        if output is not None:
            raise ParameterError("--to llama.cpp writes nothing: leave --output out.")
        checkpoint = Checkpoint.find(model_path(name), revision)
        checkpoint.check(loaded, name)
        for line in llama_cpp_options(loaded, checkpoint):
            say(line)
        return
    if output is None:
        raise ParameterError(f"--to {to} needs --output: name a folder to write.")
    with on_interrupt(NOTHING_HALF_WRITTEN):
        check_folder(output, force)
        check_output(output, "--output", folder=True)
        checkpoint = Checkpoint.find(model_path(name), revision)
        check_apart(output, checkpoint, policy)
        export_folder(
            loaded, checkpoint, output, name=name, link=link, untie=to == "vllm", force=force
        )
    say(f"Written to {output}")
    if to == "vllm":
        say(f"vllm serve {output} --model-impl transformers --trust-remote-code")
    else:
        say(f'AutoModelForCausalLM.from_pretrained("{output}", trust_remote_code=True)')
