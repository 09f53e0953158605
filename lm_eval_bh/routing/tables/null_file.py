"""The file of a null model: safetensors, with the header as JSON in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.sealed_file import broken_seal, write_sealed
from lm_eval_bh.routing.tables.null_header import COPY_AGAIN, NullHeader

METADATA_KEY = "lm_eval_bh_null"
AFFINE = "affine"  # a policy's table beside its null model

Tables = tuple[tuple[NDArray[Any], NDArray[Any]], ...]
Measured = Mapping[str, NDArray[Any]]


def write(
    path: Path | str,
    tables: Tables,
    header: NullHeader,
    factors: NDArray[Any] | None,
    measured: Measured,
) -> None:
    """Write ``layer.<i>.x`` and ``layer.<i>.cdf``, factors and tables if any, and the header.

    The file is written completely or not at all.

    Raises
    ------
    NullModelError
        If the file cannot be written.
    """
    tensors = tensors_of(tables, header, factors, measured)
    try:
        write_sealed(tensors, path, {METADATA_KEY: header.to_json()})
    except (OSError, SafetensorError) as error:
        raise NullModelError(
            f"The null model cannot be written to {path}: {error}; free space or give another path."
        ) from error


def tensors_of(
    tables: Tables, header: NullHeader, factors: NDArray[Any] | None, measured: Measured
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file by name."""
    tensors: dict[str, NDArray[Any]] = {}
    for layer, (x, cdf) in enumerate(tables):
        tensors |= {f"layer.{layer}.x": x, f"layer.{layer}.cdf": cdf}
    if factors is not None:
        tensors[STATISTICS[header.statistic].table] = factors
    return tensors | {f"table.{name}": table for name, table in measured.items()}


def read_tensors(
    file: Any, header: str
) -> tuple[Tables, NullHeader, NDArray[Any] | None, Measured]:
    """Read a null model from an open file, with its header as JSON.

    Raises
    ------
    NullModelError
        If header and arrays disagree; its message is half a sentence.
    """
    parsed = NullHeader.from_json(header)
    name = STATISTICS[parsed.statistic].table
    factors = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
    measured = {name: file.get_tensor(f"table.{name}") for name in parsed.tables}
    others = (factors is not None) + len(measured) + (AFFINE in file.keys())  # noqa: SIM118
    if len(file.keys()) - others != 2 * parsed.num_layers:
        raise NullModelError(
            f"its header says {parsed.num_layers} layers, but it has "
            f"{len(file.keys())} arrays; {COPY_AGAIN}"
        )
    tables = tuple(
        (file.get_tensor(f"layer.{layer}.x"), file.get_tensor(f"layer.{layer}.cdf"))
        for layer in range(parsed.num_layers)
    )
    return tables, parsed, factors, measured


def affine_of(file: Any) -> NDArray[Any] | None:
    """Return the affine table of a policy's open file, if it has one."""
    found: NDArray[Any] | None = file.get_tensor(AFFINE) if AFFINE in file.keys() else None  # noqa: SIM118
    return found


def read(path: Path) -> tuple[Tables, NullHeader, NDArray[Any] | None, Measured]:
    """Read a written file; the caller checks that the tables are CDFs.

    Raises
    ------
    NullModelError
        If the file is missing, damaged, foreign, inconsistent, or of a later format version.
    """
    if path.is_dir():
        raise NullModelError(
            f"{path} is a folder, not a null model; import pickles with NullModel.from_pickles."
        )
    if path.exists() and not path.is_file():  # a pipe would block
        raise NullModelError(f"{path} is not a file; give a null model file.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise NullModelError(
                    f"its metadata have no {METADATA_KEY!r}, so it is not a null model; give one"
                )
            if fault := broken_seal(path, metadata, METADATA_KEY):
                raise NullModelError(f"{fault}; {COPY_AGAIN}")
            return read_tensors(file, metadata[METADATA_KEY])
    except FileNotFoundError as error:
        raise NullModelError(
            f"There is no null model {path}; check the path, or calibrate one."
        ) from error
    except NullModelError as error:
        raise NullModelError(f"The null model {path} could not be read: {error}.") from error
    except (AttributeError, SafetensorError, OSError, TypeError) as error:  # foreign dtypes too
        raise NullModelError(
            f"The null model {path} could not be read: {str(error).rstrip('.')}; {COPY_AGAIN}."
        ) from error
