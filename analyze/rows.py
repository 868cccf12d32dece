"""Rows of a table: chosen by their columns, or those of the whole model.

Without pandas, which Arrow would load to make a column of a list, or to compare with a plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analyze.columns import numbers, words


def select_rows(table: pa.Table, **wanted: str) -> pa.Table:
    """Keep the rows whose columns have the values `wanted`."""
    for name, value in wanted.items():
        table = table.filter(_equal(table, name, value))
    return table


def whole_model(table: pa.Table, sizes: Mapping[str, int]) -> pa.Table:
    """Keep the rows of whole models; `sizes` is D by run. A layer may be called `model` too."""
    return table.filter(_is_whole(table, sizes))


def parts_of_models(table: pa.Table, sizes: Mapping[str, int]) -> pa.Table:
    """Keep the rows of all but whole models; `sizes` is D of each run that there is."""
    return table.filter(pc.invert(_is_whole(table, sizes)))


def sizes_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return D by run, from the facts of the runs in a table's metadata."""
    return {str(entry["run"]): int(entry["num_parameters"]) for entry in runs}


def _equal(table: pa.Table, name: str, value: str) -> pa.ChunkedArray:
    return pc.equal(table[name], words([value])[0])


def _is_whole(table: pa.Table, sizes: Mapping[str, int]) -> pa.ChunkedArray:
    """Which rows are of whole models."""
    whole = pc.index_in(table["run"], value_set=words(list(sizes)))
    size = numbers(np.array([*sizes.values()], np.int64)).take(whole)
    return pc.and_(_equal(table, "group", "model"), pc.equal(table["num_parameters"], size))
