"""Whole sweeps: like the stock command, resumed after a kill, on processes, on Ray."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

import lm_eval_bh
from lm_eval_bh.errors import DataError, ModelError, ParameterError
from lm_eval_bh.harness.sweep import runner
from lm_eval_bh.harness.sweep.sweep_config import SweepConfig
from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "pretrained": "tiny-olmoe",
    "tasks": ["bh_demo_lambada"],
    "baselines": [8],
    "max_k": [8],
    "alphas": [0.4, 0.5],
    "limit": 4,
}
FLAGS = ["--model", "tiny-olmoe", "--tasks", "bh_demo_lambada", "--baselines", "8"]
FLAGS += ["--max-k", "8", "--alphas", "0.4,0.5", "--limit", "4"]
# What must differ between two runs of one experiment: when, how fast and where it ran.
OWN = ("run_id", "log_dir", "date", "seconds", "start_time", "end_time", "pretty_env_info")
OWN += ("total_evaluation_time_seconds",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished sweep in this process."""
    folder = tmp_path_factory.mktemp("sweep")
    lines = []
    runner.run(runner.plan(SweepConfig(**SETTINGS), folder), device="cpu", say=lines.append)
    assert [line.split("]")[0] for line in lines] == ["[1/3", "[2/3", "[3/3"]
    return folder


def without(content, names):
    """Return JSON content without the named keys, however deep."""
    if isinstance(content, dict):
        return {k: without(v, names) for k, v in content.items() if k not in names}
    return [without(v, names) for v in content] if isinstance(content, list) else content


def the_results(folder):
    (file,) = folder.glob("*/results_*.json")
    return json.loads(file.read_text())


