"""An engine in its own environment is compared with hf-bh."""

from __future__ import annotations

import dataclasses
import sys
from importlib.util import find_spec

import pytest

from lm_eval_bh import ModelError, Policy
from lm_eval_bh.export import engine_scores, verification
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.verification import verify
from lm_eval_bh.resources import tiny_olmoe


def run(policies, name, documents, **arguments):
    return verify(
        Policy.load(policies[name]),
        Checkpoint.find(str(tiny_olmoe())),
        documents,
        name="tiny-olmoe",
        policy_file=policies[name],
        **arguments,
    )


def test_transformers_without_this_package(policies, documents):
    found = run(policies, "bh", documents, engine="hf")
    assert found.agrees
    assert found.largest < 1e-4
    assert found.other_counts == 0
    assert found.same_text
    assert found.documents == len(documents)
    assert found.tokens == sum(map(len, documents)) - len(documents)
    assert 1 < found.mean_experts < 8
    assert found.engine.startswith("transformers 5")
    assert min(found.speed, found.stock_speed) > 0
    for change in ({"largest": 2e-4}, {"other_counts": 1}):
        assert not dataclasses.replace(found, **change).agrees


def test_a_folder_that_routes_otherwise_is_found_out(policies, documents, commands, monkeypatch):
    """Export a different policy from the compared one."""
    export = verification.export_folder

    def other(policy, *arguments, **named):
        export(Policy.load(policies["static"]), *arguments, **named)

    monkeypatch.setattr(verification, "export_folder", other)
    found = run(policies, "bh", documents[:1], engine="hf", python=str(commands / "python"))
    assert found.largest > 0.01
    assert found.other_counts
    assert not found.agrees


def test_engines_that_are_not_there(policies, documents, tmp_path):
    without = tmp_path / "python"
    without.write_text(f"#!/bin/sh\nexit {engine_scores.NOT_INSTALLED}\n")
    without.chmod(0o755)
    with pytest.raises(ModelError, match=r"vllm is not installed for .*verify_vllm.sh"):
        run(policies, "bh", documents[:1], engine="vllm", python=str(without))
    with pytest.raises(ModelError, match="cannot be run"):
        run(policies, "bh", documents[:1], engine="hf", python=str(tmp_path / "none"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ModelError, match=r"failed \(out of memory\)"):
        run(policies, "bh", documents[:1], engine="hf", python=str(broken))


def test_an_environment_whose_vllm_lacks_the_plugin_is_told_apart(policies, documents, tmp_path):
    """VLLM itself would go on, with its own top-k."""
    script = tmp_path / "without_plugin.py"
    script.write_text(
        "import runpy, sys, types\n"
        "sys.modules |= {'vllm': types.ModuleType('vllm'), 'lm_eval_bh': None}\n"
        "del sys.argv[:2]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(ModelError, match=r"not installed for .*vllm and lm-eval-bh together"):
        run(policies, "bh", documents[:1], engine="vllm-plugin", python=str(python))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_environment_without_the_engine_is_told_apart(policies, documents):
    with pytest.raises(ModelError, match="not installed"):
        run(policies, "bh", documents[:1], engine="vllm")
