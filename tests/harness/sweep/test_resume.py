"""Experiments count as done if their files are unchanged and the settings are current."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from lm_eval_bh.errors import DataError
from lm_eval_bh.harness.sweep import runner
from lm_eval_bh.harness.sweep.sweep_config import SweepConfig, completed
from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder

SETTINGS = {
    "pretrained": "tiny-olmoe",
    "tasks": ["bh_demo_lambada"],
    "baselines": [8],
    "max_k": [8],
    "alphas": [0.4],
    "limit": 3,
}
BASELINE, ADAPTIVE = "8experts_topk_baseline_demo_lambada", "8experts_bh_a040_demo_lambada"


def planned(folder, **change):
    """Return the experiments that would run again with reasons, and all that would run."""
    todo = runner.plan(SweepConfig(**SETTINGS | change), folder)
    again = {experiment.name: why for experiment, why in todo.again.items()}
    return again, [experiment.name for experiment in todo.missing]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    runner.run(runner.plan(SweepConfig(**SETTINGS), folder), device="cpu", say=str)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """Return a copy of a finished sweep, to be damaged."""
    return shutil.copytree(original, tmp_path / "sweep")


def the_file(folder, pattern):
    (file,) = (folder / "runs" / ADAPTIVE).glob(pattern)
    return file


def edit(file, *removed, **change):
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in removed}))


def resealed(folder, **change):
    """Write a carefully edited summary with a matching digest."""
    from lm_eval_bh.harness.sweep.done import _seal

    file = folder / "logs" / f"{ADAPTIVE}.json"
    edit(file, **change)
    edit(file, digest=_seal(json.loads(file.read_text())))


RESULTS, SAMPLES = "*/results_*.json", "*/samples_*.jsonl"
SUMMARY = f"logs/{ADAPTIVE}.json"
DAMAGES = {
    "folder removed": (lambda f: shutil.rmtree(f / "runs" / ADAPTIVE), "is missing"),
    "results removed": (lambda f: the_file(f, RESULTS).unlink(), "results_.* is missing"),
    "results cut": (lambda f: the_file(f, RESULTS).write_text("{"), "results_.* was changed"),
    "samples removed": (lambda f: the_file(f, SAMPLES).unlink(), "samples_.* is missing"),
    "samples cut": (lambda f: the_file(f, SAMPLES).write_text(""), "samples_.* was changed"),
    "log removed": (
        lambda f: the_file(f, "routing/*/*_internal_routing.json").unlink(),
        "internal_routing.json is missing",
    ),
    "manifest removed": (lambda f: the_file(f, "routing/*/routing.json").unlink(), "is missing"),
    "named log removed": (
        lambda f: (f / "logs" / f"{ADAPTIVE}_internal_routing.json").unlink(),
        "logs/.*_internal_routing.json is missing",
    ),
    "summary edited": (lambda f: edit(f / SUMMARY, k_or_max_k=9), "its summary was changed"),
    "summary of another": (
        lambda f: shutil.copy(f / "logs" / f"{BASELINE}.json", f / SUMMARY),
        f"its summary belongs to {BASELINE}",
    ),
    "summary empty": (lambda f: (f / SUMMARY).write_text(""), "could not be read"),
    "summary {}": (lambda f: (f / SUMMARY).write_text("{}"), "no schema version"),
    "summary a list": (lambda f: (f / SUMMARY).write_text("[]"), "found a list"),
    "summary newer": (lambda f: edit(f / SUMMARY, schema_version=99), "is too new"),
    "summary of another type": (lambda f: edit(f / SUMMARY, run_id=3), "run_id must be text"),
    "summary too deep": (lambda f: (f / SUMMARY).write_text("[" * 100_000), "could not be read"),
    "summary a folder": (
        lambda f: ((f / SUMMARY).unlink(), (f / SUMMARY).mkdir()),
        "could not be read",
    ),
    "names a file outside": (lambda f: resealed(f, files={"../x": "0"}), "is missing"),
    "other settings": (
        lambda f: resealed(f, settings={"pretrained": "tiny-olmoe", "limit": 9}),
        "it ran with a different limit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_runs_again_and_says_why(folder, damage):
    change, why = DAMAGES[damage]
    change(folder)
    again, missing = planned(folder)
    assert missing == [ADAPTIVE]
    assert list(again) == [ADAPTIVE]
    assert "\n" not in again[ADAPTIVE]
    assert re.search(why, again[ADAPTIVE]), again


def test_all_of_a_sweep_may_be_copied_and_moved(folder):
    assert planned(folder) == ({}, [])


def test_a_linked_experiment_is_done(folder, tmp_path):
    run = folder / "runs" / ADAPTIVE
    shutil.move(run, tmp_path / "elsewhere")
    run.symlink_to(tmp_path / "elsewhere")
    assert planned(folder) == ({}, [])
    the_file(folder, RESULTS).unlink()
    config = SweepConfig(**SETTINGS)
    SweepFolder(folder, config).clear(config.experiments()[1])
    assert not run.exists()
    assert list((tmp_path / "elsewhere").glob(SAMPLES))


@pytest.mark.slow
def test_a_damaged_experiment_is_evaluated_again(original, folder):
    shutil.rmtree(folder / "runs" / ADAPTIVE)
    lines = []
    runner.run(runner.plan(SweepConfig(**SETTINGS), folder), device="cpu", say=lines.append)
    assert lines[0].startswith(f"{ADAPTIVE} runs again: runs/{ADAPTIVE}")
    assert lines[1].startswith(f"[2/2] {ADAPTIVE}")
    assert planned(folder) == ({}, [])
    metrics = [json.loads((f / SUMMARY).read_text())["metrics"] for f in (original, folder)]
    assert metrics[0]["target_perplexity"] == metrics[1]["target_perplexity"]


def test_results_of_other_settings_are_not_done_though_the_settings_were_deleted(folder):
    (folder / "sweep.json").unlink()
    assert planned(folder) == ({}, [])
    again, missing = planned(folder, limit=4)
    assert missing == [BASELINE, ADAPTIVE]
    assert set(again.values()) == {"it ran with a different limit"}
    # What only names experiments may change.
    assert planned(folder, alphas=[0.4, 0.5])[1] == ["8experts_bh_a050_demo_lambada"]


def test_a_sweep_of_the_first_release_goes_on(folder):
    """It wrote no version and no digests, and lacked some of today's settings."""
    edit(folder / "sweep.json", "schema_version", "log_samples", "rules", "seed")
    for name in (BASELINE, ADAPTIVE):
        edit(folder / "logs" / f"{name}.json", "settings", "files", "digest")
    assert planned(folder) == ({}, [])
    with pytest.raises(DataError, match="rules"):
        planned(folder, rules=["by"])
    the_file(folder, RESULTS).unlink()
    assert planned(folder)[0] == {ADAPTIVE: "its results are missing"}
    (folder / "sweep.json").unlink()
    again, _ = planned(folder)
    assert set(again.values()) == {"the settings of its run are unknown"}


