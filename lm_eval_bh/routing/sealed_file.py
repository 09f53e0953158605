"""Safetensors files with a checksum of every one of their bytes.

The checksum stands in the file's own metadata: it is the SHA-256 of the file with zeros in its
place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from lm_eval_bh.files import replacing

CHECKSUM = "sha256"
_BLANK = "0" * 64


def write_sealed(tensors: dict[str, Any], path: Path | str, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum; ``path`` never holds half of it.

    Raises
    ------
    OSError, SafetensorError
        If it cannot be written.
    """
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, CHECKSUM: _BLANK})
        content = temporary.read_bytes()
        place = _field(_BLANK)
        assert content.count(place) == 1  # inside of other values quotes are escaped
        seal = _field(hashlib.sha256(content).hexdigest())
        temporary.write_bytes(content.replace(place, seal, 1))


def broken_seal(path: Path, metadata: Mapping[str, str], key: str) -> str | None:
    """Say in a few words why a file is not as it was written, or return None.

    A file of the first release has no checksum, and passes.

    Parameters
    ----------
    path : Path
        A safetensors file.
    metadata : mapping
        Its metadata.
    key : str
        The one key that they have beside the checksum.
    """
    if metadata.keys() - {key, CHECKSUM}:
        return "its metadata have more than was written"
    if CHECKSUM not in metadata:
        return None
    content = path.read_bytes().replace(_field(metadata[CHECKSUM]), _field(_BLANK), 1)
    if hashlib.sha256(content).hexdigest() != metadata[CHECKSUM]:
        return "its checksum differs"
    return None


def _field(checksum: str) -> bytes:
    """Return how the checksum stands in the file."""
    return f'"{CHECKSUM}":"{checksum}"'.encode()
