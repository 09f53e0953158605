"""Writes a model folder that routes by a policy wherever transformers loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.export.checkpoint import EMBEDDINGS, FILES, INDEX, WEIGHTS, Checkpoint
from lm_eval_bh.export.layer_methods import files_of, layer_methods
from lm_eval_bh.files import as_new, replacing_folder
from lm_eval_bh.routing.config import rule_info
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.reading import plain
from lm_eval_bh.routing.patching.fits import check_fit
from lm_eval_bh.routing.policy import Policy, described
from lm_eval_bh.routing.router_reader import reading_of
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.schema import ExportedPolicy

FORMAT_VERSION = 2
KEY = "adaptive_routing"  # key in config.json
TABLES = "model-adaptive-routing.safetensors"
ALONE = "model-original.safetensors"  # renamed, as transformers would read no other file
PORTABLE = Path(__file__).parent / "portable"
MODELING, CHOSEN = "modeling_adaptive_moe.py", "methods_of_policy.py"


def export_folder(
    policy: Policy,
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str,
    link: bool = False,
    untie: bool = False,
    force: bool = False,
) -> None:
    """Write the folder, completely or not at all.

    Parameters
    ----------
    policy : Policy
        The policy.
    checkpoint : Checkpoint
        The model.
    output : Path
        The folder to write.
    name : str
        Name of the model in messages.
    link : bool
        Whether to link to the weights instead of copying them.
    untie : bool
        Whether to give a head with shared embeddings a copy, which vLLM's own OLMoE needs.
    force : bool
        Whether to replace an earlier export.

    Raises
    ------
    PolicyError
        If the policy was made for another model, or engines cannot run it.
    ParameterError
        If the folder exists and may not be replaced, or overlaps with the model's.
    """
    check_folder(output, force)
    check_apart(output, checkpoint)
    checkpoint.check(policy, name)
    check_fit(policy.config, checkpoint.routers)
    methods = layer_methods(policy, softmax=checkpoint.routers[0].softmax)
    tensors = {
        f"{router.name}.selection.{key}": table
        for router, method in zip(checkpoint.routers, methods, strict=True)
        for key, table in method.state_dict().items()
    }
    config = checkpoint.config | {
        "architectures": [f"Adaptive{checkpoint.classes['AutoModelForCausalLM']}"],
        "auto_map": {
            auto: f"{Path(MODELING).stem}.Adaptive{name}"
            for auto, name in checkpoint.classes.items()
        },
        # Engines size their buffers by this; the settings decide which experts serve.
        "num_experts_per_tok": max(method.max_k for method in methods),
        KEY: {
            "format_version": FORMAT_VERSION,
            "policy": _described(policy, name),
            "unused": "repeat",
            "native_top_k": policy.native_top_k,
            "layers": [method.settings | {"method": method.name} for method in methods],
            "routers": [
                _what_it_does(router, method)
                for router, method in zip(checkpoint.routers, methods, strict=True)
            ],
        },
    }
    with replacing_folder(output) as folder:
        for file in (PORTABLE / MODELING, *files_of(methods)):
            shutil.copyfile(file, folder / file.name)
        (folder / CHOSEN).write_text(chosen_methods(methods), encoding="utf-8")
        write_model(checkpoint, folder, config, tensors, link=link, untie=untie)
        (folder / "README.md").write_text(_card(policy, name), encoding="utf-8")


def check_folder(output: Path, force: bool) -> None:
    """Raise a :class:`ParameterError` if a folder may not be written.

    Only an earlier export or an empty folder is ever replaced.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ParameterError(f"--output-dir {output} is not a folder: name a folder.")
    if not any(output.iterdir()):
        return
    try:
        exported = KEY in json.loads((output / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        exported = False
    if not exported:
        raise ParameterError(
            f"--output-dir {output} holds something other than an exported model: "
            "name another folder."
        )
    if not force:
        raise ParameterError(f"--output-dir {output} exists: use --overwrite to replace it.")


def check_apart(output: Path, checkpoint: Checkpoint, *others: Path) -> None:
    """Raise a :class:`ParameterError` if writing a folder would change its sources.

    Parameters
    ----------
    output : Path
        The folder to write, which replaces an existing one.
    checkpoint : Checkpoint
        The model: neither its folder nor its linked weights may be in
        ``output``, nor may ``output`` be in its folder.
    others : Path
        Further files that must not be in ``output``.
    """
    source = checkpoint.folder.resolve()
    # The place where a link would be replaced, and its target.
    for place in (output.absolute().parent.resolve() / output.name, output.resolve()):
        if _holds(source, place):
            raise ParameterError(
                f"--output-dir {output} is or lies in the folder of the model, "
                f"{checkpoint.folder}: name a folder outside."
            )
        weights = [checkpoint.folder / name for name in sorted(set(checkpoint.places.values()))]
        for file in (source, *weights, *others):
            if _holds(place, file.resolve()):
                raise ParameterError(
                    f"--output-dir {output} holds {file}, which the export needs and would "
                    "replace: name another folder."
                )


def _holds(folder: Path, path: Path) -> bool:
    """Return whether a path is a folder or lies in it, following links."""
    return folder.exists() and any(
        place.exists() and place.samefile(folder) for place in (path, *path.parents)
    )


def write_model(
    checkpoint: Checkpoint,
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    link: bool,
    untie: bool,
) -> None:
    """Write a model with further tensors: everything except code."""
    config, tensors = dict(config), dict(tensors)
    if untie and checkpoint.tied:
        config["tie_word_embeddings"] = False
        tensors["lm_head.weight"] = checkpoint.tensor(EMBEDDINGS)
    for pattern in FILES:
        for file in checkpoint.folder.glob(pattern):
            if file.name not in ("config.json", INDEX) and file.suffix != ".safetensors":
                shutil.copyfile(file, folder / file.name)
    places = dict(checkpoint.places)
    for file_name in sorted(set(places.values())):
        source = (checkpoint.folder / file_name).resolve()
        target = folder / (ALONE if file_name == WEIGHTS else file_name)
        if link:
            target.symlink_to(source)
        else:
            shutil.copyfile(source, target)
    places = {key: ALONE if file == WEIGHTS else file for key, file in places.items()}
    if tensors:
        save_file(tensors, folder / TABLES, metadata={"format": "pt"})
        as_new(folder / TABLES)  # safetensors makes files readable only by their owner
        places |= dict.fromkeys(tensors, TABLES)
    sizes = [(folder / file).stat().st_size for file in set(places.values())]
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    for file_name, content in ((INDEX, index), ("config.json", config)):
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (folder / file_name).write_text(text, encoding="utf-8")


def chosen_methods(methods: Sequence[Method]) -> str:
    """Return the file that names the methods of a policy."""
    kinds = {method.name: type(method) for method in methods}
    imports = [
        f"from .{kind.__module__.split('.')[-1]} import {kind.__name__}" for kind in kinds.values()
    ]
    table = ", ".join(f'"{name}": {kind.__name__}' for name, kind in kinds.items())
    lines = ['"""The methods that the routers of this folder use."""', "", *sorted(imports)]
    return "\n".join([*lines, "", f"METHODS = {{{table}}}", ""])


def _what_it_does(router: Router, method: Method) -> dict[str, Any]:
    """Return the properties of a router for the modeling file."""
    slots, order = method.asks(router.top_k), router.order
    return {
        "name": router.name,
        "obeys": router.behaviour.obeys,
        "bias": None if order is None else order.bias,
        "beside": order is not None and order.beside,
        "reading": asdict(reading_of(router, slots, in_order=not plain(method, slots))),
    }


def _described(policy: Policy, name: str) -> ExportedPolicy:
    """Return a description for tables of results."""
    return {
        "digest": policy.digest(),
        "model": name,
        "fingerprint": policy.fingerprint,
        "config": described(policy.config, policy.solution),
        "rule": rule_info(policy.config.rule),
        "routed_layers": policy.config.select_layers(policy.num_layers),
        "num_layers": policy.num_layers,
        "num_experts": policy.num_experts,
        "native_top_k": policy.native_top_k,
    }


def _card(policy: Policy, name: str) -> str:
    described = {k: v for k, v in policy.config.as_dict().items() if v is not None}
    settings = "\n".join(f"- {key}: {value}" for key, value in described.items())
    return (
        f"# {Path(name).name} with adaptive routing\n\n"
        "The weights are the original's. The routers give each token as many experts as this "
        f"policy says (digest {policy.digest()[:12]}):\n\n{settings}\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)\n'
        "```\n\n"
        "In vLLM: `vllm serve THIS_FOLDER --model-impl transformers --trust-remote-code`.\n"
    )
