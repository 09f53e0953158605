"""Ratios and intervals from a speed phase's rounds, joined to the results."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from lm_eval_bh.analysis.show.overview import overview
from lm_eval_bh.analysis.show.report_page import write_report
from lm_eval_bh.analysis.show.report_tables import speed_table
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.analysis.table.speed_phase import (
    FASTER,
    SLOWER,
    UNDECIDED,
    ratio_interval,
    speed_frame,
    verdict,
)
from lm_eval_bh.analysis.table.table_files import of_this_release, write_tables
from lm_eval_bh.schema import SCHEMA_VERSION, read_speed

TASK = "bh_wikitext"
ROUNDS = 9


def test_what_slows_a_whole_round_down_cancels():
    rng = np.random.default_rng(0)
    native, slow = 1 + rng.random(ROUNDS), rng.integers(1, 50, ROUNDS)
    ratio, low, high = ratio_interval(native * slow, native * slow / 2)
    assert ratio == low == high == 2


def test_one_disturbed_round_of_nine_does_not_move_the_ratio_out_of_the_others():
    native, mine = np.full(ROUNDS, 1.0), np.linspace(0.49, 0.51, ROUNDS)
    disturbed = mine.copy()
    disturbed[4] = 50.0
    ratio, low, high = ratio_interval(native, disturbed)
    assert 1 / 0.51 <= ratio <= 1 / 0.49
    assert low > 1.9
    assert high < 2.1


def test_the_order_of_the_rounds_plays_no_part():
    rng = np.random.default_rng(1)
    native, mine = rng.lognormal(size=ROUNDS), rng.lognormal(size=ROUNDS)
    shuffled = rng.permutation(ROUNDS)
    assert ratio_interval(native, mine) == ratio_interval(native[shuffled], mine[shuffled])


@pytest.mark.parametrize("rounds", [7, 9, 15])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(rounds):
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        noise = np.exp(0.1 * rng.standard_t(3, (2, rounds)))  # now and then far off
        _, low, high = ratio_interval(noise[0], noise[1])
        held += low <= 1 <= high
    assert held / 400 > 0.93  # 0.95, less two standard errors


def test_a_single_round_has_no_interval_and_shows_nothing():
    ratio, low, high = ratio_interval(np.array([2.0]), np.array([1.0]))
    assert (ratio, low, high) == (2.0, None, None)
    assert verdict(low, high) == UNDECIDED


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(1.01, 1.2, FASTER), (0.8, 0.99, SLOWER), (0.9, 1.1, UNDECIDED), (1.0, 1.2, UNDECIDED)],
)
def test_an_interval_that_holds_1_is_never_called_faster(low, high, said):
    assert verdict(low, high) == said


def of_results(file):
    """Return the routing that a results file describes."""
    return json.loads(file.read_text())["config"]["bh"]


def phase(folder, routings, model="some/model", seed=0, created="2026-01-01", swap=False):
    """Write a file of a speed phase with a speed-up of 2 for the last configuration."""
    rng = np.random.default_rng(seed)
    names = [("native", None), *routings]
    base = {name: 1.0 for name, _ in names} | {names[-1][0]: 0.5}
    rounds = []
    for _ in range(ROUNDS):
        noise = rng.lognormal(0, 0.01, (3,))
        rounds.append(
            {name: [base[name] * noise[i % 3], 2 * base[name], 3.0] for i, name in enumerate(base)}
        )
    if swap:
        names.reverse()
    work = {
        "expert_rows": 80,
        "expert_rows_computed": 40,
        "experts_touched": 9,
        "floor_seconds": 0.25,
    }
    loads = [("prefill", 8, 2, 100), ("decode 1", 1, 10, 10), ("decode 8", 8, 10, 80)]
    content = {
        "schema_version": SCHEMA_VERSION,
        "created": created,
        "model": model,
        "asked": {},
        "device": "cpu",
        "processor": "x86_64",
        "threads": 2,
        "dtype": "float32",
        "load_before": [0.5, 0.5, 0.5],
        "load_after": [1.0, 1.0, 1.0],
        "versions": {"torch": "2.13"},
        "matmul_flops_per_second": 1e11,
        "bytes_per_second": 2e10,
        "native": [name for name, _ in names].index("native"),
        "workloads": [
            {
                "name": name,
                "task": TASK,
                "batch_size": size,
                "passes": passes,
                "tokens": tokens,
                "dense_flops": 5,
            }
            for name, size, passes, tokens in loads
        ],
        "configurations": [{"name": name, "routing": routing} for name, routing in names],
        "work": [[work] * 3 for _ in names],
        "rounds": [
            {"order": list(range(len(names))), "seconds": [one[name] for name, _ in names]}
            for one in rounds
        ],
    }
    file = folder / "bh_speed.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def runs(write):
    """Return a writer's folder with top-k, hf and BH on three tasks, and the routings of two."""
    top, bh = write("top", rule="topk"), write("bh")
    write("hf", model="hf")
    return write.folder, [("top", of_results(top)), ("bh", of_results(bh))]


