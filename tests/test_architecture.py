"""The plan of the package: allowed imports without cycles, and size limits.

Imports are read from the source, those inside functions and under ``TYPE_CHECKING`` too.
"""

import ast
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lm_eval_bh"

# Every room may import itself, and the modules that all may import.
COMMON = {"errors", "experiment_names", "files", "logged_rows", "resources", "schema", "threads"}
COMMON |= {"validation"}
MAY_IMPORT = {
    "schema": {"errors", "experiment_names", "validation"},
    "experiment_names": set(),
    "validation": set(),
    "errors": set(),
    "threads": set(),
    "files": {"errors"},
    "resources": {"errors"},
    "logged_rows": {"errors", "files", "schema"},
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
METHODS = PACKAGE / "routing" / "methods"
# Lines, docstrings and all: what does not fit is to be made shorter, not the number larger. The aim
# for the last two is 6,500 and 27,500: they may only fall.
MOST_OF_A_METHOD, MOST_OF_A_ROUTING_FILE = 100, 300
MOST_OF_ROUTING_AND_EXPORT, MOST_OF_THE_PACKAGE = 13_000, 40_700


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Return what a module imports: modules of the package by their full name, others too."""
    found, folder = set(), name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.level == 0 else f"{folder}.{node.module}"
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in MODULES else module)
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
    """Except its neighbours in an exported folder."""
    ours = {other for other in imported(name) if other.split(".")[0] == PACKAGE.name}
    assert {other for other in ours if ".export.portable." not in other} == set()


@pytest.mark.parametrize(
    "file", sorted(set(METHODS.glob("*.py")) - {METHODS / "__init__.py"}), ids=lambda f: f.stem
)
def test_methods_need_torch_and_their_neighbours_alone(file):
    """They are copied to a folder without this package; transformers follows relative imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            assert (METHODS / f"{node.module}.py").is_file(), ast.unparse(node)
            continue
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            room = name.partition(".")[0]
            assert room in {"torch", "numpy"} | sys.stdlib_module_names, ast.unparse(node)


def lines_of(*files: Path) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_a_method_is_one_short_file():
    """Modules that all methods share, such as base.py, are not methods."""
    methods = importlib.import_module("lm_eval_bh.routing.methods").METHODS.values()
    own = [method for method in methods if method.__module__.startswith(PACKAGE.name)]
    names = [method.__module__ for method in own]
    assert len(set(names)) == len(names) >= 13
    for name in (*names, "lm_eval_bh.routing.methods.pick"):
        assert lines_of(MODULES[name]) <= MOST_OF_A_METHOD, name


def test_no_file_of_routing_is_long():
    files = (PACKAGE / "routing").rglob("*.py")
    long = {file.name: lines_of(file) for file in files}
    assert {k: n for k, n in long.items() if n > MOST_OF_A_ROUTING_FILE} == {}


def test_the_core_and_the_whole_stay_small():
    core = [file for room in ("routing", "export") for file in (PACKAGE / room).rglob("*.py")]
    assert lines_of(*core) <= MOST_OF_ROUTING_AND_EXPORT
    assert lines_of(*MODULES.values()) <= MOST_OF_THE_PACKAGE


def test_no_two_modules_have_one_name():
    times = Counter(file.stem for file in MODULES.values() if file.stem != "__init__")
    assert [name for name, number in times.items() if number > 1] == []


def test_what_the_documentation_imports_is_there():
    """On all pages, including those whose blocks cannot run."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = re.findall(r"^ *from (lm_eval_bh[\w.]*) import ([\w, ]+)", text, re.M)
    assert len(lines) >= 6
    for module, names in lines:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}: {name}"
