"""Tables of commands other than `compute` among the inputs, read and checked.

A table of `analyze compute`, or a run, is read by `analyze.inputs`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analyze.kinds import WRITERS, facts_in, kind_of
from analyze.repeats import without_repeats
from analyze.tables import concatenate, read_parquet
from analyze.tensor_file import open_regular
from capture.store.errors import InputError, UsageError
from capture.store.objects import ObjectPath
from capture.store.place import place_of


@dataclass(frozen=True)
class Other:
    """A table that is none of `analyze compute`: its `kind` is one of `analyze.kinds.WRITERS`."""

    kind: str
    path: str
    table: pa.Table
    facts: Mapping[str, Any]


def sort_inputs(inputs: Sequence[str]) -> tuple[list[str], list[Other]]:
    """Part runs and tables of `analyze compute` from other tables, which are read here.

    `InputError` for a table of another version, or without rows.
    """
    measured, others = [], []
    for text in without_repeats(inputs):
        kind = _kind(text)
        if kind in (None, "compute"):
            measured.append(text)
        else:
            others.append(_read(text, str(kind)))
    return measured, others


def one_other(inputs: Sequence[str]) -> pa.Table | None:
    """Read tables of one kind that is not `compute` as one; `None` where all others may read them.

    `UsageError` where kinds are mixed, or for several comparisons.
    """
    measured, others = sort_inputs(inputs)
    if not others:
        return None
    kinds = {other.kind for other in others}
    if measured or len(kinds) > 1 or (kinds == {"compare"} and len(others) > 1):
        raise UsageError(
            "these tables do not go into one: " + ", ".join(inputs),
            fix="give tables of one kind, or one comparison, and the others by themselves",
        )
    tables = [other.table for other in others]
    return tables[0] if len(tables) == 1 else concatenate(tables)


def _kind(text: str) -> str | None:
    """The kind of a table in a local file; `None` for anything else, of which others complain."""
    path = place_of(text)
    if isinstance(path, ObjectPath) or not path.is_file():
        return None
    try:
        with os.fdopen(open_regular(path, "table"), "rb") as file:
            return kind_of(pq.read_schema(pa.BufferReader(file.read())))
    except (OSError, pa.ArrowException, InputError, UnicodeDecodeError):
        return None


def _read(text: str, kind: str) -> Other:
    table = read_parquet(place_of(text))
    facts = facts_in(table.schema) or {}
    what = _flaw(table, _schemas()[kind]() if kind != "compare" else None, facts)
    if what is not None:
        raise InputError(
            f"not a table of this version of {WRITERS[kind]}, {what}",
            where=text,
            fix="make it again from the run",
        )
    if not table.num_rows:
        raise InputError("the table has no rows", where=text, fix="make it again from the run")
    return Other(kind, text, table, facts)


def _schemas() -> Mapping[str, Callable[[], pa.Schema]]:
    from analyze.coverage_table import coverage_schema
    from analyze.pair_table import noise_schema, pair_schema
    from analyze.path_table import path_schema

    return {
        "pairs": pair_schema,
        "noise": noise_schema,
        "pca": path_schema,
        "coverage": coverage_schema,
    }


def _flaw(table: pa.Table, expected: pa.Schema | None, facts: Mapping[str, Any]) -> str | None:
    """Say what keeps a table from being read; one of comparisons is checked where it is read."""
    if expected is None:
        return None
    if table.column_names != expected.names:
        return "its columns are others"
    for field in expected:
        if table[field.name].type != field.type:
            return f"its column {field.name!r} is of another kind"
    runs = facts.get("runs")
    known = isinstance(runs, list) and all(isinstance(entry, dict) for entry in runs)
    names = {entry.get("run") for entry in runs} if known and runs else set()
    if not names >= set(table["run"].unique().to_pylist()):
        return "its facts of the runs are damaged"
    return None
