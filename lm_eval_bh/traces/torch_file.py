"""Reads tensors and plain values from a ``torch.save`` file without executing anything.

The file is a zip archive of a pickle and the tensors' bytes. The pickle states a tensor's sizes
and strides, and :func:`torch.load` allocates memory for them before it looks at the bytes, so a
file of a kilobyte can demand terabytes. Here a tensor stays a description until it is used, and
its sizes are checked against the bytes that exist.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_bh.errors import DataError
from lm_eval_bh.traces.integers import Ints

# torch's names of integer storages and dtypes.
INTEGERS = {"Byte": "u1", "Char": "i1", "Short": "i2", "Int": "i4", "Long": "i8"}
DTYPES = {"uint8": "u1", "int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8"}
DTYPES |= {"uint16": "u2", "uint32": "u4", "uint64": "u8"}
MOST_SIZES = 17  # an offset, and eight dimensions with their strides
_TENSORS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A pickle's description of a tensor, or of another object that torch would rebuild.

    Attributes
    ----------
    kind : str
        What it is, for messages; "" for a plain tensor of integers.
    """

    kind: str
    archive: _Archive
    key: str = ""
    dtype: str = ""
    offset: int = 0
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    def integers(self) -> Ints:
        """Return the numbers as int64.

        Raises
        ------
        ValueError
            If it is not a plain tensor of integers, or is larger than the file.
        """
        if self.kind:
            raise ValueError(f"found {self.kind} where a tensor of integers is expected")
        sizes = (self.offset, *self.size, *self.stride)
        plain = all(type(n) is int and n >= 0 for n in sizes) and len(sizes) <= MOST_SIZES
        if len(self.size) != len(self.stride) or not plain:
            raise ValueError("found a tensor with invalid sizes")
        numbers = 1
        for length in self.size:
            numbers *= length
        if not numbers and self.size[:1] != (0,):
            raise ValueError(f"found a tensor of {list(self.size)}, which is empty")
        if numbers > self.archive.bytes:
            raise ValueError(
                f"found a tensor of {list(self.size)} in a file of {self.archive.bytes} bytes"
            )
        if not numbers:
            return np.zeros(self.size, dtype=np.int64)
        content = np.frombuffer(self.archive.storage(self.key), dtype=np.dtype(f"<{self.dtype}"))
        steps = zip(self.size, self.stride, strict=True)
        last = self.offset + sum((length - 1) * step for length, step in steps)
        if last >= len(content):
            raise ValueError(
                f"found a tensor of {list(self.size)} over {len(content)} numbers of the file"
            )
        width = content.itemsize
        view = np.lib.stride_tricks.as_strided(
            content[self.offset :], self.size, [step * width for step in self.stride]
        )
        return view.astype(np.int64)


class _Archive:
    """The parts of a file: stored uncompressed, so none is larger than the file."""

    def __init__(self, file: Path) -> None:
        self._zip = zipfile.ZipFile(file)
        self.bytes = size = file.stat().st_size
        self._parts: dict[str, zipfile.ZipInfo] = {}
        for part in self._zip.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                raise ValueError("its parts are compressed, which torch.save does not do")
            self._parts[part.filename.partition("/")[2]] = part
        if "byteorder" in self._parts and self.part("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")

    def part(self, name: str) -> bytes:
        return self._zip.read(self._parts[name])

    def storage(self, key: str) -> bytes:
        try:
            return self.part(f"data/{key}")
        except Exception as error:  # a damaged archive can raise anything
            raise ValueError(f"the numbers of a tensor cannot be read: {error}") from error


def read_torch_file(file: Path) -> Any:
    """Return the content of a ``torch.save`` file, with a :class:`Tensor` for each tensor.

    Raises
    ------
    DataError
        If the file is damaged, or would execute code.
    """
    try:
        return _Values(_Archive(file)).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{file} could not be read as tensors and plain values: it is damaged, or would "
            "execute code; record the trace again."
        ) from error


class _Values(pickle.Unpickler):
    """Unpickles plain values; what a pickle would call is described instead."""

    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.part("data.pkl")))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in _TENSORS:
            return self._tensor
        if module.partition(".")[0] != "torch":
            raise pickle.UnpicklingError(f"{module}.{name} would be executed")
        return _Named(self._archive, name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, _ = pid
        return kind.name, str(key)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
        kind, key = storage
        dtype = INTEGERS.get(kind.removesuffix("Storage"), "")
        if kind == "UntypedStorage":  # version 3 of the format names the dtype beside it
            kind = more[2].name
            dtype = DTYPES.get(kind, "")
        what = "" if dtype else f"a tensor of {kind.removesuffix('Storage').lower()}"
        return Tensor(what, self._archive, key, dtype, offset, tuple(size), tuple(stride))


@dataclass(frozen=True, slots=True)
class _Named:
    """A name from torch: a dtype, a kind of storage, or a function that rebuilds tensors."""

    archive: _Archive
    name: str

    def __call__(self, *arguments: Any) -> Tensor:
        what = self.name.strip("_").removeprefix("rebuild_").replace("_", " ")
        return Tensor(f"a {what}", self.archive)
