"""The facts in the metadata of a table: what they must look like for a file to be read as ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

_TEXTS = ("version", "by", "sign")
# Facts of a run that may be unknown, by the type they have where they are known.
_OPTIONAL: Mapping[str, type] = {
    "final_step": int,
    "optimizer": dict,
    "config": dict,
    "seeds": dict,
    "versions": dict,
    "data": dict,
    "schedules": dict,
    "parent": dict,
    "git_commit": str,
    "weight_decay": str,
    "adam_metric": str,
}


def printable(text: str) -> str:
    r"""Write bytes of a path that are no UTF-8 as ``\xff``; tables hold nothing but text."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def flaw(table: pa.Table, expected: pa.Schema, document: Any, version: int) -> str | None:
    """Say in words what keeps a table and its facts from being ours; `None` where nothing does."""
    if not isinstance(document, dict) or document.get("table") != version:
        return "it is of another version"
    if table.column_names != expected.names:
        return "its columns are others"
    for field in expected:
        column = table[field.name]
        if column.type != field.type or (column.null_count and not field.nullable):
            return f"its column {field.name!r} is of another kind"
    if not all(isinstance(document.get(name), str) for name in _TEXTS):
        return "its facts are damaged"
    runs = document.get("runs")
    if not isinstance(runs, list) or not all(_is_run(entry) for entry in runs):
        return "its facts of the runs are damaged"
    if not {entry["run"] for entry in runs} >= set(table["run"].unique().to_pylist()):
        return "a run is missing in its facts"
    for name, kind in (("null", str), ("nan", int), ("branched", int)):
        values = document.get(name, {} if name == "branched" else None)
        if not isinstance(values, dict) or not all(isinstance(v, kind) for v in values.values()):
            return f"its facts {name!r} are damaged"
    return None


def _is_run(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("run"), str)
        and isinstance(entry.get("status"), str)
        and isinstance(entry.get("num_parameters"), int)
        and all(isinstance(entry.get(name), kind | None) for name, kind in _OPTIONAL.items())
    )
