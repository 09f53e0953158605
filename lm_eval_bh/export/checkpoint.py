"""Reads a model's files in its folder or the hub's cache, without loading all of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.routers import Router, find_routers, is_projection
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.validation import mismatch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]
EMBEDDINGS = "model.embed_tokens.weight"
CLASSES = {"AutoModel": MODEL_MAPPING, "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING}
_ROUTER = re.compile(r"(?:^|[._])(?:gate|router)\.")  # in tensor names of checkpoints


class _OfSomeModels(TypedDict, total=False):
    norm_topk_prob: bool | None
    tie_word_embeddings: bool | None
    max_position_embeddings: int | None


class _Config(_OfSomeModels):
    model_type: str


class _Index(TypedDict):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """The files of a mixture-of-experts model that can be exported.

    Attributes
    ----------
    folder : Path
        Folder of the files.
    config : dict
        Its ``config.json``.
    places : dict of str to str
        The file of every tensor.
    """

    folder: Path
    config: dict[str, Any]
    places: dict[str, str]

    @classmethod
    def find(
        cls,
        pretrained: str,
        revision: str | None = None,
        *,
        download: bool = True,
    ) -> Checkpoint:
        """Find a model by its folder or hub name.

        Parameters
        ----------
        pretrained, revision : str
            Folder or hub name, and commit.
        download : bool
            Whether to download missing files.

        Raises
        ------
        ModelError
            If the model is missing or damaged, or its family cannot be exported.
        """
        folder = Path(pretrained)
        try:
            if not folder.is_dir():
                folder = Path(
                    snapshot_download(
                        pretrained,
                        revision=revision,
                        allow_patterns=FILES,
                        local_files_only=not download,
                    )
                )
            config = _read(folder / "config.json", _Config)
            places = _places(folder)
        except (
            HfHubHTTPError,
            HFValidationError,
            KeyError,
            LocalEntryNotFoundError,
            OSError,
            RecursionError,
            SafetensorError,
            TypeError,
            ValueError,
        ) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise ModelError(
                f"The model {pretrained!r} could not be read ({reason}): check its name and the "
                "network, and that its weights are safetensors."
            ) from error
        found = cls(folder, config, places)
        try:
            assert found.router_names
        except (AttributeError, ImportError, KeyError, ModelError, TypeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise ModelError(
                f"Models of type {config['model_type']!r} cannot be exported: give a "
                f"mixture-of-experts model of a family that works ({reason})."
            ) from error
        return found

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights."""
        config = CONFIG_MAPPING[self.config["model_type"]].from_pretrained(self.folder)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError("transformers has no AutoModelForCausalLM of it")
        with torch.device("meta"):
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            return kind._from_config(config)  # type: ignore[no-any-return]

    @cached_property
    def routers(self) -> list[Router]:
        """The routers, without weights."""
        return find_routers(self.skeleton)

    @property
    def classes(self) -> dict[str, str]:
        """Names of the model's classes, by the auto classes that load them."""
        config, known = type(self.skeleton.config), cast(dict[str, dict[type, type]], CLASSES)
        return {auto: some[config].__name__ for auto, some in known.items() if config in some}

    @property
    def normalizes(self) -> bool:
        """Whether routers rescale the weights of the selected experts to one."""
        return self.routers[0].normalizes

    @property
    def tied(self) -> bool:
        """Whether the head shares the embeddings' weights."""
        return bool(self.config.get("tie_word_embeddings", False))

    @cached_property
    def router_names(self) -> list[str]:
        """Names of the routers' weights, by layer."""
        return [self._weight_of(router) for router in self.routers]

    def _weight_of(self, router: Router) -> str:
        """Return the name of a router's projection, which may differ from the model's."""
        [(own, weight)] = [
            (name, p) for name, p in router.module.named_parameters() if is_projection(p)
        ]
        name = f"{router.name}.{own}"
        if name in self.places:
            return name
        [layer] = re.findall(r"\.(\d+)\.", name)
        near = [n for n in self.places if f".{layer}." in n and _ROUTER.search(n)]
        near = [n for n in near if self._shape(n) == list(weight.shape)]
        if len(near) != 1:
            raise ModelError(f"its weights hold no router {name}")
        return near[0]

    def _shape(self, name: str) -> list[int]:
        with safe_open(self.folder / self.places[name], framework="pt") as file:
            return list(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises
        ------
        ModelError
            If its file is damaged.
        """
        if name not in self.places:
            raise ModelError(
                f"The weights in {self.folder} lack {name}: give a model whose weights are whole."
            )
        path = self.folder / self.places[name]
        try:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"The weights {path} are damaged ({error}): copy the model again."
            ) from error
        return found

    def check(self, policy: Policy, name: str) -> None:
        """Raise a :class:`~lm_eval_bh.errors.PolicyError` if a policy fits other routers."""
        policy.check(router_fingerprint(map(self.tensor, self.router_names)), name)


def _read(path: Path, kind: Any) -> dict[str, Any]:
    """Read a JSON file; raise ValueError if it does not match a TypedDict."""
    if path.exists() and not path.is_file():  # a pipe would block
        raise ValueError(f"{path.name} is not a file")
    content: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    if reason := mismatch(content, kind, path.name):
        raise ValueError(reason)
    found: dict[str, Any] = content
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is not JSON")


def _places(folder: Path) -> dict[str, str]:
    """Return the file of every tensor, as found by transformers."""
    if (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS)
    places: dict[str, str] = _read(folder / INDEX, _Index)["weight_map"]
    if not all(Path(n).name == n for n in places.values()):
        raise ValueError(f"{INDEX} names files outside its folder")
    if missing := next((n for n in places.values() if not (folder / n).is_file()), None):
        raise FileNotFoundError(f"{missing} is missing")
    return dict(places)
