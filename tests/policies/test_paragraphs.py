"""The documents of a text file, and invalid text files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lm_eval_bh.errors import DataError
from lm_eval_bh.policies.paragraphs import read_paragraphs


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"one\n\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\n\ntwo", ["one", "two"]),
        (b"one\n   \ntwo\n\t\n\n three", ["one", "two", " three"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        (b"one\n\xc2\xa0\ntwo", ["one", "two"]),
        (b"a line\nand another", ["a line\nand another"]),
        (b"\n\n\none\n\n\n\n", ["one"]),
        (b" \n \n", []),
        (b"", []),
    ],
)
def test_paragraphs(content, found, tmp_path):
    (tmp_path / "text").write_bytes(content)
    assert read_paragraphs(tmp_path / "text") == found


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "folder", "none", "latin"])
def test_what_is_no_text_file_is_neither_waited_for_nor_read_for_ever(kind, tmp_path):
    path = tmp_path / "text"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "latin":
        path.write_bytes(b"caf\xe9")
    elif kind != "none":
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"could not be read .*; give a UTF-8 text file"):
        read_paragraphs(Path("/dev/zero") if kind == "device" else path)
