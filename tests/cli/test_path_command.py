"""The command doctor path."""

from __future__ import annotations

from lm_eval_bh.resources import shipped, tiny_olmoe


def test_path_tells_where_the_demo_model_lies(run):
    assert run("doctor", "path")[1].strip() == str(tiny_olmoe())
    assert run("doctor", "path", "tasks")[1].strip() == str(shipped("tasks"))
