"""lm-eval's request cache: one of another routing or model is refused, answers are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.api.model import CachingLM
from routing_runs import ARGS
from sqlitedict import SqliteDict

from lm_eval_bh import ParameterError
from lm_eval_bh.harness.model import BHLM


def test_a_cache_of_another_routing_is_refused_and_cached_requests_are_counted(run, tmp_path):
    cache = str(tmp_path / "cache")
    options = {"model_args": ARGS.replace("alpha=0.5,", ""), "limit": 2, "use_cache": cache}
    first = run("alpha=0.5", **options)
    second = run("alpha=0.5", **options)
    assert first["config"]["bh"]["summary"]["cached_requests"] == 0
    assert second["config"]["bh"]["summary"]["cached_requests"] == 2 + 2 + 8 + 2
    assert second["config"]["bh"]["summary"]["tokens"] == 0
    assert second["results"] == first["results"]
    with pytest.raises(
        ParameterError, match=r"was filled with alpha=0\.5, and this run has alpha=0\.3"
    ):
        run("alpha=0.3", **options)


def test_a_cache_of_another_model_is_refused(tmp_path):
    lm = BHLM.create_from_arg_string("pretrained=tiny-olmoe", {"device": "cpu"})
    path = Path(tmp_path / "cache.db")
    with SqliteDict(path, autocommit=True) as foreign:
        foreign["some request"] = (-1.0, False)
    with pytest.raises(ParameterError, match="by another model than hf-bh"):
        CachingLM(lm, str(path))