def the_samples(folder):
    (file,) = folder.glob("*/samples_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same(table, other):
    """Compare tables; another number of threads or documents in a batch sums in another order."""
    pd.testing.assert_frame_equal(table, other, check_dtype=False, rtol=1e-5)


def table(folder):
    """Return the aggregated table of a sweep without what differs from run to run."""
    from lm_eval_bh.analysis.table.experiments import load_experiments

    loaded = load_experiments([folder])
    assert not loaded.problems
    own = ["run_id", "file", "seconds", "evaluation_tokens_per_second"]
    return loaded.frame.drop(columns=own).sort_values("strategy").reset_index(drop=True)


@pytest.fixture
def sweep(run):
    """Return a function that runs the command in this process: (exit code, output, errors)."""
    return lambda folder, *options: run(
        "sweep", "--device", "cpu", *FLAGS, "--output-dir", folder, *options
    )


@pytest.mark.slow
def test_an_experiment_leaves_what_the_stock_command_leaves(finished, commands, tmp_path):
    """The loop over the stock ``lm_eval`` and the sweep write the same files, same numbers."""
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "sweep.sh", tmp_path],
        env=os.environ
        | {
            "LM_EVAL": str(commands / "lm_eval"),
            "PRETRAINED": "tiny-olmoe",
            "TASKS": "bh_demo_lambada",
            "BASELINES": " ",
            "MAX_K": "8",
            "ALPHAS": "0.4",
            "LIMIT": "4",
            "DEVICE": "cpu",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    name = "8experts_bh_a040_demo_lambada"
    stock, ours = tmp_path / "runs" / name, finished / "runs" / name
    assert without(the_results(ours), OWN) == without(the_results(stock), OWN)
    assert the_samples(ours) == the_samples(stock)
    (stock_log,) = stock.glob(f"routing/*/{name}_internal_routing.json")
    our_log = finished / "logs" / f"{name}_internal_routing.json"
    assert without(json.loads(our_log.read_text()), OWN) == without(
        json.loads(stock_log.read_text()), OWN
    )
    assert_same(table(tmp_path), table(finished).iloc[:1])


def test_every_experiment_has_its_two_logs(finished):
    names = [experiment.name for experiment in SweepConfig(**SETTINGS).experiments()]
    expected = {f"{name}{end}.json" for name in names for end in ("", "_internal_routing")}
    assert {file.name for file in (finished / "logs").iterdir()} == expected
    for name in names:
        summary = json.loads((finished / "logs" / f"{name}.json").read_text())
        results = the_results(finished / "runs" / name)
        assert summary["run_id"] == results["config"]["bh"]["run_id"]
        assert summary["metrics"]["target_perplexity"] == pytest.approx(
            results["results"]["bh_demo_lambada"]["perplexity,none"]
        )
        assert summary["summary"]["total_samples"] == 4


def test_the_sweep_is_the_experiment_runner_of_python(finished, tmp_path, monkeypatch):
    two_phase = lm_eval_bh.BHRoutingExperimentRunner("tiny-olmoe", "cpu", tmp_path)
    frame = two_phase.run_two_phase_experiment([8], [8], [0.4, 0.5], ["demo_lambada"], 4)
    assert len(frame) == 3
    assert_same(table(tmp_path), table(finished))

    def never(*args, **options):
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(runner, "run_here", lambda _, todo, *rest: never() if todo else None)
    again = two_phase.run_two_phase_experiment([8], [8], [0.4, 0.5], ["demo_lambada"], 4)
    assert list(again["run_id"]) == list(frame["run_id"])


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped(finished, sweep, commands, tmp_path):
    process = subprocess.Popen(
        [commands / "lm-eval-bh", "sweep", "--device", "cpu", *FLAGS, "--output-dir", tmp_path],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = tmp_path / "logs" / "8experts_topk_baseline_demo_lambada.json"
    second = tmp_path / "runs" / "8experts_bh_a040_demo_lambada"
    deadline = time.monotonic() + 120
    while not (first.exists() and second.exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = first.read_bytes()
    assert not (tmp_path / "logs" / "8experts_bh_a040_demo_lambada.json").exists()
    (second / "model").mkdir(exist_ok=True)  # whatever it has left
    (second / "model" / "results_2020-01-01T00-00-00.json").write_text("{")
    code, out, errors = sweep(tmp_path)
    assert code == 0, errors
    assert "2 to run; about" in out
    assert "[2/3] 8experts_bh_a040" in out
    assert first.read_bytes() == before
    assert_same(table(tmp_path), table(finished))


def test_a_dry_run_plans_and_writes_nothing(tmp_path, finished, sweep):
    folder = tmp_path / "new"
    code, out, errors = sweep(folder, "--dry-run", "--shard", "2/2")
    assert code == 0, errors
    assert "1 experiments, 1 to run; the first will show how long they take" in out
    assert not folder.exists()
    assert "0 to run" in sweep(finished, "--dry-run")[1]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"limit": 5}, "limit: 4 there, 5 here"),
        ({"alphas": [0.4]}, r"alphas: \[0.4, 0.5\] there, \[0.4\] here"),
        ({"pretrained": "other"}, 'pretrained: "tiny-olmoe" there, "other" here'),
    ],
)
def test_the_folder_of_another_sweep_is_refused_with_the_difference(finished, change, difference):
    with pytest.raises(DataError, match=difference):
        runner.plan(SweepConfig(**SETTINGS | change), finished)