def test_the_settings_have_a_version_and_a_newer_one_is_refused(folder):
    assert json.loads((folder / "sweep.json").read_text())["schema_version"] == 1
    for version in (99, "1", None, 10**30):
        edit(folder / "sweep.json", schema_version=version)
        with pytest.raises(DataError, match="upgrade lm-eval-bh"):
            planned(folder)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"limit": ' + "[" * 900 + "]" * 900])
def test_damaged_settings_are_one_sentence(folder, content):
    (folder / "sweep.json").write_text(content)
    with pytest.raises(DataError):
        planned(folder)


def test_settings_that_a_release_did_not_know_have_their_default():
    known = SweepConfig(**SETTINGS).as_dict()
    for name in ("rules", "limit", "batch_size", "seed", "log_routing", "log_samples"):
        earlier = {k: v for k, v in known.items() if k != name}
        whole = SweepConfig(**earlier).as_dict()
        assert completed(earlier) == whole


def test_the_loser_of_two_sweeps_is_refused_before_any_work_and_leaves_nothing(tmp_path):
    """Both plans were made while the folder was free."""
    winner = runner.plan(SweepConfig(**SETTINGS), tmp_path)
    loser = runner.plan(SweepConfig(**SETTINGS | {"limit": 9}), tmp_path)
    winner.folder.claim()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="limit: 3 there, 9 here"):
        runner.run(loser, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before
    winner.folder.claim()
    with pytest.raises(DataError, match="limit"), loser.folder.alone(loser.experiments[0]):
        pass


def test_two_sweeps_started_together_are_one_winner_and_one_loser(tmp_path):
    code = (
        "import sys; from pathlib import Path;"
        "from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder;"
        "from lm_eval_bh.harness.sweep.sweep_config import SweepConfig;"
        "config = SweepConfig(**{settings!r});"
        "print('ready', flush=True); sys.stdin.readline();"
        "SweepFolder(Path({folder!r}), config).claim(); print('mine')"
    )
    pair = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                code.format(settings=SETTINGS | {"limit": limit}, folder=str(tmp_path / "new")),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for limit in (3, 9)
    ]
    for process in pair:
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate() for process in pair]
    assert sorted(out for out, _ in answers) == ["", "mine\n"]
    assert sum("holds another sweep" in err for _, err in answers) == 1


def test_a_claim_without_work_is_given_up(tmp_path):
    folder = SweepFolder(tmp_path, SweepConfig(**SETTINGS))
    folder.claim()
    folder.release()
    SweepFolder(tmp_path, SweepConfig(**SETTINGS | {"limit": 9})).claim()
    (tmp_path / "runs").mkdir()
    SweepFolder(tmp_path, SweepConfig(**SETTINGS | {"limit": 9})).release()
    with pytest.raises(DataError, match="limit: 9 there, 3 here"):
        folder.check()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "sweep"):
        with pytest.raises(DataError, match="is a file, not a folder"):
            runner.plan(SweepConfig(**SETTINGS), place)
