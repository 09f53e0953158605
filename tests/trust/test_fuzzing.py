"""Fuzzing: for any content of a file, its reader returns, or raises one of our messages.

The suite draws a bounded number of examples; ``scripts/fuzz.py`` runs for any length of time.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from damaged_runs import (
    HUGE,
    LONG,
    SUMMARY_OF_A_SWEEP,
    WIKITEXT,
    log_of,
    manifest_of,
    results_of,
    samples_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lm_eval_bh import NullModel, Policy, RoutingConfig
from lm_eval_bh.analysis.read.documents import read_documents
from lm_eval_bh.analysis.read.results_file import Run
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.analysis.table.table_files import read_table
from lm_eval_bh.errors import BHError
from lm_eval_bh.harness.sweep.settings_file import read_settings
from lm_eval_bh.schema import read_internal_routing, read_json, read_manifest, read_summary

EXAMPLES = int(os.environ.get("LM_EVAL_BH_FUZZ_EXAMPLES", "60"))
N = 64  # points of a null distribution

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([HUGE, -HUGE, 2**63, -1, 0, float("nan"), float("inf"), 1e308, -1e308]),
    st.sampled_from(["", "x", LONG, "a/b", "../x", "\0", "\ud800", "1", "[/b]"]),
    st.sampled_from([[], {}, [[]], [None], [HUGE], {"": None}, [[1], 2], {"a": {"b": [1]}}]),
    st.recursive(st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)),
)


def places(content, place=()):
    """Yield the place of every value in JSON content."""
    yield place
    if isinstance(content, dict):
        items = content.items()
    else:
        items = enumerate(content[:2]) if isinstance(content, list) else ()
    for name, value in items:
        yield from places(value, (*place, name))


@st.composite
def damaged(draw, content):
    """Return content with one to three values replaced or removed, as bytes, perhaps cut."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(content))))
        if not place:
            continue
        inside = content
        for name in place[:-1]:
            inside = inside[name]
        if draw(st.booleans()):
            inside[place[-1]] = copy.deepcopy(draw(ODD))
        else:
            del inside[place[-1]]
    text = json.dumps(content).encode()
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text)))] + draw(st.binary(max_size=4))
    return text


bounded = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fuzz(read, file: Path, whole: Path, data) -> None:
    """Let a reader read a damaged copy of a file: it returns, or raises one of our messages."""
    first = whole.read_text().split("\n")[0] if file.suffix == ".jsonl" else whole.read_text()
    file.write_bytes(data.draw(damaged(json.loads(first))))
    with suppress(BHError), one_sentence():
        read(file)


@contextmanager
def one_sentence():
    try:
        yield
    except BHError as error:
        text = str(error)
        if "\n" in text or len(text) > 2000:
            raise AssertionError(text) from error
        raise


@bounded
@given(data=st.data())
def test_results_files(folder, original, data):
    def read(file):
        run = Run.read(file)
        run.find_log({"run-1": folder / "logs" / "run-1"})
        run.settings()
        run.samples_file(WIKITEXT)

    fuzz(read, results_of(folder), results_of(original), data)