def test_no_space_left_loses_nothing_that_is_finished(sweep, tmp_path):
    """A limit on the size of files stops the writing in the middle, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code, _, errors = sweep(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "free some space" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("logs/*.json"))


@pytest.mark.slow
def test_two_processes_share_the_documents_of_every_experiment(finished, launch, tmp_path):
    options = [*FLAGS, "--output-dir", tmp_path]
    shown = launch("-m", "lm_eval_bh", "sweep", "--device", "cpu", *options)
    assert shown.count("[3/3]") == 1  # one process speaks
    bootstrapped = ["target_perplexity_stderr"]  # in the order in which the processes answer
    assert_same(
        table(tmp_path).drop(columns=bootstrapped), table(finished).drop(columns=bootstrapped)
    )


@pytest.mark.slow
def test_ray_gives_the_same_table_though_a_worker_is_killed(finished, tmp_path, monkeypatch):
    """A lost worker's experiment runs again, workers keep the niceness, waiting is reported."""
    pytest.importorskip("ray", reason="needs the extra ray")
    from lm_eval_bh.harness.sweep import cluster, waiting

    killed, pids = [], []
    give = cluster._Pool._give

    def give_and_kill(self, worker):
        give(self, worker)
        pids.append(worker.pid.remote())
        if not killed and len(pids) == 2:  # both are at work
            killed.append(self.ray.get(pids[0]))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(cluster.Worker, "pid", lambda self: os.getpid(), raising=False)
    monkeypatch.setattr(cluster._Pool, "_give", give_and_kill)
    monkeypatch.setattr(waiting, "EVERY", 0.02)  # shorter than any experiment
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    lines, niceness = [], set()

    def say(text):
        lines.append(text)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith("ray::Worker"):
                    niceness.add(process.nice())

    todo = runner.plan(SweepConfig(**SETTINGS), tmp_path)
    runner.run(todo, ray="local", workers=2, say=say)
    assert killed
    assert niceness == {psutil.Process().nice()}
    told = [line for line in lines if "workers are running. Waiting for " in line]
    assert told
    assert re.match(
        r"\d of \d workers are running. Waiting for 8experts_\w+_demo_lambada, \d+ s", told[0]
    )
    assert len(lines) - len(told) == 3
    assert_same(table(tmp_path), table(finished))


def test_a_sweep_here_says_what_it_waits_for(tmp_path, monkeypatch):
    from lm_eval_bh.harness.sweep import waiting

    monkeypatch.setattr(waiting, "EVERY", 0.02)
    config = SweepConfig(**SETTINGS | {"alphas": [], "max_k": [], "rules": []})
    lines = []
    runner.run(runner.plan(config, tmp_path), device="cpu", say=lines.append)
    assert any(line.startswith("Waiting for the model, 0 s") for line in lines)
    assert any(line.startswith("Waiting for 8experts_topk_baseline_demo_la") for line in lines)


def test_what_makes_no_progress_is_said(monkeypatch):
    from lm_eval_bh.harness.sweep import waiting

    now = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    progress = waiting.Progress()
    now[0] += 60
    assert progress.line("x", 30.0) == "x, 60 s"
    now[0] += 60
    assert "hardly any progress: its process used 3% of a CPU" in progress.line("x", 32.0)
    assert "120 s, whose worker does not answer" in progress.line("x", None)


def test_ray_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    todo = runner.plan(SweepConfig(**SETTINGS), tmp_path)
    with pytest.raises(ParameterError, match=r"pip install 'lm-eval-bh\[ray\]'"):
        runner.run(todo, ray="local")


def test_a_max_k_beyond_the_experts_is_refused_before_the_first_experiment(tmp_path):
    config = SweepConfig(**SETTINGS | {"baselines": [8, 65]})
    with pytest.raises(ParameterError, match="64 experts"):
        runner.run(runner.plan(config, tmp_path), device="cpu")
    assert not (tmp_path / "runs").exists()
    runner.plan(SweepConfig(**SETTINGS), tmp_path)  # the corrected settings are welcome


@pytest.mark.slow
def test_two_shards_make_the_whole(finished, tmp_path):
    config = SweepConfig(**SETTINGS)
    for shard in ("2/2", "1/2"):
        runner.run(runner.plan(config, tmp_path, shard=shard), device="cpu", say=str)
    assert_same(table(tmp_path), table(finished))


