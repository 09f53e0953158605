"""The folder for bad inputs: good files, and broken ones of every kind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint

RESULTS = "results_2026-01-01T00-00-00.5.json"


class Hostile:
    """A pickle that would create a file."""

    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


@pytest.fixture(scope="session")
def ground(tmp_path_factory, new_writer) -> Path:
    """Return a folder that bad inputs must not change."""
    root = tmp_path_factory.mktemp("ground")
    (root / "folder").mkdir()
    (root / "file").write_text("a file\n")
    os.mkfifo(root / "pipe")
    _texts(root)
    _runs(root, new_writer)
    _tables(root)
    _models(root)
    _nulls(root)
    _settings(root)
    _policies(root)
    return root


def _texts(root: Path) -> None:
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text().splitlines()[:4]
    pages = (json.loads(line)["page"].replace("\n", " ") for line in lines)
    (root / "text.txt").write_text("\n\n".join(pages))
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes(b"caf\xe9\n")


def _runs(root: Path, new_writer) -> None:
    write = new_writer(root / "runs")
    write("top4", rule="topk")
    write("bh", alpha=0.4, log=True)
    write = new_writer(root / "alone")
    write("bh", alpha=0.4, samples=False)
    write = new_writer(root / "incomparable")
    write("short", rule="topk")
    write("long", alpha=0.4, change=lambda content: content.update(max_length=32))
    for name, text in {
        "broken": "{",
        "list": "[]",
        "empty": "",
        "foreign": '{"results": 3}',
        "deep": "[" * 100_000,
    }.items():
        (root / f"runs_{name}").mkdir()
        (root / f"runs_{name}" / RESULTS).write_text(text)


def _tables(root: Path) -> None:
    from lm_eval_bh.analysis.results import load_experiments, write_tables

    frame = load_experiments([root / "runs"]).frame
    write_tables(frame, root / "tables")
    frame.assign(perplexity=np.inf, avg_experts=-np.inf).to_csv(root / "infinite.csv")
    frame.assign(perplexity="high", max_k="many").to_csv(root / "words.csv")
    frame.head(0).to_csv(root / "headed.csv")
    frame.assign(group=[1, 2] * (len(frame) // 2)).drop(columns="rule").to_csv(root / "no_rule.csv")
    (root / "empty.csv").write_text("")
    (root / "ragged.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    (root / "foreign.csv").write_text("a,b\n1,2\n")
    (root / "binary.csv").write_bytes(bytes(range(256)))


def _models(root: Path) -> None:
    for name in ("no_config", "no_weights", "not_json", "no_type", "dense", "cut"):
        (root / "models" / name).mkdir(parents=True)
        if name != "no_config":
            for file in tiny_olmoe().glob("tokenizer*"):
                shutil.copy(file, root / "models" / name)
    shipped_config = json.loads((tiny_olmoe() / "config.json").read_text())
    dense = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": shipped_config["vocab_size"],
    }
    for name, config in {
        "no_weights": shipped_config,
        "no_type": {},
        "dense": dense,
        "cut": shipped_config,
    }.items():
        (root / "models" / name / "config.json").write_text(json.dumps(config))
    (root / "models" / "not_json" / "config.json").write_text("{")
    weights = (tiny_olmoe() / "model.safetensors").read_bytes()
    (root / "models" / "cut" / "model.safetensors").write_bytes(weights[:10_000])
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(root / "models" / "dense")
    ).save_pretrained(root / "models" / "dense")


def _nulls(root: Path) -> None:
    from lm_eval_bh import NullModel, Policy, RoutingConfig

    folder = root / "nulls"
    folder.mkdir()
    good = (shipped("kde_models") / "tiny-olmoe.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(good[: len(good) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("not a null model\n" * 10)
    shutil.copy(tiny_olmoe() / "model.safetensors", folder / "weights.safetensors")
    draws = np.random.default_rng(0).normal(size=(64, 8))
    other = NullModel.fit({0: draws, 1: draws}, header={"fingerprint": "0" * 64})
    other.save(folder / "another.safetensors")
    _strange_nulls(folder)
    policy = Policy(RoutingConfig(rule="topk", k_per_layer="2-2-2-2"), "0" * 64, 4, 64, 8)
    policy.save(root / "policy.safetensors")
    whole = (root / "policy.safetensors").read_bytes()
    (root / "cut_policy.safetensors").write_bytes(whole[:-2])
    (root / "changed_policy.safetensors").write_bytes(whole.replace(b"2-2-2-2", b"3-2-2-2"))
    (root / "pickles" / "pipe").mkdir(parents=True)
    os.mkfifo(root / "pickles" / "pipe" / "distribution_model_layer_0.pkl")
    for name, content in {
        "none": None,
        "hostile": pickle.dumps(Hostile()),
        "garbage": b"no pickle",
        "number": pickle.dumps(3),
    }.items():
        (root / "pickles" / name).mkdir(parents=True)
        if content is not None:
            file = root / "pickles" / name / "distribution_model_layer_0.pkl"
            file.write_bytes(content)


def _strange_nulls(folder: Path) -> None:
    """Write null models that no release would write."""
    import torch
    from safetensors.torch import save_file

    from lm_eval_bh.routing.tables.null_header import NullHeader

    x, cdf = torch.linspace(-1, 1, 4).double(), torch.linspace(0, 1, 4).double()
    for name, (grid, values) in {
        "flat": (x, torch.zeros_like(cdf)),
        "full": (x, torch.ones_like(cdf)),
        "float8": (x.to(torch.float8_e4m3fn), cdf.to(torch.float8_e4m3fn)),
        "half": (x.half(), cdf.half()),
        "no_points": (x[:0], cdf[:0]),
        "one_point": (x[:1], cdf[:1]),
        "no_experts": (torch.zeros(0, 4).double(), torch.zeros(0, 4).double()),
        "nan": (x, cdf * torch.nan),
        "falling": (x, cdf.flip(0)),
        "wild": (x * 1e308 * 1.7, cdf),
    }.items():
        scope = {"null_scope": "expert"} if name == "no_experts" else {}
        save_file(
            {"layer.0.x": grid.contiguous(), "layer.0.cdf": values.contiguous()},
            folder / f"{name}.safetensors",
            metadata={"lm_eval_bh_null": NullHeader(num_layers=1, **scope).to_json()},
        )


def _settings(root: Path) -> None:
    from lm_eval_bh.harness.sweep.sweep_config import SweepConfig
    from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder

    for name, text in {
        "unknown": "limt: 3",
        "list": "- 3",
        "syntax": "a: [",
        "preset": "preset: quik",
        "types": "limit: many",
        "alphas": "alphas: high",
        "empty": "",
    }.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    SweepFolder(root / "swept", SweepConfig.gather("quick")).claim()


@pytest.fixture
def unchanged(ground, monkeypatch):
    """Run the test inside of this folder, and fail if it writes to it."""
    import matplotlib.font_manager  # noqa: F401  whose first import writes a cache of its own

    monkeypatch.chdir(ground)
    monkeypatch.setenv("XDG_CACHE_HOME", str(ground / "cache"))
    before = _state(ground)
    yield ground
    assert _state(ground) == before


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return when every file was last written, which nobody can set back, and what else there is.

    To read all of the bytes twice a test would take longer than the tests do.
    """
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        written = (about.st_ino, about.st_size, about.st_ctime_ns) if path.is_file() else ()
        found[path.relative_to(folder).as_posix()] = (about.st_mode, *written)
    return found


