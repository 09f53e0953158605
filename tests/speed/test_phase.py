"""A whole speed phase on the demo model: exact counts, and loose bounds on times."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.analysis.table.speed_phase import speed_frame
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.harness.sweep.task_names import new_task_manager
from lm_eval_bh.routing.releases import returned_cache
from lm_eval_bh.schema import read_speed
from lm_eval_bh.speed.contestants import check_configurations
from lm_eval_bh.speed.phase import SpeedSettings, is_measured, measure, write
from lm_eval_bh.speed.task_text import decode_rows, rows_of

TASK = "bh_demo_lambada"
LAYERS, NATIVE = 4, 8
SMALL = SpeedSettings(rounds=7, batches=1, documents=4, prompt=4, steps=2, array=2**20)
CONFIGURATIONS = [{"rule": "topk", "max_k": 2}, {"alpha": 0.4, "max_k": 8}]


@pytest.fixture(scope="module")
def lm():
    arguments = {"pretrained": "tiny-olmoe", "rule": "topk", "max_k": 1, "log_routing": "off"}
    return BHLM.create_from_arg_obj(arguments, {"device": "cpu", "batch_size": 2})


@pytest.fixture(scope="module")
def tasks():
    return new_task_manager(defaults=False).load([TASK])["tasks"]


@pytest.fixture(scope="module")
def found(lm, tasks, tmp_path_factory):
    """Return the file of a phase, read again."""
    file = tmp_path_factory.mktemp("speed") / "bh_speed.json"
    write(measure(lm, "tiny-olmoe", tasks, CONFIGURATIONS, batch_size=2, settings=SMALL), file)
    assert is_measured(file, read_speed(file)["asked"])
    assert not is_measured(file, {})
    return read_speed(file)


def test_expert_rows_are_those_of_the_configuration(found):
    names = [one["name"] for one in found["configurations"]]
    assert names == ["native", "alpha=0.4,max_k=8", "max_k=2,rule=topk"]
    for at, load in enumerate(found["workloads"]):
        native, bh, top2 = (work[at] for work in found["work"])
        assert native["expert_rows"] == load["tokens"] * LAYERS * NATIVE
        assert top2["expert_rows"] == load["tokens"] * LAYERS * 2
        assert bh["expert_rows"] == bh["expert_rows_computed"] < native["expert_rows"]
        assert 0 < top2["experts_touched"] <= top2["expert_rows"]
        assert top2["floor_seconds"] < native["floor_seconds"]


def test_distinct_experts_of_a_pass_are_those_that_a_recount_finds(found, lm, tasks):
    """The same rows decoded once more, with a hook on every layer's experts."""
    rows = decode_rows(rows_of(lm, tasks[TASK], SMALL.documents), 32, 4 + 1 + 2)
    seen = []
    lm.integration.unpatch_model()
    handles = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args: seen.append(len(set(args[1].flatten().tolist())))
        )
        for layer in lm.model.model.layers
    ]
    with torch.no_grad():
        read = lm.model(rows[:, :5], use_cache=True)
        seen.clear()
        for step in (5, 6):
            lm.model(rows[:, step : step + 1], **returned_cache(read), use_cache=True)
    for handle in handles:
        handle.remove()
    lm.integration.patch_model()
    of = speed_frame([found]).set_index(["workload", "strategy"])["distinct_experts"]
    assert of["decode 32", "top-8 (hf)"] == pytest.approx(sum(seen) / len(seen))
    assert (of["decode 1", "top-8 (hf)"], of["decode 1", "top-2"]) == (8, 2)


def test_dense_flops_are_those_of_the_projections_scores_routers_and_head(found, lm):
    from lm_eval_bh.analysis.table.flops import Architecture

    shape = Architecture.from_config(lm.model.config.to_dict(), LAYERS)
    load = found["workloads"][-1]
    assert (load["name"], load["passes"]) == ("prefill", 1)
    length = load["tokens"] // load["batch_size"]
    parts = shape.breakdown(0, length)
    assert load["dense_flops"] == pytest.approx(load["tokens"] * sum(parts.values()), rel=0.02)


