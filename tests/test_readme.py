"""README says of every parameter what the code does."""

from __future__ import annotations

import dataclasses

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
    text = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    assert row in text.splitlines()
