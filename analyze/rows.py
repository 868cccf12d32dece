"""Rows of a table: chosen by their columns, or those of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def select_rows(table: pa.Table, **wanted: str) -> pa.Table:
    """Keep the rows whose columns have the values `wanted`."""
    for name, value in wanted.items():
        table = table.filter(pc.equal(table[name], value))
    return table


def whole_model(table: pa.Table, sizes: Mapping[str, int]) -> pa.Table:
    """Keep the rows of whole models; `sizes` is D by run. A layer may be called `model` too."""
    whole = pa.array([sizes.get(run, -1) for run in table["run"].to_pylist()], pa.int64())
    named = pc.equal(table["group"], "model")
    return table.filter(pc.and_(named, pc.equal(table["num_parameters"], whole)))


def sizes_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return D by run, from the facts of the runs in a table's metadata."""
    return {str(entry["run"]): int(entry["num_parameters"]) for entry in runs}
