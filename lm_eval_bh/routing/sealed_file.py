"""Safetensors files with a checksum of all their bytes.

The checksum is in the file's own metadata: it is the SHA-256 of the file with zeros in place of the
checksum.
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
    """Write a safetensors file with a checksum, completely or not at all.

    Raises
    ------
    OSError, SafetensorError
        If the file cannot be written.
    """
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, CHECKSUM: _BLANK})
        content = temporary.read_bytes()
        place = _field(_BLANK)
        assert content.count(place) == 1  # within other values, quotes are escaped
        seal = _field(hashlib.sha256(content).hexdigest())
        temporary.write_bytes(content.replace(place, seal, 1))


def broken_seal(path: Path, metadata: Mapping[str, str], key: str) -> str | None:
    """Return in a few words why a file differs from what was written, or None.

    Files of the first release have no checksum, and pass.

    Parameters
    ----------
    path : Path
        A safetensors file.
    metadata : mapping
        Its metadata.
    key : str
        The only key besides the checksum.
    """
    if metadata.keys() - {key, CHECKSUM}:
        return "its metadata have more keys than were written"
    if CHECKSUM not in metadata:
        return None
    content = path.read_bytes().replace(_field(metadata[CHECKSUM]), _field(_BLANK), 1)
    if hashlib.sha256(content).hexdigest() != metadata[CHECKSUM]:
        return "its checksum differs"
    return None


def _field(checksum: str) -> bytes:
    """Return the checksum as written in the file."""
    return f'"{CHECKSUM}":"{checksum}"'.encode()
