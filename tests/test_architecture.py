"""The plan of the house: which room may import which, without circles and without namesakes.

Imports are read from the source, those inside functions and under ``TYPE_CHECKING`` too.
"""

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lm_eval_bh"

# Every room may import itself, and the modules that all may import.
COMMON = {"errors", "experiment_names", "files", "resources", "schema", "validation"}
MAY_IMPORT = {
    "schema": {"errors", "experiment_names", "validation"},
    "experiment_names": set(),
    "validation": set(),
    "errors": set(),
    "files": {"errors"},
    "resources": {"errors"},
    "routing": COMMON,
    "policies": COMMON | {"routing"},
    "export": COMMON | {"routing"},
    "harness": COMMON | {"routing"},
    "analysis": COMMON,
    "doctor": COMMON | {"harness", "routing"},
    "traces": COMMON | {"harness"},
    "speed": COMMON | {"harness", "routing"},
    "viewing": COMMON | {"analysis", "routing"},
    "cli": COMMON
    | {
        "analysis",
        "doctor",
        "export",
        "harness",
        "policies",
        "routing",
        "speed",
        "traces",
        "viewing",
    },
    "__init__": COMMON | {"analysis", "harness", "routing", "viewing"},
    "__main__": {"cli"},
}
# A sweep reads its own results the way the tables do, so that both have the same numbers.
BESIDES = {("lm_eval_bh.harness.sweep.runner", "analysis")}
HEAVY = ("torch", "transformers", "lm_eval")


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Return what a module imports: modules of the package by their full name, others too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


ARROWS = {
    name: {other for other in imported(name) if other in MODULES and other != name}
    for name in MODULES
}


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("name", MODULES)
def test_arrows_go_one_way(name):
    room = room_of(name)
    for other in ARROWS[name]:
        target = room_of(other)
        assert target == room or target in MAY_IMPORT[room] or (name, target) in BESIDES, (
            f"{name} imports {other}"
        )


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(ARROWS[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "analysis"])
def test_analysis_needs_no_torch(name):
    assert not {other.split(".")[0] for other in imported(name)} & set(HEAVY)


@pytest.mark.parametrize(
    "name",
    [name for name in MODULES if ".export.portable." in name or name.endswith(".engine_scores")],
)
def test_what_other_environments_run_needs_nothing_of_ours(name):
    assert not {other for other in imported(name) if other.split(".")[0] == PACKAGE.name}


def test_no_two_modules_have_one_name():
    times = Counter(file.stem for file in MODULES.values() if file.stem != "__init__")
    assert [name for name, number in times.items() if number > 1] == []


def test_what_the_documentation_imports_is_there():
    """Of all pages, those too whose blocks cannot run."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = re.findall(r"^ *from (lm_eval_bh[\w.]*) import ([\w, ]+)", text, re.M)
    assert len(lines) >= 6
    for module, names in lines:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}: {name}"