def test_speeds_are_joined_by_configuration_task_and_model(runs):
    folder, routings = runs
    phase(folder, routings)
    frame = load_experiments([folder]).frame
    of = frame[frame["task"] == TASK].set_index("strategy")
    bh, stock = of.loc["BH a=0.40, max 4"], of.loc["top-4 (hf)"]
    assert bh["tokens_per_second"] == pytest.approx(200, rel=0.05)
    assert bh["latency_ms_per_token"] == 100  # 1 s for 10 tokens
    assert bh["speed_ratio_low"] < bh["speed_ratio"] < bh["speed_ratio_high"]
    assert bh["speed_ratio"] == pytest.approx(2, rel=0.05)
    assert bh["decode_speed_ratio"] == bh["decode_speed_ratio_high"] == 2
    assert bh["decode_8_speed_ratio"] == 1
    assert (stock["speed_ratio"], stock["speed_ratio_low"]) == (1, 1)
    others = frame[frame["task"] != TASK]
    assert (
        others[["tokens_per_second", "latency_ms_per_token", "speed_ratio"]].isna().all(axis=None)
    )
    assert frame["evaluation_tokens_per_second"].notna().any()


def test_swapping_the_configurations_changes_nothing(runs):
    folder, routings = runs
    first = speed_frame([read_speed(phase(folder, routings))])
    other = speed_frame([read_speed(phase(folder, routings, swap=True))])
    order = ["workload", "strategy"]
    pd.testing.assert_frame_equal(
        first.sort_values(order, ignore_index=True), other.sort_values(order, ignore_index=True)
    )


def test_speeds_of_another_model_are_not_joined(runs):
    folder, routings = runs
    phase(folder, routings, model="another/model")
    loaded = load_experiments([folder])
    assert loaded.frame["speed_ratio"].isna().all()
    assert loaded.speeds == []


def test_the_newest_of_two_phases_counts(runs):
    folder, routings = runs
    (folder / "old").mkdir()
    phase(folder / "old", list(reversed(routings)), created="2025-01-01")
    phase(folder, routings, created="2026-01-01")
    frame = load_experiments([folder]).frame
    of = frame[frame["task"] == TASK].set_index("strategy")["decode_speed_ratio"]
    assert (of["BH a=0.40, max 4"], of["top-4"]) == (2, 1)


def test_tables_and_report_show_the_ratio_with_its_interval(runs, tmp_path):
    folder, routings = runs
    phase(folder, routings)
    loaded = load_experiments([folder])
    of = loaded.frame.set_index(["task", "strategy"]).loc[TASK, "BH a=0.40, max 4"]
    shown = f"{of['speed_ratio']:.2f} [{of['speed_ratio_low']:.2f}, {of['speed_ratio_high']:.2f}]"
    (markdown,) = (p for p in write_tables(loaded.frame, tmp_path) if p.suffix == ".md")
    assert shown in markdown.read_text()
    brief = shown.replace(" [", "\n[").replace(", ", ",\n")
    assert any(brief in cell for t in overview(loaded.frame, empty(), 0.05) for cell in cells_of(t))
    text, page = (path.read_text() for path in write_report(loaded, tmp_path))
    assert shown in page
    assert "2 threads, float32, load 0.5 before and 1.0 after" in page
    assert "| faster |" in text
    verdicts = {row.cells["verdict"].text for row in speed_table(loaded.speeds).rows}
    assert verdicts == {"", FASTER, UNDECIDED}


def empty():
    return pd.DataFrame(columns=["run_id", "task", "metric", "difference"])


def cells_of(table):
    return [cell for column in table.columns for cell in column.cells]


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("rounds"),
        lambda c: c["rounds"][0]["seconds"].pop(),
        lambda c: c["rounds"][0]["seconds"][0].__setitem__(0, 0.0),
        lambda c: c.update(native=7),
        lambda c: c.update(schema_version=99),
        lambda c: c["configurations"][1]["routing"].pop("rule"),
        lambda c: c["configurations"][1]["routing"]["config"].pop("max_k"),
        lambda c: c.update(rounds=[]),
    ],
)
def test_a_damaged_file_is_left_out_and_named(runs, damage):
    folder, routings = runs
    file = phase(folder, routings)
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    loaded = load_experiments([folder])
    assert [path for path, _ in loaded.problems] == [file]
    assert loaded.frame["speed_ratio"].isna().all()


def test_what_an_earlier_table_called_speed_was_of_an_evaluation():
    old = pd.DataFrame({"tokens_per_second": [5.0], "latency_ms_per_token": [200.0]})
    new = of_this_release(old)
    assert list(new) == ["evaluation_tokens_per_second"]
    assert of_this_release(new) is new
