"""The wheel and the sdist are complete, install, are found by lm-eval, and uninstall."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

from lm_eval_bh.resources import MODELS

ROOT = Path(__file__).resolve().parents[1]
TASKS = [
    f"bh_{demo}{name}" for demo in ("", "demo_") for name in ("wikitext", "lambada", "hellaswag")
]
STARTUP_SOURCES = {"startup.py", "startup.pth", "startup.start"}
STARTUP_FILES = {"_lm_eval_bh_startup.py", "lm_eval_bh.pth", "lm_eval_bh.start"}
# A fresh interpreter must not find this checkout or another installation by PYTHONPATH.
CLEAN_ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=CLEAN_ENV, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """Build the sdist, and from it, as a test of its contents, the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(dist) -> Path:
    return next(dist.glob("lm_eval_bh-*-py3-none-any.whl"))


@pytest.fixture(scope="session")
def in_wheel(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_below(*folders: str) -> set[str]:
    """Return what a checkout holds there; caches and files being written are no part of it."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix()
        for path in found
        if "__pycache__" not in path.parts and path.suffix not in (".pyc", ".tmp")
    }


def test_wheel_holds_everything(in_wheel):
    package = files_below("lm_eval_bh") - {
        f"lm_eval_bh/harness/plugin/{name}" for name in STARTUP_SOURCES
    }
    moved = {f"lm_eval_bh/{name}" for name in files_below("tasks", "kde_models")}
    rest = {name for name in in_wheel if ".dist-info/" not in name}
    assert rest == package | moved | STARTUP_FILES
    assert {f"lm_eval_bh/tasks/{task}.yaml" for task in TASKS} <= rest
    assert {
        f"lm_eval_bh/tasks/demo/{name}.jsonl" for name in ("wikitext", "lambada", "hellaswag")
    } <= rest
    assert "lm_eval_bh/py.typed" in rest


def test_wheel_holds_models_and_null_model(in_wheel):
    for name in MODELS:
        assert f"lm_eval_bh/models/{name}/model.safetensors" in in_wheel
        assert f"lm_eval_bh/models/{name}/tokenizer.json" in in_wheel
    assert any(name.startswith("lm_eval_bh/kde_models/") for name in in_wheel)


def test_wheel_is_no_larger_than_its_two_models_need(wheel):
    assert wheel.stat().st_size < 15_000_000


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")).rsplit(
            "/", 1
        )[0]
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
        tested = archive.read(f"{info}/extra_metadata/constraints.txt").decode()
    assert tested == (ROOT / "constraints.txt").read_text()
    assert "lm-eval-bh = lm_eval_bh.cli:main" in points
    assert "[lm_eval.models]\nhf-bh = lm_eval_bh.harness.model:BHLM" in points
    assert "License-Expression: MIT" in metadata
    assert licence.startswith("MIT License")


def test_sdist_holds_what_tests_need(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("lm_eval_bh", "tasks", "kde_models", "scripts", "tests", ".ci", "docs", "examples")
    needed = files_below(*folders)
    top = {"pyproject.toml", "constraints.txt", "LICENSE", "CHANGELOG.md", "README.md"}
    top |= {"CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "mkdocs.yml"}
    assert needed | top <= names


def test_an_index_would_take_both(dist):
    files = sorted(map(str, dist.iterdir()))
    shown = run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist)
    assert shown.count("PASSED") == len(files) == 2


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading[1] == project["version"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


class Environment:
    """A virtual environment that sees the packages of the running one, but installs into itself.

    The folder of the running one is put on the path by a line of a ``.pth`` file, so that start-up
    files and editable installations in it do not act here.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", paths))
        (self.site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.python = Path(sysconfig.get_path("scripts", "venv", paths)) / "python"

    def pip(self, *arguments: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, *arguments, cwd=self.folder)

    def install(self, *what: str | Path) -> None:
        flags = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        self.pip("install", "--quiet", *flags, *what)

    def run(self, *arguments: str | Path) -> str:
        return run(self.python, *arguments, cwd=self.folder)

    def files(self) -> set[Path]:
        return {path.relative_to(self.folder) for path in self.folder.rglob("*")}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("fresh"))


@pytest.fixture
def installed(fresh, wheel):
    before = fresh.files()
    fresh.install(wheel)
    yield fresh
    fresh.pip("uninstall", "--quiet", "--yes", "lm-eval-bh")
    assert fresh.files() == before  # nothing is left behind, by whatever ran in between


FOUND = """
import sys
assert "lm_eval_bh" not in sys.modules and "lm_eval" not in sys.modules
import lm_eval.models
from lm_eval.api.registry import model_registry
print(dict(model_registry.items())["hf-bh"])
from lm_eval_bh.resources import PACKAGE, shipped
print(PACKAGE, shipped("tasks"), shipped("kde_models"))
from importlib.metadata import entry_points
print(*(point.value for point in entry_points(group="lm_eval.models", name="hf-bh")))
print(*(point.name for point in entry_points(group="console_scripts", name="lm-eval-bh")))
"""


def test_installed_wheel_is_found(installed):
    model, places, point, script = installed.run("-c", FOUND).splitlines()
    package = installed.site / "lm_eval_bh"
    assert model == "lm_eval_bh.harness.model:BHLM"
    assert places == f"{package} {package / 'tasks'} {package / 'kde_models'}"
    # The running environment may have the package too: both are seen.
    assert set(point.split()) == {"lm_eval_bh.harness.model:BHLM"}
    assert set(script.split()) == {"lm-eval-bh"}


def test_installed_sdist_is_found(fresh, dist):
    """Built where it is installed, as by pip without a wheel."""
    before = fresh.files()
    fresh.install(next(dist.glob("*.tar.gz")))
    model, places, *_ = fresh.run("-c", FOUND).splitlines()
    package = fresh.site / "lm_eval_bh"
    assert model == "lm_eval_bh.harness.model:BHLM"
    assert places == f"{package} {package / 'tasks'} {package / 'kde_models'}"
    fresh.pip("uninstall", "--quiet", "--yes", "lm-eval-bh")
    assert fresh.files() == before


def test_stock_command_finds_every_task(installed):
    """The console script of lm-eval itself; it takes half a minute to index its own tasks."""
    lm_eval = Path(sysconfig.get_path("scripts")) / "lm_eval"
    shown = installed.run(lm_eval, "validate", "--tasks", ",".join([*TASKS, "bh_suite", "bh_demo"]))
    assert "All tasks found and valid" in shown


def test_startup_says_nothing_when_the_package_is_gone(fresh, wheel):
    """As after deleting the folders by hand."""
    fresh.install(wheel)
    kept = (fresh.site / "lm_eval_bh.pth").read_text()
    fresh.pip("uninstall", "--quiet", "--yes", "lm-eval-bh")
    orphan = fresh.site / "lm_eval_bh.pth"
    orphan.write_text(kept)
    try:
        done = subprocess.run(
            [fresh.python, "-c", "print(1)"],
            env=CLEAN_ENV,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        orphan.unlink()
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_editable_installation_copies_only_the_startup_files(fresh, tmp_path):
    checkout = tmp_path / "checkout"
    names = [name for name in os.listdir(ROOT) if name[0] != "." and name != "runs"]
    for name in names:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.tmp")
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=ignore)
        else:
            checkout.mkdir(exist_ok=True)
            shutil.copy(source, checkout / name)
    before = fresh.files()
    fresh.install("--editable", checkout)
    new = {
        path
        for path in fresh.files() - before
        if path.is_relative_to(fresh.site.relative_to(fresh.folder))
    }
    python_files = {
        path.name for path in new if path.suffix in (".py", ".yaml", ".jsonl", ".start")
    }
    assert python_files == {"_lm_eval_bh_startup.py", "lm_eval_bh.start"}
    model, places, *_ = fresh.run("-c", FOUND).splitlines()
    assert model == "lm_eval_bh.harness.model:BHLM"
    assert places == f"{checkout / 'lm_eval_bh'} {checkout / 'tasks'} {checkout / 'kde_models'}"
    fresh.pip("uninstall", "--quiet", "--yes", "lm-eval-bh")
    assert fresh.files() == before


def test_no_newer_torch_is_asked_for():
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    assert torch.specifier.contains("2.13.0")
    assert torch.specifier.contains(Version(version("torch")).public)
    constraints = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line[0] != "#"
    ]
    pinned = {r.name for r in constraints}
    assert {Requirement(r).name for r in project["dependencies"]} <= pinned


