"""Shared by all tests: their own offline Hugging Face cache, and the place of shared files.

The environment is set when this file is imported, since ``huggingface_hub`` and ``datasets`` read
it once, on their first import; subprocesses inherit it.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import typer.main
from browser_pages import browser, started_browser  # noqa: F401  fixtures
from hypothesis import settings
from warm_commands import commands  # noqa: F401  a fixture
from written_runs import new_writer, real_runs, write  # noqa: F401  fixtures

# Examples are not timed: a busy machine would fail them, and a first example imports libraries.
settings.register_profile("lm-eval-bh", deadline=None, max_examples=50)
settings.load_profile("lm-eval-bh")

ROOT = Path(__file__).resolve().parents[1]
# The slowest files, the slowest first: all workers wait for whatever starts last.
SLOWEST = (
    "docs/test_pages.py",
    "harness/sweep/test_sweep.py",
    "policies/test_tuning.py",
    "harness/test_quickstart.py",
    "routing/patching/test_families.py",
    "test_gpu_day.py",
    "trust/test_bad_inputs.py",
    "docs/test_notebook.py",
    "export/test_hosts.py",
    "test_packaging.py",
    "test_faults.py",
    "routing/patching/test_exported_families.py",
    "harness/plugin/test_plugin.py",
    "trust/test_fuzzing.py",
)
SHARED = Path(os.environ.get("LM_EVAL_BH_SHARED") or ROOT.parent / "shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; pytest-xdist gives files out in this order."""
    place = {ROOT / "tests" / name: at for at, name in enumerate(SLOWEST)}
    assert all(file.is_file() for file in place), "SLOWEST names a file that is not there"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def _scratch_hf_home() -> Path:
    """Make a cache with links to the shared data sets, whose folders are never written to."""
    home = Path(tempfile.mkdtemp(prefix="lm-eval-bh-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "datasets").mkdir()
    shared = SHARED / "hf_home" / "datasets"
    for folder in shared.iterdir() if shared.is_dir() else ():
        (home / "datasets" / folder.name).symlink_to(folder.resolve())
    return home


HF_ENV = {
    "HF_HOME": str(_scratch_hf_home()),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Results of map() stay in memory instead of being written through the link.
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": "1000000000",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
    os.environ.pop(_name, None)
os.environ.update(HF_ENV)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared files, or skip: it is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared folder, which is not at {SHARED} (set LM_EVAL_BH_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def hf_env() -> dict[str, str]:
    """Return the variables, already set, that point to an offline cache with the real data sets."""
    if not (SHARED / "hf_home").is_dir():
        pytest.skip(f"needs the real data sets, which are not at {SHARED / 'hf_home'}")
    return HF_ENV


@pytest.fixture(scope="session")
def tiny_model_folder() -> Path:
    """Return the folder of the shipped demo model."""
    from lm_eval_bh.resources import tiny_olmoe

    return tiny_olmoe()


@pytest.fixture(scope="session", autouse=True)
def described_once():
    """Describe the machine once: lm-eval does it in every evaluation, by commands of seconds."""
    from torch.utils import collect_env

    with pytest.MonkeyPatch.context() as patch:
        describe = functools.cache(collect_env.get_pretty_env_info)
        patch.setattr(collect_env, "get_pretty_env_info", describe)
        yield


@pytest.fixture(scope="session")
def built_once():
    """Build the program's command once: from all its annotations Typer does it in every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def run(monkeypatch, capsys, built_once):
    """Return a function that runs lm-eval-bh in this process: (exit code, output, errors)."""
    from lm_eval_bh.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lm-eval-bh", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call
