"""A model's files as they lie in its folder or in the hub's cache; nothing is loaded whole."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.validation import mismatch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]
# model_type, and what its classes' names in modeling_adaptive_moe.py are made of.
FAMILIES = {
    "olmoe": "Olmoe",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}
EMBEDDINGS = "model.embed_tokens.weight"
ROUTER = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)\.weight$"
)


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
    """The files of a mixture-of-experts model of a family that can be exported.

    Attributes
    ----------
    folder : Path
        Where they lie.
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
        any_family: bool = False,
        download: bool = True,
    ) -> Checkpoint:
        """Find a model by its folder or hub name.

        Parameters
        ----------
        pretrained, revision : str
            Folder or hub name, and commit.
        any_family : bool
            Whether a family may be one that cannot be exported.
        download : bool
            Whether what is not on this machine is fetched.

        Raises
        ------
        ModelError
            If it is not there, is damaged, or is of a family that cannot be exported.
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
            model_type = config["model_type"]
            if any_family or model_type in FAMILIES:
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
        if not any_family and model_type not in FAMILIES:
            raise ModelError(
                f"Models of the type {model_type!r} cannot be exported: give a mixture-of-experts "
                f"model of {', '.join(FAMILIES)}."
            )
        found = cls(folder, config, places)
        if not found.router_names:
            raise ModelError(
                f"The weights of {pretrained!r} hold no routers (model.layers.N.mlp.gate.weight): "
                "give a whole mixture-of-experts model."
            )
        return found

    @property
    def family(self) -> str:
        """What the names of its classes are made of."""
        return FAMILIES[self.config["model_type"]]

    @property
    def normalizes(self) -> bool:
        """Whether its routers rescale the weights of the selected experts to one."""
        always = self.config["model_type"] == "mixtral"
        return always or bool(self.config.get("norm_topk_prob", False))

    @property
    def tied(self) -> bool:
        """Whether the head shares the embeddings, and has no weights of its own."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def router_names(self) -> list[str]:
        """The names of the routers' weights, by layer."""
        found = {name: ROUTER.search(name) for name in self.places}
        layers = {int(match[1]): name for name, match in found.items() if match}
        return [layers[layer] for layer in sorted(layers)]

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
        """Raise a :class:`~lm_eval_bh.errors.PolicyError` if a policy is for other routers."""
        policy.check(router_fingerprint(map(self.tensor, self.router_names)), name)


def _read(path: Path, kind: Any) -> dict[str, Any]:
    """Read a JSON file; raise ValueError if it is not what a TypedDict describes."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path.name} is no file")
    content: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    if reason := mismatch(content, kind, path.name):
        raise ValueError(reason)
    found: dict[str, Any] = content
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is no JSON")


def _places(folder: Path) -> dict[str, str]:
    """Return the file of every tensor, as transformers looks for them."""
    if (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS)
    places: dict[str, str] = _read(folder / INDEX, _Index)["weight_map"]
    if not all(Path(n).name == n for n in places.values()):
        raise ValueError(f"{INDEX} names files outside its folder")
    if missing := next((n for n in places.values() if not (folder / n).is_file()), None):
        raise FileNotFoundError(f"{missing} is missing")
    return dict(places)
