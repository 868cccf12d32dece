"""What a report is made of: runs, measured here and now, and tables that `compute` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from analyze import tables
from analyze.axes import Values
from analyze.cache import Where
from analyze.columns import texts
from analyze.repeats import place_name, without_repeats
from analyze.verdict_groups import grouping_of
from capture.store.errors import InputError, UsageError
from capture.store.objects import ObjectPath
from capture.store.place import place_of
from capture.store.reader import open_run

if TYPE_CHECKING:
    from analyze.schedulers import Cluster

# What runs are measured against where no table says it.
REFERENCE = "final"

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


def read_inputs(
    inputs: Sequence[str],
    *,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> Measured:
    """Read tables, and measure runs against `REFERENCE` as a whole and by layer.

    What is given twice, by another name of the same place perhaps, counts once. `InputError` for
    what is neither a run nor a table, or holds no rows; scheduler, workers and cache are those of
    `analyze.tables.measure_run`.
    """
    if not inputs:
        raise UsageError("nothing to report on", fix="give runs or tables of `analyze compute`")
    once = without_repeats(inputs)
    runs = runs_among(once)
    measure = partial(
        tables.measure_run,
        references=[REFERENCE],
        by=["model", "layer"],
        scheduler=scheduler,
        workers=workers,
        cache=cache,
    )
    read = [
        part
        for text in once
        for part in (measure(text).values() if text in runs else [_read_table(text)])
    ]
    read = _by_one_name(read)
    momenta = {place_name(text): _momenta(text) for text in runs}
    table = _without_repeats(tables.concatenate(read)) if len(read) > 1 else read[0]
    metadata = tables.read_metadata(table)
    return Measured(
        table=table,
        runs={
            entry["run"]: {"momentum": momenta.get(place_name(entry["run"]))} | entry
            for entry in metadata["runs"]
        },
        nulls=metadata["null"],
        version=str(metadata["version"]),
        grouping=grouping_of(metadata["by"]),
    )


def runs_among(inputs: Sequence[str]) -> list[str]:
    """Those of the inputs that are folders, and so not tables; each place once."""
    return [text for text in without_repeats(inputs) if place_of(text).is_dir()]


def _read_table(text: str) -> pa.Table:
    path = place_of(text)
    if isinstance(path, ObjectPath) or not path.exists():
        fix = "give a run (.zarr), or a table that `analyze compute` wrote"
        raise InputError("no such run or table", where=path, fix=fix)
    table = tables.read_table(path)
    if not table.num_rows:
        raise InputError("the table has no rows", where=path, fix="make it again from the run")
    return table


def _momenta(path: str) -> Values | None:
    run = open_run(path)
    return run.scalar(_MOMENTUM) if _MOMENTUM in run.scalar_names() else None


def _by_one_name(parts: Sequence[pa.Table]) -> list[pa.Table]:
    """Give each place one name in all tables: that of the first that has it."""
    named = [entry["run"] for part in parts for entry in tables.read_metadata(part)["runs"]]
    first: dict[str, str] = {}
    names = {name: first.setdefault(place_name(name), name) for name in named}
    if all(name == chosen for name, chosen in names.items()):
        return list(parts)
    return [_renamed(part, names) for part in parts]


def _renamed(table: pa.Table, names: Mapping[str, str]) -> pa.Table:
    """Call the runs of a table by other names, in its rows and in its facts."""
    metadata = tables.read_metadata(table)
    for entry in metadata["runs"]:
        entry["run"] = names[entry["run"]]
    for key in ("null", "branched"):  # by run and reference
        metadata[key] = {
            f"{names[run]}|{text.removeprefix(f'{run}|')}": value
            for text, value in metadata.get(key, {}).items()
            for run in names
            if text.startswith(f"{run}|")
        }
    called = table["run"].combine_chunks().dictionary_encode()
    chosen = [names[name] for name in called.dictionary.to_pylist()]
    column = texts(chosen, called.indices.to_numpy())
    place = table.schema.get_field_index("run")
    renamed = table.set_column(place, table.schema.field("run"), column)
    return renamed.replace_schema_metadata(tables.encode_metadata(metadata))


def _without_repeats(table: pa.Table) -> pa.Table:
    """Each row once: a run and its own table may both be given."""
    keys = zip(*(table.column(name).to_pylist() for name in _IDENTITY), strict=True)
    first: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    if len(first) == table.num_rows:
        return table
    return table.take(np.fromiter(first.values(), np.int64))