def _policies(root: Path) -> None:
    (root / "policies").mkdir()
    routers = Checkpoint.find(str(tiny_olmoe()))
    own = router_fingerprint(map(routers.tensor, routers.router_names))
    for name, fingerprint, parameters in (
        ("top4", own, {"rule": "topk", "max_k": 4}),
        ("static", own, {"rule": "topk", "k_per_layer": "5-3-3-5"}),
        ("random", own, {"rule": "random_k"}),
        ("another", "f" * 64, {"rule": "topk", "max_k": 4}),
    ):
        path = root / "policies" / f"{name}.safetensors"
        config = RoutingConfig.named(parameters)
        Policy(config, fingerprint, 4, 64, 8, model="tiny-olmoe").save(path)
    whole = (root / "policies" / "top4.safetensors").read_bytes()
    (root / "policies" / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    nameless = Policy(RoutingConfig(rule="topk"), own, 4, 64, 8)
    nameless.save(root / "policies" / "nameless.safetensors")


@pytest.fixture(scope="module")
def original(new_writer, tmp_path_factory):
    """Return a folder of two runs with samples and logs; only ``one`` will be damaged."""
    write = new_writer(tmp_path_factory.mktemp("runs"))
    write("one", alpha=0.3, log=True)
    write("two", alpha=0.5, log=True)
    return write.folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "runs")
