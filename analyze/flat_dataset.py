"""Tables of other kinds as labelled arrays: a row is a row, and each column a variable.

What `analyze compute` writes has axes, see `analyze.dataset`; pairs of steps, components and
comparisons are lists.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr
from numpy.typing import NDArray

from analyze.dataset import FACTS, to_tree
from analyze.kinds import METADATA_KEY, kind_of

ROW = "row"
_TOLD = {"units": b"unit", "formula": b"formula", "meaning": b"meaning"}


def tree_of(table: pa.Table) -> xr.DataTree:
    """Turn a table of any kind into a tree: that of `to_tree`, or one of rows."""
    return to_tree(table) if kind_of(table.schema) in (None, "compute") else rows_tree(table)


def rows_tree(table: pa.Table) -> xr.DataTree:
    """Turn a table of pairs, noise, components or a comparison into a tree.

    It has a Dataset for each stream, or where there are none one named by the kind of the table,
    with a variable ``(row)`` for each column, its `units` and `formula` or `meaning`. Numbers that
    are not known are NaN, also whole ones, which become float64 then; a column without any value
    is left out. The attribute `straightway_table` holds the facts of the table as JSON.
    """
    facts = (table.schema.metadata or {})[METADATA_KEY].decode()
    kind = str(kind_of(table.schema))
    parts = {kind: table}
    if "stream" in table.column_names and kind != "compare":
        names = table["stream"].unique().to_pylist()
        parts = {name: table.filter(pc.equal(table["stream"], name)) for name in names}
    datasets = {
        name: xr.Dataset(
            {
                column: (ROW, _values(rows[column]), _told(rows, column))
                for column in rows.column_names
                if rows[column].null_count < rows.num_rows
            },
            attrs={"kind": kind, FACTS: facts},
        )
        for name, rows in parts.items()
    }
    root = xr.Dataset(attrs={"kind": kind, FACTS: facts})
    return xr.DataTree.from_dict({"/": root, **{f"/{name}": d for name, d in datasets.items()}})


def _values(column: pa.ChunkedArray) -> NDArray[Any]:
    if pa.types.is_string(column.type):
        return np.array(pc.fill_null(column, "").to_pylist(), object)
    return np.asarray(column.to_numpy())


def _told(rows: pa.Table, name: str) -> dict[str, str]:
    told = rows.schema.field(name).metadata or {}
    return {key: told[own].decode() for key, own in _TOLD.items() if told.get(own)}
