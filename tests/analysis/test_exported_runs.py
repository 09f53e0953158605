"""Runs of other engines on exported folders are compared with those of hf-bh."""

from __future__ import annotations

import json

import pytest

from lm_eval_bh import Policy, RoutingConfig
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.model_folder import export_folder
from lm_eval_bh.resources import tiny_olmoe
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint

VLLM = {
    "dtype": "float32",
    "trust_remote_code": True,
    "model_impl": "transformers",
    "max_model_len": 64,
    "enforce_eager": True,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return exported folders: static k for each layer, min_p, and the model's own top-8."""
    checkpoint = Checkpoint.find(str(tiny_olmoe()))
    fingerprint = router_fingerprint(map(checkpoint.tensor, checkpoint.router_names))
    home = tmp_path_factory.mktemp("exported")
    for name, parameters in {
        "static": {"rule": "topk", "k_per_layer": "5-3-3-5"},
        "min_p": {"rule": "min_p", "alpha": 0.3},
        "top8": {"rule": "topk"},
    }.items():
        policy = Policy(RoutingConfig.named(parameters), fingerprint, 4, 64, 8)
        export_folder(policy, checkpoint, home / name, name="tiny-olmoe", link=True)
    return home


def by(engine, folder):
    """Turn a written run into one of another engine, as written by lm-eval."""

    def change(content):
        arguments = {"pretrained": str(folder)} | (VLLM if engine == "vllm" else {})
        content["config"] |= {"model": engine, "model_args": arguments}
        content["model_name"] = str(folder)
        for name in ("model_num_parameters", "model_dtype", "model_sha"):  # vLLM's tells none
            del content["config"][name]

    return change


def test_they_are_aggregated_beside_the_others(write, folders, run):
    write("ours", pretrained="tiny-olmoe", rule="topk", max_k=8)
    for name in ("static", "min_p", "top8"):
        write(name, model="vllm", change=by("vllm", folders / name))
    for command in (["aggregate"], ["report", "--figure"], ["report"]):
        code, _, errors = run(*command, write.folder)
        assert code == 0, errors
    frame = load_experiments([write.folder]).frame
    frame = frame[frame["task"].str.contains("wikitext")].set_index("strategy")
    assert set(frame.index) == {
        "top-8",
        "top-5-3-3-5 (vllm)",
        "min-p a=0.30, max 8 (vllm)",
        "top-8 (vllm)",
    }
    assert set(frame["group"]) == {1}
    assert set(frame["model"]) == {"tiny-olmoe"}
    assert frame["configuration"].is_unique
    assert frame.loc["top-5-3-3-5 (vllm)", "avg_experts_model"] == 4
    assert frame["avg_experts"].isna()["min-p a=0.30, max 8 (vllm)"]
    assert frame.loc["top-8 (vllm)", "baseline"]
    assert frame.loc["min-p a=0.30, max 8 (vllm)", "alpha"] == 0.3


def test_a_folder_that_is_gone_is_no_stock_model_of_ours(write, folders):
    write("ours", pretrained="tiny-olmoe", rule="topk", max_k=8)
    write("gone", model="vllm", change=by("vllm", folders / "gone"))
    loaded = load_experiments([write.folder], force=True)
    assert len(loaded.groups) == 2


def test_a_damaged_folder_is_left_out_with_a_sentence(write, folders, tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    config = json.loads((folders / "static" / "config.json").read_text())
    del config["adaptive_routing"]["policy"]["rule"]
    (folder / "config.json").write_text(json.dumps(config))
    write("ours", pretrained="tiny-olmoe", rule="topk", max_k=8)
    write("damaged", model="vllm", change=by("vllm", folder))
    loaded = load_experiments([write.folder])
    assert len(loaded.frame["run_id"].unique()) == 1
    [(_, sentence)] = loaded.problems
    assert "its policy lacks rule; export it again" in sentence
