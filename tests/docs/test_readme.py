"""README is short, and the reference says of every parameter what the code does."""

from __future__ import annotations

import dataclasses
import re

import pytest

from lm_eval_bh import RoutingConfig
from lm_eval_bh.harness.arguments import DEFAULT_ALPHA
from lm_eval_bh.routing.config import PARAMETERS


@pytest.mark.parametrize("field", dataclasses.fields(RoutingConfig), ids=lambda field: field.name)
def test_every_parameter_has_its_row(request, field):
    default = DEFAULT_ALPHA if field.name == "alpha" else field.default
    if default is None:
        shown = "none"
    else:
        shown = f"`{default}`" if isinstance(default, str) else f"{default:g}"
    row = f"| `{field.name}` | {shown} | {PARAMETERS[field.name].help} |"
    page = request.config.rootpath / "docs" / "reference" / "model_args.md"
    assert row in page.read_text(encoding="utf-8").splitlines()


def test_the_readme_is_short_and_its_links_lead_somewhere(request):
    root = request.config.rootpath
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(links) > 20
    assert [link for link in links if "://" not in link and not (root / link).exists()] == []
