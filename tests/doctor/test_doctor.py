"""The doctor's findings on this installation and machine, and on faulty ones."""

from __future__ import annotations

import importlib.metadata
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_bh.doctor import companions, harness_check, machine, versions
from lm_eval_bh.doctor.harness_check import check_harness
from lm_eval_bh.doctor.machine import check_caches, check_devices, check_hub
from lm_eval_bh.doctor.outlook import check_model
from lm_eval_bh.doctor.versions import check_versions
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.find import cached_null
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


@pytest.mark.slow
def test_a_machine_on_which_all_works(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = run("doctor", "--model", "tiny-olmoe")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "finds the model hf-bh" in text
    assert "bh_demo_wikitext" in text
    assert "OlmoeForCausalLM, 4 MoE layers, 64 experts, native top-8" in text
    assert "offline, by HF_HUB_OFFLINE and HF_DATASETS_OFFLINE" in text
    assert out.splitlines()[-1].endswith(" 0 problem")
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_the_exit_code_tells_of_a_problem(run, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(Path(sys.executable).with_name("no-python")))
    code, out, _ = run("doctor", "--model", "no/such-model")
    assert code == 1
    assert "problem: model: download it, or check the name; tiny-olmoe is shipped." in out
    assert "problem: lm_eval: run lm_eval ls models." in out


# Versions


def test_versions_are_held_against_the_constraints(monkeypatch):
    real = importlib.metadata.version
    changed = {"typer": "0.1", "rich": "99.0", "jinja2": "3.1.2", "tqdm": "broken"}

    def version(name):
        if name == "filelock":
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    before = by_subject(check_versions())
    monkeypatch.setattr(versions.importlib.metadata, "version", version)
    found = by_subject(check_versions())
    assert (found["filelock"].state, found["filelock"].found) == ("problem", "not installed")
    assert found["typer"].state == "problem"
    assert found["typer"].found.startswith("0.1, but lm-eval-bh needs >=0.")
    assert found["typer"].remedy.startswith("pip install 'typer==0.")
    assert (found["rich"].state, "newer than the tested" in found["rich"].found) == ("note", True)
    assert (found["jinja2"].state, "older than the tested" in found["jinja2"].found) == (
        "note",
        True,
    )
    assert found["tqdm"].state == "note"
    told = len(found) + int(found["packages"].found.split()[0])
    assert told == len(before) + int(before["packages"].found.split()[0])  # of none twice


def test_packages_beside_torch_that_were_built_for_another_are_named(run, monkeypatch, tmp_path):
    """Transformers cannot be loaded beside them, so nothing else is examined."""
    home = tmp_path / "torchaudio"
    home.mkdir()
    (home / "__init__.py").write_text("raise OSError('undefined symbol: aten')\n")
    (tmp_path / "torchaudio-2.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.0\n"
    (tmp_path / "torchaudio-2.0.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(companions, "COMPANIONS", ("torchaudio", "no_such_package"))
    found = by_subject(companions.check_companions())
    assert list(found) == ["torchaudio"]
    assert "undefined symbol: aten" in found["torchaudio"].found
    code, out, _ = run("doctor")
    assert code == 1
    assert "problem: torchaudio: pip uninstall torchaudio, which text models do not need." in out
    assert "cores" not in out


def test_a_checkout_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(versions, "PACKAGE", "lm-eval-bh-that-is-not-installed")
    (found,) = check_versions()
    assert found.state == "problem"
    assert found.remedy.startswith("pip install -e .")


# lm-eval


def interpreter(folder):
    """Return a Python that leaves start-up files alone."""
    path = folder / "python"
    site = sysconfig.get_path("purelib")
    path.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -S -c '
        f'"import sys; sys.path.append({site!r}); exec(sys.argv[2])" "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_without_start_up_files(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path))
    found = by_subject(check_harness())
    assert found["lm_eval"].found == "does not find the model hf-bh"
    assert found["tasks"].found == "lm_eval does not find those of this package"
    assert {finding.state for finding in found.values()} == {"problem"}
    assert "lm-eval-bh lm-eval" in found["lm_eval"].remedy


def test_an_lm_eval_that_is_not_there_or_says_nothing(monkeypatch):
    for question, told in (
        ("import lm_eval_that_is_not_there", "No module named 'lm_eval_that_is_not_there'"),
        ("pass", "did not answer"),
        ("print('hello')", "did not answer"),
    ):
        monkeypatch.setattr(harness_check, "ASK", question)
        (found,) = check_harness()
        assert found.state == "problem"
        assert told in found.found


# The machine


def test_devices_and_hub(monkeypatch):
    found = by_subject(check_devices())
    assert "cores" in found["cpu"].found
    cuda = found["cuda:0" if torch.cuda.is_available() else "cuda"]
    assert cuda.state == ("ok" if torch.cuda.is_available() else "note")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (hub,) = check_hub()
    assert (hub.state, "http://127.0.0.1:9 does not answer" in hub.found) == ("note", True)


def test_caches_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    null = tmp_path / "lm-eval-bh" / "null" / "a.safetensors"
    assert ": nothing yet" in by_subject(check_caches())["null models"].found
    null.parent.mkdir(parents=True)
    null.write_bytes(bytes(2_500_000))
    null.with_name("link").symlink_to(null)
    assert ": 1 files, 2.5 MB, " in by_subject(check_caches())["null models"].found
    monkeypatch.setattr(machine, "LITTLE", 1e18)
    assert by_subject(check_caches())["null models"].state == "note"
    monkeypatch.setenv("XDG_CACHE_HOME", str(null))  # a file is no folder
    assert by_subject(check_caches())["null models"].state == "problem"


def test_a_folder_that_cannot_be_made_is_no_lack_of_space(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    found = by_subject(check_caches())["null models"]
    assert found.state == "problem"
    assert "HF_HOME or XDG_CACHE_HOME to a folder that you can write to" in found.remedy


# A model


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Return an unknown OLMoE in several files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = AutoConfig.from_pretrained(tiny_olmoe())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(
        tmp_path / "other", max_shard_size="5MB"
    )
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    return tmp_path / "other"


def test_the_null_model_that_a_model_gets(other):
    known = by_subject(check_model("tiny-olmoe"))
    assert known["null model"].state == "ok"
    assert str(shipped("kde_models") / "tiny-olmoe.safetensors") in known["null model"].found
    assert known["policy"].state == "ok"
    unknown = by_subject(check_model(str(other)))["null model"]
    model = AutoModelForCausalLM.from_pretrained(other)
    fingerprint = router_fingerprint(router.weight for router in find_routers(model))
    assert unknown.state == "note"
    assert str(cached_null(fingerprint)) in unknown.found  # the fingerprint is the whole model's
    assert f"calibrate --model {other}" in unknown.remedy


def test_the_policy_that_a_model_gets(run, other, tmp_path):
    file = tmp_path / "p.safetensors"
    arguments = "pretrained=tiny-olmoe,rule=topk,max_k=4"
    assert run("policy", "--model-args", arguments, "--output", file)[0] == 0
    fits = by_subject(check_model("tiny-olmoe", file))["policy"]
    assert (fits.state, "fits: rule topk" in fits.found) == ("ok", True)
    foreign = by_subject(check_model(str(other), file))["policy"]
    assert (foreign.state, "differ from those of" in foreign.found) == ("problem", True)
    missing = by_subject(check_model("tiny-olmoe", tmp_path / "none"))["policy"]
    assert missing.state == "problem"


def test_models_that_get_nothing(other, tmp_path):
    (away,) = check_model("no/such-model")
    assert (away.state, "not on this machine" in away.found) == ("problem", True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
    }
    AutoConfig.for_model(**config).save_pretrained(tmp_path / "dense")
    (dense,) = check_model(str(tmp_path / "dense"))
    assert (dense.state, "has no MoE routers" in dense.found) == ("problem", True)
    for file in other.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    cut = by_subject(check_model(str(other)))["null model"]
    assert (cut.state, "unknown before" in cut.found) == ("note", True)
    for file in other.glob("model*"):
        file.unlink()
    bare = by_subject(check_model(str(other)))["null model"]
    assert (bare.state, "are not on this machine" in bare.found) == ("note", True)
