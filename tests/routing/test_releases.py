"""The cache of keys and values is found under the names of every release of transformers."""

from __future__ import annotations

import pytest
import torch

from lm_eval_bh.routing.releases import NAMES, given_cache, returned_cache, unsupported


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_found_by_each_name(name):
    cache = object()
    assert given_cache({"use_cache": True, name: cache}) is cache
    assert returned_cache({"logits": 1, name: cache}) == {name: cache}
    assert returned_cache(dict.fromkeys(NAMES, cache)) == {NAMES[0]: cache}


def test_no_cache_is_none():
    assert given_cache({"use_cache": True}) is None
    assert given_cache(dict.fromkeys(NAMES)) is None
    assert returned_cache({"logits": 1}) == {}


def test_what_the_installed_release_returns_is_taken_by_it(tiny):
    ids = torch.arange(20, 40).unsqueeze(0)
    with torch.no_grad():
        whole = tiny(ids).logits[:, -1]
        kept = returned_cache(tiny(ids[:, :-1], use_cache=True))
        assert len(kept) == 1
        last = tiny(ids[:, -1:], **kept, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-4)


def test_routers_that_a_later_release_supports_are_refused_with_its_number():
    assert "needs transformers 5.21 or later, and this is" in unsupported("GraniteMoeTopKRouter")
    assert unsupported("Linear") == "routers of this family are not supported."
