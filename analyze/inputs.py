"""What a report is made of: runs, measured here and now, and tables that `compute` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from analyze import tables
from analyze.axes import Values
from analyze.verdict_groups import grouping_of
from capture.store.errors import InputError, UsageError
from capture.store.objects import ObjectPath
from capture.store.place import place_of
from capture.store.reader import open_run

_MOMENTUM = "group_momentum"
_IDENTITY = ("run", "stream", "step", "batch", "group", "reference", "num_parameters")


@dataclass(frozen=True)
class Measured:
    """The rows of all inputs, and what is known of their runs.

    `runs` maps a run, as typed, to its facts; `nulls` maps `run|reference` to what the null rests
    on, or to why there is none. `grouping` is what the groups of the rows are, beside the model.
    """

    table: pa.Table
    runs: Mapping[str, Mapping[str, Any]]
    nulls: Mapping[str, str]
    version: str
    grouping: str


def read_inputs(inputs: Sequence[str]) -> Measured:
    """Read tables, and measure runs against `final` as a whole and by layer.

    `InputError` for what is neither a run nor a table, or holds no rows.
    """
    if not inputs:
        raise UsageError("nothing to report on", fix="give runs or tables of `analyze compute`")
    texts = list(dict.fromkeys(inputs))
    read = [part for text in texts for part in _read(text)]
    momenta = {text: _momenta(text) for text in texts if place_of(text).is_dir()}
    table = _without_repeats(tables.concatenate(read)) if len(read) > 1 else read[0]
    metadata = tables.read_metadata(table)
    return Measured(
        table=table,
        runs={
            entry["run"]: {"momentum": momenta.get(entry["run"])} | entry
            for entry in metadata["runs"]
        },
        nulls=metadata["null"],
        version=str(metadata["version"]),
        grouping=grouping_of(metadata["by"]),
    )


def _read(text: str) -> list[pa.Table]:
    path = place_of(text)
    if path.is_dir():
        return _measure(text)
    if isinstance(path, ObjectPath) or not path.exists():
        fix = "give a run (.zarr), or a table that `analyze compute` wrote"
        raise InputError("no such run or table", where=path, fix=fix)
    table = tables.read_table(path)
    if not table.num_rows:
        raise InputError("the table has no rows", where=path, fix="make it again from the run")
    return [table]


def _momenta(path: str) -> Values | None:
    run = open_run(path)
    return run.scalar(_MOMENTUM) if _MOMENTUM in run.scalar_names() else None


def _measure(text: str) -> list[pa.Table]:
    measured = tables.measure_run(text, ["final"], by=["model", "layer"])
    return [measured["model"], measured["layer"]]


def _without_repeats(table: pa.Table) -> pa.Table:
    """Each row once: a run and its own table may both be given."""
    keys = zip(*(table.column(name).to_pylist() for name in _IDENTITY), strict=True)
    first: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    if len(first) == table.num_rows:
        return table
    return table.take(np.fromiter(first.values(), np.int64))