def test_every_ratio_has_an_interval_and_conditions_stand_beside(found):
    frame = speed_frame([found])
    assert len(frame) == 3 * 4
    assert (frame["ratio_low"] <= frame["ratio"]).all()
    assert (frame["ratio"] <= frame["ratio_high"]).all()
    assert (frame[frame["strategy"] == "top-8 (hf)"]["ratio"] == 1).all()
    assert frame["ratio"].between(0.05, 20).all()
    assert found["threads"] == torch.get_num_threads()
    assert found["dtype"] == "float32"
    assert {"torch", "transformers", "lm_eval", "lm-eval-bh"} <= found["versions"].keys()


def test_the_order_in_which_configurations_are_given_is_no_part_of_the_phase(found, lm, tasks):
    swapped = list(reversed(CONFIGURATIONS))
    other = measure(lm, "tiny-olmoe", tasks, swapped, batch_size=2, settings=SMALL)
    assert other["configurations"] == found["configurations"]
    assert [one["order"] for one in other["rounds"]] == [one["order"] for one in found["rounds"]]
    assert other["asked"] == found["asked"]


def test_the_model_is_left_as_it_was(found, lm):
    assert lm.integration.patched
    assert lm.model.get_experts_implementation() == {"": "grouped_mm"}
    lm.integration.unpatch_model()
    assert not any(module._forward_hooks for module in lm.model.modules())
    lm.integration.patch_model()


def test_what_cannot_be_measured_is_refused(lm, tasks):
    with pytest.raises(ParameterError, match="rounds must be 7 or more"):
        SpeedSettings(rounds=6)
    with pytest.raises(ParameterError, match="more than the model's context of 512"):
        measure(lm, "tiny-olmoe", tasks, CONFIGURATIONS, settings=SpeedSettings(steps=500))
    with pytest.raises(ParameterError, match="no configuration"):
        check_configurations([])


def test_a_sweep_measures_once_and_aggregate_shows_the_ratio(run, tmp_path):
    """The README's command, small: ratios near 1 with an interval, and nothing repeated."""
    settings = tmp_path / "sweep.yaml"
    settings.write_text(
        f"preset: quick\nlimit: 4\ntasks: [{TASK}]\nbaselines: [8]\nalphas: [0.4]\n"
        "log_routing: summary\n"  # and the policy that ships
    )
    folder = tmp_path / "runs"
    command = ["sweep", "--config", settings, "--device", "cpu", "--output-dir", folder]
    code, _, err = run(*command, "--no-speed")
    assert code == 0, err
    assert not (folder / "bh_speed.json").exists()
    assert load_experiments([folder]).frame["tokens_per_second"].isna().all()
    code, out, err = run(*command)
    assert code == 0, err
    assert "bh_speed.json" in out
    before = (folder / "bh_speed.json").read_bytes()
    assert run(*command)[0] == 0
    assert (folder / "bh_speed.json").read_bytes() == before
    code, out, err = run("aggregate", folder, "--no-figure")
    assert code == 0, err
    assert "shows no difference" in " ".join(out.split())
    frame = load_experiments([folder]).frame
    assert len(frame) == 3
    for column in frame.columns[frame.columns.str.endswith("speed_ratio")]:
        assert frame[column].between(0.05, 20).all()
        assert (frame[f"{column}_low"] <= frame[column]).all()
        assert (frame[column] <= frame[f"{column}_high"]).all()


def test_bench_prints_and_writes(run, tmp_path):
    few = ["--rounds", 7, "--steps", 1, "--prompt", 2, "--batches", 1, "--limit", 2]
    command = ["bench", "rule=topk,max_k=4", "--model", "tiny-olmoe", "--tasks", TASK]
    code, out, err = run(*command, *few, "--device", "cpu", "--output-dir", tmp_path)
    assert code == 0, err
    assert "top-4" in out
    assert "decode 32" in out
    assert max(len(line) for line in out.splitlines() if " top-4 " in line) <= 80
    assert "rounds in shuffled order" in " ".join(out.split())
    content = json.loads((tmp_path / "bh_speed.json").read_text())
    assert all(math.isfinite(s) for r in content["rounds"] for row in r["seconds"] for s in row)
