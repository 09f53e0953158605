"""README is short, and the reference describes every parameter as the code does."""

from __future__ import annotations

import re

import pytest

from lm_eval_bh.harness.arguments import DEFAULT_ALPHA
from lm_eval_bh.routing.declared import PARAMETERS
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.base import SCORED
from lm_eval_bh.routing.methods.batch import FALLBACK
from lm_eval_bh.routing.methods.step_up import TESTED

OURS = [name for name, method in METHODS.items() if method.__module__.startswith("lm_eval_bh.")]
GROUPS = {"tested": TESTED, "scored": SCORED, "step": {"fallback": FALLBACK}}


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_has_its_row(request, name):
    default = DEFAULT_ALPHA if name == "alpha" else PARAMETERS[name].default
    if default is None:
        shown = "none"
    else:
        shown = f"`{default}`" if isinstance(default, str) else f"{default:g}"
    row = f"| `{name}` | {shown} | {PARAMETERS[name].help} |"
    page = request.config.rootpath / "docs" / "reference" / "model_args.md"
    assert row in page.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("page", ["README.md", "docs/reference/rules.md"])
@pytest.mark.parametrize("name", OURS)
def test_every_method_is_listed_with_its_parameters_and_its_source(request, page, name):
    text = (request.config.rootpath / page).read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    *_, parameters, source = (cell.strip() for cell in row.strip("|").split("|"))
    assert re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", source) == METHODS[name].source
    listed = set(re.findall(r"`(\w+)`", parameters))
    for group in GROUPS.keys() & set(re.findall(r"\w+", parameters)):
        listed |= GROUPS[group].keys()
    assert listed == METHODS[name].declared.keys() - {"alpha"}


def test_every_picture_of_a_page_is_in_the_repository_and_small(request):
    root = request.config.rootpath
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]
    shown = {
        (page.parent / target).resolve()
        for page in pages
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    kept = set((root / "docs" / "images").iterdir())
    assert shown == kept
    assert [file.name for file in kept if file.stat().st_size > 150_000] == []


def test_the_readme_is_short_and_its_links_lead_somewhere(request):
    root = request.config.rootpath
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 225
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(links) > 20
    assert [link for link in links if "://" not in link and not (root / link).exists()] == []


def test_pages_of_results_have_short_tables_and_link_every_csv(request):
    folder = request.config.rootpath / "docs" / "results"
    linked = set()
    for page in folder.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        linked |= set(re.findall(r"\]\((\w+\.csv)\)", text))
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        assert [len(table.splitlines()) for table in tables if table.count("\n") > 12] == [], page
    assert linked == {file.name for file in folder.glob("*.csv")}
