"""Makes integer arrays from files, never larger than the bytes that the files hold."""

from __future__ import annotations

import io
import math
from itertools import chain
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.validation import LARGEST, shown

Ints = NDArray[np.int64]


def of_lists(value: Any, depth: int) -> Ints:
    """Return nested lists of integers as an int64 array of ``depth`` dimensions.

    NumPy alone would also accept text and truth values, and would give each of a million short
    texts the space of the longest.

    Raises
    ------
    ValueError
        If the lists are ragged, or hold anything but 64-bit integers.
    """
    level, shape = [value], list[int]()
    for _ in range(depth):
        for one in level:
            if not isinstance(one, list):
                raise ValueError(f"found {shown(one)} where a list is expected")
        lengths = set(map(len, level))
        if len(lengths) > 1:
            raise ValueError(f"lists of {min(lengths)} to {max(lengths)} elements are not an array")
        shape.append(lengths.pop() if lengths else 0)
        level = list(chain.from_iterable(level))
    kinds = set(map(type, level))
    if not kinds <= {int}:
        wrong = next(one for one in level if type(one) is not int)
        raise ValueError(f"they must be integers, not {shown(wrong)}")
    if level and max(max(level), -min(level)) > LARGEST:
        raise ValueError(f"they must be 64-bit integers, not {shown(max(level, key=abs))}")
    return np.array(level, dtype=np.int64).reshape(shape)


def of_numpy_file(content: bytes) -> NDArray[Any]:
    """Return the array of a NumPy file, whose header is checked against the bytes present.

    Raises
    ------
    ValueError
        If the content is not a NumPy file, is truncated, or holds objects.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"NumPy format {version}")
    read = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        read = np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except (SyntaxError, TokenError, MemoryError, RecursionError) as error:  # Python's
        raise ValueError("its header cannot be read") from error
    left = len(content) - stream.tell()
    # Any number of rows would fit in an array without elements.
    empty = not math.prod(shape) and shape[:1] != (0,)
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != left or empty:
        raise ValueError(f"{dtype} {list(shape)} in {left} bytes")
    found = np.frombuffer(content, dtype, offset=stream.tell())
    return found.reshape(shape, order="F" if fortran else "C")
