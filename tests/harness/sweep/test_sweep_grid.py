"""The experiments of a sweep, the sources of its settings, and invalid ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.harness.sweep.sweep_config import Experiment, SweepConfig, shard_of
from lm_eval_bh.harness.sweep.task_names import are_ours, expand_tasks
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.policy import Policy

GRID = {"tasks": ["bh_demo_lambada"], "baselines": [8], "max_k": [8, 16], "alphas": [0.3, 0.4]}


def test_the_seeds_preset_is_the_two_phase_experiment_of_sixty():
    experiments = SweepConfig.gather("seeds").experiments()
    assert len(experiments) == 60
    baselines = {(e.max_k, e.task) for e in experiments if e.rule == "topk"}
    adaptive = {(e.max_k, e.alpha, e.task) for e in experiments if e.rule == "bh"}
    tasks, sizes = ("bh_wikitext", "bh_lambada", "bh_hellaswag"), (8, 16, 32, 64)
    assert baselines == {(k, task) for k in sizes for task in tasks}
    assert adaptive == {(k, a, t) for k in sizes for a in (0.3, 0.4, 0.5, 0.6) for t in tasks}
    assert [e.rule for e in experiments[:12]] == ["topk"] * 12  # phase 1 comes first
    assert SweepConfig.gather("seeds").limit == 200


def test_the_full_preset_adds_the_small_baselines():
    full, seeds = SweepConfig.gather("full"), SweepConfig.gather("seeds")
    more = set(full.configurations) - set(seeds.configurations)
    assert more == {("topk", k, None) for k in range(2, 8)}
    assert set(seeds.configurations) < set(full.configurations)


def test_the_quick_preset_is_small_and_needs_no_network():
    config = SweepConfig.gather("quick")
    assert (config.pretrained, config.limit) == ("tiny-olmoe", None)
    digest = Policy.load("tiny-olmoe").digest()[:8]
    assert [e.name for e in config.experiments() if e.task == "bh_demo_lambada"] == [
        "2experts_topk_baseline_demo_lambada",
        "4experts_topk_baseline_demo_lambada",
        "8experts_topk_baseline_demo_lambada",
        "8experts_bh_a040_demo_lambada",
        "8experts_bh_a050_demo_lambada",
        f"8experts_policy_tiny-olmoe_{digest}_demo_lambada",
    ]


def test_a_policy_is_one_more_configuration_named_after_its_file_and_what_it_decides(tmp_path):
    file = tmp_path / "my policy.safetensors"
    policy = Policy(RoutingConfig(rule="topk", max_k=3), "0" * 64, 4, 64, 8)
    policy.save(file)
    config = SweepConfig(**GRID | {"policies": [str(file)], "model_args": {"min_k": 2}})
    experiment = config.experiments()[-1]
    assert experiment.name == f"3experts_policy_my_policy_{policy.digest()[:8]}_demo_lambada"
    # It decides everything about routing.
    assert config.model_args_of(experiment) == {
        "pretrained": config.pretrained,
        "policy": str(file),
    }
    assert config.routing_of(experiment) == policy.config
    names = {e.name for e in config.experiments()}
    Policy(RoutingConfig(rule="topk", max_k=2), "0" * 64, 4, 64, 8).save(file)
    assert experiment.name not in {e.name for e in config.experiments()}
    assert len(names & {e.name for e in config.experiments()}) == len(names) - 1


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("preset: quick\nlimit: 7\nalphas: [0.2]\nseed: 3\n")
    config = SweepConfig.gather(file=file, flags={"alphas": [0.1, 0.6], "limit": None})
    assert (config.alphas, config.limit, config.seed) == ((0.1, 0.6), 7, 3)
    assert config.pretrained == "tiny-olmoe"


def test_a_rule_without_a_level_runs_once_for_every_max_k():
    config = SweepConfig(**GRID | {"rules": ["bh", "topk"], "baselines": []})
    assert [(r, k, a) for r, k, a in config.configurations if r == "topk"] == [
        ("topk", 8, None),
        ("topk", 16, None),
    ]


@pytest.mark.parametrize(
    ("experiment", "name", "routing"),
    [
        (Experiment("topk", 8, None, "bh_wikitext"), "8experts_topk_baseline_wikitext", None),
        (Experiment("bh", 8, 0.4, "bh_wikitext"), "8experts_bh_a040_wikitext", {"alpha": 0.4}),
        (Experiment("by", 16, 0.05, "wikitext", 2), "16experts_by_a005_wikitext_repeat2", None),
    ],
)
def test_names_are_those_of_the_earlier_prototype(experiment, name, routing):
    assert experiment.name == name
    assert experiment.routing["max_k"] == experiment.max_k
    if routing:
        assert experiment.routing == routing | {"max_k": 8}


def test_every_rule_takes_what_it_can_of_the_common_arguments():
    """Whatever else is in the grid, and whichever experiment a process meets first."""
    common = {"min_k": 2, "statistic": "contribution", "null": "expert", "seed": 3, "dtype": "auto"}
    rules = ["bh", "top_p", "random_k"]
    config = SweepConfig(**GRID | {"baselines": [64], "rules": rules, "model_args": common})
    taken = {
        experiment.rule: {
            name: value
            for name, value in config.model_args_of(experiment).items()
            if name in {*common, "null_scope"}
        }
        for experiment in config.experiments()
    }
    assert taken == {
        "topk": {"dtype": "auto"},
        "bh": {"min_k": 2, "statistic": "contribution", "null_scope": "expert", "dtype": "auto"},
        "top_p": {"min_k": 2, "statistic": "contribution", "dtype": "auto"},
        "random_k": {"seed": 3, "dtype": "auto"},
    }
    for experiment in config.experiments():
        routing = config.routing_of(experiment)
        assert routing.min_k == (2 if experiment.alpha is not None else 1)
        assert routing.seed == (3 if experiment.rule == "random_k" else 0)


def test_a_preset_on_the_command_line_is_taken_before_that_of_the_file(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("preset: full\nlimit: 3\n")
    config = SweepConfig.gather("quick", file)
    assert (config.pretrained, config.limit) == ("tiny-olmoe", 3)


def test_repeats_come_after_a_whole_round():
    experiments = SweepConfig(**GRID).experiments(repeats=2)
    assert [e.repeat for e in experiments] == [1] * 5 + [2] * 5
    assert len({e.name for e in experiments}) == 10


def test_tags_are_replaced_by_their_tasks():
    assert expand_tasks(["bh_demo"]) == [
        "bh_demo_hellaswag",
        "bh_demo_lambada",
        "bh_demo_wikitext",
    ]
    assert expand_tasks(["bh_lambada", "bh_suite"])[0] == "bh_lambada"


def test_own_tasks_are_found_in_a_folder_and_win(tmp_path):
    """As with lm_eval --include_path."""
    (tmp_path / "own.yaml").write_text("task: own_lambada\ndataset_path: json\n")
    settings = GRID | {"tasks": ["own_lambada", "bh_demo"], "include_path": str(tmp_path)}
    found = SweepConfig(**settings)
    assert found.tasks[0] == "own_lambada"
    assert are_ours(found.tasks, found.include_path)
    assert found.as_dict(grid=False)["include_path"] == str(tmp_path)


@pytest.mark.parametrize("path", ["none", "file", 3])
def test_a_folder_of_tasks_that_is_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ParameterError, match=r"include_path.* folder"):
        SweepConfig(**GRID, include_path=path)


@given(shards=st.integers(1, 20), repeats=st.integers(1, 3))
def test_shards_share_the_experiments_evenly(shards, repeats):
    experiments = SweepConfig(**GRID).experiments(repeats)
    parts = [shard_of(experiments, f"{i}/{shards}") for i in range(1, shards + 1)]
    assert sorted(e.name for part in parts for e in part) == sorted(e.name for e in experiments)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1/0", "4", "a/b", "-1/4", "1/4/2", ""])
def test_a_shard_outside_n_is_refused(shard):
    with pytest.raises(ParameterError, match=r"i/n"):
        shard_of(SweepConfig(**GRID).experiments(), shard)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"baselines": [], "alphas": []}, "grid is empty"),
        ({"baselines": [], "max_k": []}, "grid is empty"),
        ({"alphas": [0.4, 0.4]}, "alphas names 0.4 2 times"),
        ({"alphas": [1.5]}, "alpha must be a number .* found 1.5"),
        ({"max_k": [0]}, "max_k must be an integer"),
        ({"baselines": [8, 8]}, "baselines names 8 2 times"),
        ({"rules": ["bhh"]}, "did you mean 'bh'"),
        ({"tasks": []}, "no task"),
        ({"tasks": ["bh_demo_lambda"]}, "did you mean 'bh_demo_lambada'"),
        ({"limit": 0}, "limit must be .* found 0"),
        ({"limit": 2.5}, "limit must be .* found 2.5"),
        ({"batch_size": "large"}, "batch_size must be .* found 'large'"),
        ({"seed": "x"}, "seed must be an integer from 0 to 4294967295: found 'x'"),
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295: found -1"),
        ({"model_args": {"alpha": 0.3}}, "model_args sets alpha"),
        ({"model_args": "dtype=float32"}, "model_args must be names with values"),
        (
            {"model_args": {"null": "experts"}},
            "null_scope must be layer, expert or",
        ),
        ({"alphas": [[0.3]]}, r"alphas must be a list of values.*not hold \[0.3\]"),
        ({"tasks": [3]}, "task '3' is unknown"),
        ({"log_routing": "sample"}, "log_routing='sample'"),
        ({"log_routing": "summary", "log_samples": 3}, "log_samples=3 has no effect"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, sentence):
    with pytest.raises(ParameterError, match=sentence):
        SweepConfig(**GRID | change)


@pytest.mark.slow
def test_an_unknown_task_of_lm_eval_is_refused_with_the_nearest_name():
    with pytest.raises(ParameterError, match="did you mean 'hellaswag'"):
        SweepConfig(**GRID | {"tasks": ["helaswag"]})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("limt: 3", "did you mean 'limit'"), ("- 3", "must hold keys"), ("a: [", "could not be read")],
)
def test_a_file_of_settings_that_cannot_be_used_is_refused(tmp_path, text, sentence):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(ParameterError, match=sentence):
        SweepConfig.gather(file=file)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ParameterError, match="did you mean 'quick'"):
        SweepConfig.gather("quik")