@pytest.mark.slow
def test_common_arguments_reach_the_rules_that_take_them(tmp_path):
    """Also where a baseline has the largest k, and the stock command would refuse them with it."""
    settings = {"baselines": [16], "alphas": [0.4], "model_args": {"min_k": 2}}
    config = SweepConfig(**SETTINGS | settings)
    runner.run(runner.plan(config, tmp_path), device="cpu", say=str)
    top, adaptive = (the_results(tmp_path / "runs" / e.name) for e in config.experiments())
    assert "min_k" not in top["config"]["model_args"]
    assert top["config"]["bh"]["config"]["min_k"] == 1
    assert adaptive["config"]["model_args"]["min_k"] == 2
    assert adaptive["config"]["bh"]["config"]["min_k"] == 2
    histogram = adaptive["config"]["bh"]["summary"]["layers"][0]["histogram"]
    assert histogram[1] == 0
    assert histogram[2] > 0


def test_an_experiment_runs_in_one_process_at_a_time(commands, tmp_path):
    config = SweepConfig(**SETTINGS)
    folder = SweepFolder(tmp_path, config)
    first, second, _ = config.experiments()
    with folder.alone(first) as mine:
        assert mine
        holder = (
            "from pathlib import Path; import json, sys;"
            "from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder;"
            "from lm_eval_bh.harness.sweep.sweep_config import SweepConfig;"
            f"config = SweepConfig(**{SETTINGS!r});"
            f"folder = SweepFolder(Path({str(tmp_path)!r}), config);"
            "first, second, _ = config.experiments();"
            "a = folder.alone(first).__enter__(); b = folder.alone(second).__enter__();"
            "print(json.dumps([a, b]))"
        )
        done = subprocess.run([commands / "python", "-c", holder], capture_output=True, text=True)
        assert json.loads(done.stdout) == [False, True], done.stderr
    with folder.alone(second) as mine:  # the other process is gone, and its lock with it
        assert mine


@pytest.mark.slow
def test_an_error_on_a_ray_worker_is_the_sentence_it_would_be_here(tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    config = SweepConfig(**SETTINGS | {"pretrained": str(tmp_path / "none")})
    with pytest.raises(ModelError, match="could not be loaded"):
        runner.run(runner.plan(config, tmp_path), ray="local", workers=1)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_sweep_with_one_line(commands, tmp_path, sent, code):
    """In a folder outside of a repository, git's complaint is hidden too."""
    options = [*FLAGS, "--limit", "40", "--output-dir", tmp_path / "sweep"]
    process = subprocess.Popen(
        [commands / "lm-eval-bh", "sweep", "--device", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("[1/3]"):
            break
    os.killpg(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == (
        "lm-eval-bh: interrupted: finished experiments are kept; "
        "run the same command again to continue.\n"
    )
    assert (tmp_path / "sweep" / "logs" / "8experts_topk_baseline_demo_lambada.json").exists()


def test_what_has_no_summary_is_not_done_and_cleared(tmp_path):
    config = SweepConfig(**SETTINGS)
    folder = SweepFolder(tmp_path, config)
    experiment, *_ = config.experiments()
    (folder.run(experiment) / "model").mkdir(parents=True)
    assert folder.missing([experiment]) == [experiment]
    folder.clear(experiment)
    assert not folder.run(experiment).exists()


@pytest.mark.slow
def test_two_rounds_measure_the_stability(tmp_path):
    config = SweepConfig(**SETTINGS | {"baselines": [], "alphas": [0.4]})
    lines = []
    for repeat in (1, 2):  # the second call adds a round to the first
        todo = runner.plan(config, tmp_path, repeat=repeat)
        assert len(todo.missing) == 1
        runner.run(todo, device="cpu", say=lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "[1/1] 8experts_bh_a040_demo_lambada",
        "[2/2] 8experts_bh_a040_demo_lambada_repeat2",
    ]
    frame = table(tmp_path)
    assert list(frame["output_determinism"]) == [100.0, 100.0]
    assert list(frame["expert_overlap_score"]) == [1.0, 1.0]