@settings(bounded, max_examples=max(1, EXAMPLES * 2 // 5))
@given(data=st.data())
def test_a_damaged_results_file_never_stops_the_others(folder, original, data):
    fuzz(lambda file: None, results_of(folder), results_of(original), data)
    frame = load_experiments([folder], force=True, context_length=7).frame
    assert 0.5 in set(frame["alpha"])


@bounded
@given(data=st.data())
def test_samples(folder, original, data):
    fuzz(read_documents, samples_of(folder), samples_of(original), data)


@bounded
@given(data=st.data())
def test_manifests(folder, original, data):
    fuzz(lambda file: read_manifest(file.parent), manifest_of(folder), manifest_of(original), data)


@bounded
@given(data=st.data())
def test_internal_routing_logs(folder, original, data):
    fuzz(read_internal_routing, log_of(folder), log_of(original), data)


@bounded
@given(data=st.data())
def test_summaries_of_sweeps(tmp_path, data):
    from lm_eval_bh.harness.sweep.done import why_not_done
    from lm_eval_bh.harness.sweep.sweep_config import SweepConfig

    name = SUMMARY_OF_A_SWEEP["config"]
    file = tmp_path / "logs" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(SUMMARY_OF_A_SWEEP))
    fuzz(read_summary, file, whole, data)
    config = SweepConfig(tasks=("bh_wikitext",), baselines=(8,))
    for earlier in (None, {}):
        assert why_not_done(tmp_path, name, config.as_dict(grid=False), earlier)


@bounded
@given(content=st.binary(max_size=60))
def test_any_bytes(tmp_path, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    for read in (read_json, read_internal_routing, read_summary, read_documents, Run.read):
        with suppress(BHError), one_sentence():
            read(file)


# Files of null models and policies


@pytest.fixture(scope="module")
def null():
    draws = np.random.default_rng(0).normal(size=(64, 8))
    return NullModel.fit({0: draws, 1: draws}, points=N, header={"model": "a model"})


@pytest.fixture(scope="module")
def sealed(null, tmp_path_factory):
    """Return a null model and a policy as files."""
    folder = tmp_path_factory.mktemp("sealed")
    null.save(folder / "null")
    config = RoutingConfig(alpha=0.4, max_k=4)
    Policy(config, "0" * 64, 2, 8, 2, null_model=null, model="a model").save(folder / "policy")
    return {NullModel: folder / "null", Policy: folder / "policy"}


def unsealed(file):
    """Return tensors, the key of the header, and the header, as in a file without a checksum."""
    with safe_open(file, framework="numpy") as opened:
        ((key, header),) = [each for each in opened.metadata().items() if each[0] != "sha256"]
    return load_file(file), key, header


@pytest.mark.parametrize("kind", [NullModel, Policy])
@bounded
@given(data=st.data())
def test_headers(sealed, tmp_path, kind, data):
    tensors, key, header = unsealed(sealed[kind])
    text = data.draw(damaged(json.loads(header))).decode("utf-8", "replace")
    save_file(tensors, tmp_path / "file", metadata={key: text})
    with suppress(BHError), one_sentence():
        kind.load(tmp_path / "file")


ARRAYS = st.sampled_from(
    [
        np.zeros(0),
        np.zeros(1),
        np.zeros((2, 0)),
        np.zeros((0, 4)),
        np.zeros((2, 2, 2)),
        np.full(N, np.nan),
        np.arange(N),
        np.arange(float(N)),
        np.arange(float(N), dtype=np.float32),
        np.linspace(0, 1, N),
        np.linspace(-0.9, 0.9, N) * 1.79e308,
        np.zeros(N, dtype=bool),
    ]
)


@pytest.mark.parametrize("kind", [NullModel, Policy])
@bounded
@given(data=st.data())
def test_tensors(sealed, tmp_path, kind, data):
    tensors, key, header = unsealed(sealed[kind])
    names = data.draw(st.lists(st.sampled_from([*sorted(tensors), "norms", "layer.2.x"])))
    changed = tensors | {name: data.draw(ARRAYS) for name in names}
    for name in data.draw(st.lists(st.sampled_from(sorted(changed)), max_size=1)):
        del changed[name]
    save_file(changed, tmp_path / "file", metadata={key: header})
    with suppress(BHError), one_sentence():
        kind.load(tmp_path / "file")


CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=3
)


def overwritten(content, changes):
    content = bytearray(content)
    for place, some in changes:
        start = int(place * len(content))
        content[start : start + len(some)] = some
    return bytes(content)


@pytest.mark.parametrize("kind", [NullModel, Policy])
@bounded
@given(changes=CHANGES)
def test_bytes_of_sealed_files(sealed, tmp_path, kind, changes):
    whole = sealed[kind].read_bytes()
    content = overwritten(whole, changes)
    (tmp_path / "file").write_bytes(content)
    try:
        with one_sentence():
            kind.load(tmp_path / "file")
    except BHError:
        assert content != whole
    else:
        assert content == whole


@bounded
@given(changes=CHANGES)
def test_pickles(null, tmp_path, changes):
    x, cdf = null.tables[0]
    content = pickle.dumps({"x": np.array(x), "cdf": np.array(cdf)})
    (tmp_path / "distribution_model_layer_0.pkl").write_bytes(overwritten(content, changes))
    with suppress(BHError), one_sentence():
        NullModel.from_pickles(tmp_path)


# Tables and settings


@bounded
@given(
    content=st.binary(max_size=60)
    | st.text(alphabet="a,\n\r\"'0.-einfNA;\t", max_size=120).map(str.encode)
)
def test_any_table(tmp_path, content):
    file = tmp_path / "file.csv"
    file.write_bytes(content)
    with suppress(BHError), one_sentence():
        read_table(file)


@bounded
@given(
    content=st.binary(max_size=80)
    | st.text(alphabet="ab:[]{}&*!|>-? \n\t'\"#%,0.", max_size=80).map(lambda t: t.encode())
)
def test_any_settings(tmp_path, content):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(content)
    with suppress(BHError), one_sentence():
        read_settings(file)
