"""Reads the earlier prototype's pickled CDF tables without executing anything in a pickle.

A pickle is a program: it names Python objects and calls them. Here the few names that rebuild a
numpy array map to inert records, every other name is refused, and numpy is called afterwards, on
plain bytes. Not even numpy's own functions are within the pickle's reach: object dtypes and forged
dtype states make them read memory out of bounds.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.files import as_path
from lm_eval_bh.routing.tables.table_checks import fault

FILE_NAME = "distribution_model_layer_{}.pkl"


class _DType:
    """Replaces ``numpy.dtype``: keeps the type code, for example "f8", and the byte order."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def resolve(self) -> np.dtype[Any]:
        text = f"{self.order if self.order in ('<', '>') else '='}{self.code}"
        if not re.fullmatch(r"[<>=]f[248]", text):
            raise ValueError(f"an array of type {str(self.code)[:40]!r} where floats are expected")
        return np.dtype(text)


class _Array:
    """Replaces ``numpy.ndarray``, and the function that makes an empty one to fill."""

    def __init__(self, *_: object) -> None:
        self.shape: Any = None
        self.dtype: Any = None
        self.data: Any = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self.shape, self.dtype, _fortran, self.data = state

    def resolve(self) -> NDArray[np.float64]:
        if not (isinstance(self.dtype, _DType) and isinstance(self.data, bytes | bytearray)):
            raise ValueError("an array without data")
        values = np.frombuffer(self.data, self.dtype.resolve()).astype(np.float64)
        if self.shape != (values.size,):
            raise ValueError(
                f"an array of shape {str(self.shape)[:40]} where one dimension is expected"
            )
        return values


class _Buffer(_Array):
    """Replaces the function that makes an array in protocol 5, Python 3.14's default."""

    def __init__(self, data: object, dtype: object, shape: object, _order: object = "C") -> None:
        self.data, self.dtype, self.shape = data, dtype, shape


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Array for core in ("core", "_core")},  # ignored
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Buffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that only knows :data:`_STAND_INS`."""

    def find_class(self, module: str, name: str, /) -> type:
        if (module, name) not in _STAND_INS:
            raise NullModelError(
                f"it uses {module}.{name}, but only numpy arrays are allowed in a table"
            )
        return _STAND_INS[module, name]


def read_table(path: Path | str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read one pickle ``{'x': float[n], 'cdf': float[n]}``; other entries are ignored.

    Returns
    -------
    x, cdf : ndarray, float64 [n]
        As stored; the caller checks that they form a CDF.

    Raises
    ------
    NullModelError
        If the file is missing, damaged, not such a table, or names anything but numpy arrays.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            table = _ArrayUnpickler(file).load()
        if not isinstance(table, dict) or not all(
            isinstance(table.get(k), _Array) for k in ("x", "cdf")
        ):
            raise ValueError("it is not a dictionary with the arrays 'x' and 'cdf'")
        return table["x"].resolve(), table["cdf"].resolve()
    except FileNotFoundError as error:
        raise NullModelError(
            f"The table {path} is missing; copy all layers' tables into one folder."
        ) from error
    except Exception as error:  # damaged pickles can raise anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise NullModelError(
            f"The table {path} could not be read: {reason}; copy it again from a source you trust."
        ) from error


def read_folder(folder: Path | str) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Read ``distribution_model_layer_0.pkl``, ``..._1.pkl`` and so on, in the order of the layers.

    Raises
    ------
    NullModelError
        If the folder is missing or holds no tables, a layer is missing in between, or a table
        cannot be read or is not a CDF.
    """
    folder = as_path(folder)
    if not folder.is_dir():
        raise NullModelError(
            f"There is no folder {folder}; give the folder that holds {FILE_NAME.format('<i>')}."
        )
    pattern = re.compile(re.escape(FILE_NAME).replace(r"\{\}", r"(0|[1-9]\d*)"))
    layers = sorted(int(m[1]) for p in folder.iterdir() if (m := pattern.fullmatch(p.name)))
    if not layers:
        raise NullModelError(
            f"The folder {folder} holds no {FILE_NAME.format('<i>')}; give the tables' folder."
        )
    for expected, layer in enumerate(layers):
        if layer != expected:
            raise NullModelError(
                f"The folder {folder} has a table for layer {layer} but none for layer {expected}; "
                "copy the missing tables too."
            )
    tables = [read_table(folder / FILE_NAME.format(layer)) for layer in layers]
    for layer, (x, cdf) in enumerate(tables):
        if reason := fault(x, cdf):
            raise NullModelError(
                f"The table {folder / FILE_NAME.format(layer)} is not a CDF: {reason}; copy it "
                "again from a source you trust."
            )
    return tables
