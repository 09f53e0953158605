"""Checks that header, tables and factors of a null model agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.tables import table_checks
from lm_eval_bh.routing.tables.fitting import Table
from lm_eval_bh.routing.tables.null_header import NullHeader


def check(
    tables: tuple[Table, ...],
    header: NullHeader,
    factors: NDArray[Any] | None,
    measured: Mapping[str, NDArray[Any]],
) -> None:
    """Raise a :class:`NullModelError` if a table is not a CDF, or header and tables disagree."""
    _check_factors(header, factors)
    for name in sorted({*measured, *header.tables}):
        found = measured.get(name)
        if name not in header.tables or found is None or found.shape[:1] != (header.num_layers,):
            raise NullModelError(
                f"The null model's table {name!r} is missing, or not one of {header.num_layers} "
                "layers; calibrate again."
            )
        if found.dtype != np.float64 or not np.isfinite(found).all():
            raise NullModelError(
                f"The null model's table {name!r} does not hold float64 numbers; calibrate again."
            )
    if len(tables) != header.num_layers or not tables:
        raise NullModelError(
            f"A null model of {header.num_layers} layers cannot have {len(tables)} "
            "tables; give one per layer."
        )
    for layer, (x, cdf) in enumerate(tables):
        fault = table_checks.fault(x, cdf)
        if fault is None and header.points not in (None, x.shape[-1]):
            fault = f"it has {x.shape[-1]} points, but the header says {header.points}"
        if fault is None and (x.ndim == 2) != (header.null_scope == "expert"):
            fault = f"its shape {x.shape} is not one of null_scope={header.null_scope}"
        if fault:
            raise NullModelError(
                f"The null model's table of layer {layer} is not a CDF: {fault}; calibrate again."
            )


def _check_factors(header: NullHeader, factors: NDArray[Any] | None) -> None:
    row = STATISTICS[header.statistic]
    if (factors is not None) != bool(row.table):
        raise NullModelError(
            f"A null model of the statistic {header.statistic!r} comes "
            f"{'with' if factors is not None else 'without'} factors of its experts; "
            "calibrate again."
        )
    if factors is not None and not (
        factors.ndim == (3 if row.predicts else 2)
        and factors.shape[0] == header.num_layers
        and header.num_experts in (None, factors.shape[-1])
        and bool(np.isfinite(factors).all())
        and bool((factors[:, -1] > 0).all() if row.predicts else (factors > 0).all())
    ):
        raise NullModelError(
            f"The experts' {row.table} of shape {factors.shape} are not positive numbers "
            f"[{header.num_layers} layers, {header.num_experts} experts]; calibrate again."
        )
