"""Our files have checksums of all bytes: no damaged copy is accepted."""

from __future__ import annotations

import random

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lm_eval_bh import NullModel, Policy, RoutingConfig
from lm_eval_bh.errors import NullModelError, PolicyError

COPIES = 300


@pytest.fixture(scope="module")
def null():
    rng = np.random.default_rng(0)
    draws = {layer: rng.normal(size=(64, 8)) for layer in range(2)}
    return NullModel.fit(draws, points=64, header={"model": "a model", "text": "a text"})


def a_policy(null):
    return Policy(
        RoutingConfig(alpha=0.4, max_k=4), "0" * 64, 2, 8, 2, null_model=null, model="a model"
    )


def damaged(content, rng):
    """Change, add, remove, swap or cut something."""
    at = rng.randrange(len(content))
    end = min(at + rng.randint(1, 16), len(content))
    return rng.choice(
        [
            lambda: (
                content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
            ),
            lambda: content[:at] + rng.randbytes(end - at) + content[end:],
            lambda: content[:at] + content[end:],
            lambda: content[:at] + rng.randbytes(1) + content[at:],
            lambda: content[:at],
            lambda: content + rng.randbytes(4),
            lambda: content[:at] + bytes(end - at) + content[end:],
            lambda: content[:at] + content[at:end][::-1] + content[end:],
        ]
    )()


@pytest.mark.parametrize(
    ("make", "kind", "error"),
    [(lambda null: null, NullModel, NullModelError), (a_policy, Policy, PolicyError)],
)
def test_300_of_300_corrupted_copies_are_refused(null, tmp_path, make, kind, error):
    path = tmp_path / "file.safetensors"
    make(null).save(path)
    whole = path.read_bytes()
    assert kind.load(path).digest() == make(null).digest()
    rng = random.Random(0)
    refused = tried = 0
    while tried < COPIES:
        content = damaged(whole, rng)
        if content == whole:
            continue
        tried += 1
        path.write_bytes(content)
        with pytest.raises(error) as raised:
            kind.load(path)
        assert "\n" not in str(raised.value)
        refused += 1
    assert refused == COPIES


def test_every_bit_of_the_header_counts(null, tmp_path):
    path = tmp_path / "file.safetensors"
    null.save(path)
    whole = path.read_bytes()
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(NullModelError):
            NullModel.load(path)


def test_what_somebody_adds_to_the_metadata_is_refused(null, tmp_path):
    """Otherwise a file with a damaged checksum key would pass as one of the first release."""
    path = tmp_path / "file.safetensors"
    null.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    metadata["sha255"] = metadata.pop("sha256")
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(NullModelError, match="more keys than were written"):
        NullModel.load(path)
