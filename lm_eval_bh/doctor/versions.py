"""Compares installed packages with the tested ones."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from lm_eval_bh.doctor.finding import NOTE, PROBLEM, Finding
from lm_eval_bh.resources import PACKAGE as PACKAGE_FOLDER

PACKAGE = "lm-eval-bh"
CONSTRAINTS = "constraints.txt"


def check_versions() -> Iterator[Finding]:
    """Yield packages that differ from the tested versions, and the number that do not."""
    try:
        own = importlib.metadata.version(PACKAGE)
        required = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            PACKAGE,
            "imported, but not installed: the stock lm_eval does not find it",
            PROBLEM,
            "pip install -e . in its folder",
        )
        return
    yield Finding(PACKAGE, f"{own}, Python {platform.python_version()}")
    tested, as_tested = _tested(), 0
    for requirement in sorted(required, key=lambda r: r.name):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        finding = _check(requirement, tested.get(canonicalize_name(requirement.name)))
        if finding is None:
            as_tested += 1
        else:
            yield finding
    yield Finding("packages", f"{as_tested} as tested")


def _tested() -> dict[str, str]:
    """Return name -> tested version for this Python; empty if unknown."""
    checkout = PACKAGE_FOLDER.parent / CONSTRAINTS
    if checkout.is_file():
        text = checkout.read_text(encoding="utf-8")
    else:
        of_wheel = importlib.metadata.distribution(PACKAGE)
        text = of_wheel.read_text(f"extra_metadata/{CONSTRAINTS}") or ""
    lines = text.splitlines()
    known = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {
        canonicalize_name(one.name): next(iter(one.specifier)).version
        for one in known
        if one.marker is None or one.marker.evaluate()
    }


def _check(requirement: Requirement, tested: str | None) -> Finding | None:
    """Return how an installed package differs from the tested one; None if it does not."""
    name = requirement.name
    try:
        found = Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", PROBLEM, f"pip install '{requirement}'")
    except InvalidVersion as error:
        return Finding(name, str(error), NOTE, f"pip install '{name}=={tested}' if it fails")
    if not requirement.specifier.contains(found, prereleases=True):
        remedy = f"pip install '{name}=={tested}'" if tested else f"pip install '{requirement}'"
        return Finding(
            name, f"{found}, but lm-eval-bh needs {requirement.specifier}", PROBLEM, remedy
        )
    if tested is None or found.public == Version(tested).public:
        return None
    age = "newer" if found > Version(tested) else "older"
    remedy = f"if something fails: pip install '{name}=={tested}'"
    return Finding(name, f"{found}, {age} than the tested {tested}", NOTE, remedy)
