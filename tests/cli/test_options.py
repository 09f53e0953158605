"""Options: one name per concept, values in help and completion, examples that parse."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import get_args

import pytest
from command_lines import commands, parsed

from lm_eval_bh.cli import options

COMMANDS = commands()


def registered() -> dict[str, object]:
    """Return each list of values, and that of the module that takes them."""
    from lm_eval_bh.analysis.compare.paired import BASELINES
    from lm_eval_bh.analysis.show.plots import PANELS
    from lm_eval_bh.export.verification import ENGINES
    from lm_eval_bh.harness.logs.log_options import LEVELS
    from lm_eval_bh.harness.sweep.sweep_config import PRESETS
    from lm_eval_bh.policies.tuning import run as tuning
    from lm_eval_bh.resources import MODELS
    from lm_eval_bh.routing.methods.scores import STATISTICS
    from lm_eval_bh.routing.methods.step_up import ORIGINS, SCOPES
    from lm_eval_bh.routing.placement import DTYPES
    from lm_eval_bh.routing.tables.kde import KERNELS
    from lm_eval_bh.traces.read_trace import READERS

    return {
        "DtypeName": ("auto", *DTYPES),
        "StatisticName": STATISTICS,
        "ScopeName": SCOPES,
        "SourceName": ORIGINS,
        "KernelName": KERNELS,
        "LogLevel": LEVELS,
        "SweepPreset": PRESETS,
        "TunePreset": tuning.PRESETS,
        "BaselineName": BASELINES,
        "EngineName": ENGINES,
        "TraceFormat": READERS,
        "PanelName": PANELS,
        "ShippedName": (*MODELS, "tasks", "kde_models"),
    }


def test_values_are_those_that_the_package_takes():
    for name, values in registered().items():
        assert set(get_args(getattr(options, name))) == set(values), name


@pytest.mark.parametrize("path", COMMANDS)
def test_each_command_has_help_two_examples_and_options_that_are_explained(path, run):
    command = COMMANDS[path]
    for parameter in command.params:
        assert parameter.help, parameter.name
    code, out, err = run(*path.split(), "-h")
    assert (code, err) == (0, "")
    assert out == run(*path.split(), "--help")[1]
    lines = re.findall(r"^ +lm-eval-bh (.+)$", command.epilog, re.M)
    assert len(lines) == 2
    for line in lines:
        called, _ = parsed(line)
        assert called.startswith(f"lm-eval-bh {path}".strip())


@pytest.mark.parametrize("path", COMMANDS)
def test_an_option_has_one_name(path):
    """Former names are hidden from help and completion."""
    names = {name for option in COMMANDS[path].params for name in option.opts}
    assert not names & {"--pretrained", "--force", "--length", "--string", "--kde", "--null"}
    assert not names & {"--documents", "--text", "--task"} or path in ("view", "import-routing")
    for option in COMMANDS[path].params:
        assert len([name for name in option.opts if name.startswith("--")]) <= 1, option.opts


def test_the_version(run):
    assert run("--version") == (0, f"{version('lm-eval-bh')}\n", "")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("policy export p --to ", {"hf", "vllm", "llama.cpp"}),
        ("report runs --panel pa", {"pareto"}),
        ("calibrate --dtype fl", {"float32", "float16", "float64"}),
        ("sweep --preset ", {"quick", "seeds", "full"}),
        ("doctor path tiny", {"tiny-olmoe", "tiny-glm"}),
        ("pl", set()),
        ("po", {"policy"}),
        ("calibrate --pre", set()),
        ("tune --mod", {"--model"}),
    ],
)
def test_completion_knows_values_and_no_former_name(words, found, run, monkeypatch):
    monkeypatch.setenv("_LM_EVAL_BH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"lm-eval-bh {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    code, out, _ = run()
    assert code == 0
    assert set(out.split()) == found


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ("--tasks a,b", ["a", "b"]),
        ("--tasks a --tasks b", ["a", "b"]),
        ("--tasks 'a, b' --tasks c", ["a", "b", "c"]),
    ],
)
def test_lists_are_joined_by_commas_or_repeated(lists, words):
    from lm_eval_bh.cli.word_lists import words as split

    _, values = parsed(f"sweep --output-dir x {lists}")
    assert split(values["tasks"]) == words
