"""Sources of kde=: shipped null models, the user's cache, and otherwise calibration."""

from __future__ import annotations

import logging

import pytest
import torch

from lm_eval_bh import BHRoutingIntegration, NullModel, NullModelError
from lm_eval_bh.resources import cache_folder
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables import calibration
from lm_eval_bh.routing.tables.find import cached_null, resolve_null


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stranger(tiny):
    """Return a model without a known null model."""
    with torch.no_grad():
        for router in find_routers(tiny):
            router.weight.mul_(1.01)
    return tiny


def test_what_ships_is_found_first(tiny, null):
    assert resolve_null("auto", tiny, find_routers(tiny)).header == null.header
    assert not cache_folder().exists()


def test_an_unknown_router_is_calibrated_on_wikitext_once_and_kept(
    stranger, tokenizer, hf_env, caplog
):
    routers = find_routers(stranger)
    with caplog.at_level(logging.WARNING):
        made = resolve_null("auto", stranger, routers, tokenizer)
    assert "calibrating one on WikiText" in caplog.text
    assert made.header.text == "EleutherAI/wikitext_document_level wikitext-2-raw-v1 train"
    assert made.header.tokens == 65536
    path = cached_null(made.header.fingerprint)
    assert path.is_file()
    written = path.stat().st_mtime_ns
    caplog.clear()
    again = resolve_null("auto", stranger, routers)
    assert again.header == made.header
    assert path.stat().st_mtime_ns == written
    assert "calibrating" not in caplog.text
    with BHRoutingIntegration(stranger, alpha=0.4) as routing, torch.no_grad():
        stranger(torch.arange(2, 42)[None])
        assert 1 <= routing.get_routing_stats()["mean_experts_per_token"] < 8


def test_without_text_the_error_says_what_to_pass(stranger, tokenizer, monkeypatch):
    import datasets

    def offline(*_args, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(NullModelError, match="pass a text file or a null model") as caught:
        resolve_null("auto", stranger, find_routers(stranger), tokenizer)
    assert "\n" not in str(caught.value)
    assert not cache_folder().exists()


def test_a_damaged_file_in_the_cache_is_passed_over_with_a_warning(tiny, null, caplog):
    path = cached_null("damaged")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a null model")
    with torch.no_grad():
        null.save(path.with_name("other.safetensors"))
    with caplog.at_level(logging.WARNING):
        assert resolve_null("auto", tiny, find_routers(tiny)).header == null.header


def test_a_path_may_be_a_file_or_a_folder_of_pickles(tiny, null, tmp_path, shared):
    null.save(tmp_path / "null.safetensors")
    assert (
        resolve_null(tmp_path / "null.safetensors", tiny, find_routers(tiny)).header == null.header
    )
    with pytest.raises(NullModelError, match="16"):  # the real OLMoE has 16 layers, tiny-olmoe 4
        resolve_null(shared / "olmoe_kde", tiny, find_routers(tiny))


def test_a_null_model_object_is_taken_as_it_is(tiny, null):
    assert resolve_null(null, tiny, find_routers(tiny)) is null
    with pytest.raises(NullModelError, match="layers"):
        resolve_null(NullModel.fit({0: torch.randn(500, 64)}), tiny, find_routers(tiny))


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    stranger, tokenizer, demo_texts, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(calibration, "wikitext_train_texts", lambda: demo_texts)
    with caplog.at_level(logging.WARNING):
        made = resolve_null("auto", stranger, find_routers(stranger), tokenizer)
    assert made.header.tokens
    assert "set XDG_CACHE_HOME" in caplog.text
    assert (tmp_path / "file").read_text() == ""