def stated_licence(name: str) -> str:
    """Return everything in an installed package about its licence."""
    told = metadata(name)
    classifiers = [c for c in told.get_all("Classifier") or [] if c.startswith("License")]
    return " ".join([told.get("License-Expression") or "", told.get("License") or "", *classifiers])


def test_every_dependency_has_its_reason_and_its_licence():
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python from 3.11 on")
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    optional = [requirement for extra in extras.values() for requirement in extra]
    for requirement in [*project["dependencies"], *optional]:
        lines = [line for line in text.splitlines() if f'"{requirement}"' in line]
        assert any(re.search(r"  # \w.{4,}", line) for line in lines), f"{requirement}: no reason"
    listed: dict[str, set[str]] = {"run": set(), "development": set()}
    for line in (ROOT / "SECURITY.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| licence"):
            continue
        licence, *columns = (cell.strip() for cell in line.strip("|").split("|"))
        for column, cell in zip(listed, columns, strict=True):
            for name in filter(None, cell.split(", ")):
                listed[column].add(name)
                assert licence.split("-")[0] in stated_licence(name), name
    needed = {Requirement(r).name for r in project["dependencies"]}
    assert listed["run"] == needed
    tools = {Requirement(r).name for r in optional} - {"lm-eval-bh"}
    assert listed["development"] == tools
