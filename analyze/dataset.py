"""Tables as labelled arrays: one xarray Dataset for each stream, a tree of them for a table; back.

Axes: run, step, batch (in streams that have batches), group of tensors, reference. Every stream
has steps of its own, so each is a Dataset of its own. No number is lost either way.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr
from numpy.typing import NDArray

from analyze.columns import schema
from analyze.tables import METADATA_KEY, read_metadata
from capture.store.errors import InputError, UnknownNameError, UsageError

AXES = ("run", "step", "batch", "group", "reference")
# The attribute with the table's own metadata, as JSON.
FACTS = "straightway_table"
MEASURED = "measured"

# What does not depend on every axis. A table in which it does after all keeps them.
_FEWER_AXES: Mapping[str, tuple[str, ...]] = {
    "epoch": ("run", "step"),
    "num_parameters": ("run", "group"),
    "lr": ("run", "step"),
    "clip_factor": ("run", "step"),
    "loss": ("run", "step", "batch"),
}
_COORDINATES = ("epoch", "num_parameters")
_ONE_BY_ONE = "make one table for each with `analyze compute`"

Array = NDArray[Any]


def to_dataset(table: pa.Table, stream: str | None = None) -> xr.Dataset:
    """Turn one stream of a table into a Dataset ``(run, step[, batch], group, reference)``.

    `stream` may be left out where the table has one only. Every column is a variable, with `units`
    and `formula`; `epoch` ``(run, step)`` and `num_parameters` ``(run, group)`` are coordinates,
    and lr, clip factor and loss have no axis that they do not depend on. `measured`, bool, says
    where the table has a row: elsewhere, as where runs have other steps, floats are NaN and whole
    numbers 0. The attribute `straightway_table` holds the facts of the runs as JSON.

    `UnknownNameError` where there is no such stream, `UsageError` where one must be chosen,
    `InputError` where a row stands twice or only some runs have batches.
    """
    names = _streams(table)
    if stream is None and len(names) > 1:
        raise UsageError(
            f"the table has several streams, {', '.join(names)}",
            fix="choose one, or take all with to_tree",
        )
    chosen = names[0] if stream is None else stream
    if chosen not in names:
        what = f"the table has no stream {chosen!r}"
        raise UnknownNameError(what, fix=f"it has {', '.join(names)}")
    rows = table.filter(pc.equal(table["stream"], chosen))
    axes, labels, places = _locate(rows, chosen)
    data = xr.Dataset(coords={axis: (axis, labels[axis], _told(rows, axis)) for axis in axes})
    for field in rows.schema:
        if field.name not in AXES and field.name != "stream":
            values = _values(rows[field.name])
            used, array = _spread(values, field.name, axes, labels, places)
            data[field.name] = (used, array, _told(rows, field.name))
    _, measured = _spread(np.ones(rows.num_rows, bool), MEASURED, axes, labels, places)
    data[MEASURED] = (axes, measured, {"formula": "whether the table has this row"})
    metadata = read_metadata(table)
    told = {key: metadata[key] for key in ("by", "sign")}
    data.attrs = {"stream": chosen, **told, FACTS: _facts(table)}
    return data.set_coords([name for name in _COORDINATES if name in data])


def to_tree(table: pa.Table) -> xr.DataTree:
    """Turn a table into a tree with a Dataset of `to_dataset` for each stream."""
    datasets = {name: to_dataset(table, name) for name in _streams(table)}
    root = xr.Dataset(attrs={FACTS: _facts(table)})
    return xr.DataTree.from_dict({"/": root, **{f"/{name}": d for name, d in datasets.items()}})


def to_table(data: xr.Dataset | xr.DataTree) -> pa.Table:
    """Turn what `to_dataset` or `to_tree` gave back into a table, in the order of a table's rows.

    Also a selection of it, by label or by position. `InputError` for anything else.
    """
    if isinstance(data, xr.DataTree):
        datasets = [child.to_dataset() for child in data.children.values()]
    else:
        datasets = [data]
    if not datasets:
        raise InputError("the tree has no streams", fix="give what to_tree gave")
    parts = [_rows(dataset) for dataset in datasets]
    whole = pa.concat_tables(parts)
    # By run first, which is the order of every table.
    runs = whole["run"].unique().to_pylist()
    ordered = [part.filter(pc.equal(part["run"], run)) for run in runs for part in parts]
    facts = {METADATA_KEY: datasets[0].attrs[FACTS].encode("utf-8", "backslashreplace")}
    return pa.concat_tables(ordered).combine_chunks().replace_schema_metadata(facts)


def _streams(table: pa.Table) -> list[str]:
    names: list[str] = table["stream"].unique().to_pylist()
    if not names:
        raise InputError("the table has no rows", fix="make it again from the run")
    return names


def _locate(
    rows: pa.Table, stream: str
) -> tuple[tuple[str, ...], dict[str, Array], dict[str, Array]]:
    """Find the axes, the labels of each, and the place of every row along each."""
    without = rows["batch"].null_count
    if without not in (0, rows.num_rows):
        raise InputError(
            f"the stream {stream!r} has batches in some runs and none in others", fix=_ONE_BY_ONE
        )
    axes = tuple(axis for axis in AXES if axis != "batch" or not without)
    labels, places = {}, {}
    for axis in axes:
        labels[axis], places[axis] = _label(rows[axis])
    _, index, counts = np.unique(_flat(axes, labels, places), return_index=True, return_counts=True)
    if counts.max() > 1:
        row = int(index[np.argmax(counts > 1)])
        where = ", ".join(f"{axis} {rows[axis][row].as_py()}" for axis in axes)
        raise InputError(
            f"two rows of the stream {stream!r} have the same labels",
            where=where,
            fix="give each run once, or groups of one kind (--by)",
        )
    return axes, labels, places


def _label(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """Give the distinct labels, numbers ascending and texts as they appear, and their places."""
    if pa.types.is_integer(column.type):
        numbers, places = np.unique(column.to_numpy(), return_inverse=True)
        return numbers, places
    encoded = column.combine_chunks().dictionary_encode()
    return np.array(encoded.dictionary.to_pylist(), object), encoded.indices.to_numpy()


def _flat(axes: Sequence[str], labels: Mapping[str, Array], places: Mapping[str, Array]) -> Array:
    sizes = [len(labels[axis]) for axis in axes]
    return np.asarray(np.ravel_multi_index([places[axis] for axis in axes], sizes))


def _spread(
    values: Array,
    name: str,
    axes: tuple[str, ...],
    labels: Mapping[str, Array],
    places: Mapping[str, Array],
) -> tuple[tuple[str, ...], Array]:
    """Lay the rows of a column out along its axes; where there is no row is NaN, 0 or empty."""
    fewer = tuple(axis for axis in _FEWER_AXES.get(name, axes) if axis in axes)
    for used in dict.fromkeys((fewer, axes)):
        nothing = {"f": np.nan, "O": ""}.get(values.dtype.kind, 0)
        array = np.full([len(labels[axis]) for axis in used], nothing, values.dtype)
        index = _flat(used, labels, places)
        array.flat[index] = values
        if used == axes or np.array_equal(array.flat[index], values, values.dtype.kind == "f"):
            break
    return used, array


def _values(column: pa.ChunkedArray) -> Array:
    """The numbers of a column; null is NaN, also among whole numbers, which become float64."""
    if pa.types.is_string(column.type):
        return np.array(pc.fill_null(column, "").to_pylist(), object)
    return np.asarray(column.to_numpy())


def _told(rows: pa.Table, name: str) -> dict[str, str]:
    told = rows.schema.field(name).metadata or {}
    names = {"units": b"unit", "formula": b"formula"}
    return {key: told[own].decode() for key, own in names.items() if told.get(own)}


def _facts(table: pa.Table) -> str:
    text: bytes = table.schema.metadata[METADATA_KEY]
    return text.decode()


def _rows(data: xr.Dataset) -> pa.Table:
    """The rows of one stream, ordered by run, step, batch, group and reference."""
    expected = schema()
    missing = {MEASURED, *expected.names} - {"stream", "batch", *map(str, data.variables)}
    if missing or not {"stream", FACTS} <= data.attrs.keys():
        what = f"it lacks {', '.join(sorted(missing)) or 'its facts'}"
        raise InputError(f"not a Dataset of to_dataset, {what}", fix="give what to_dataset gave")
    # A selection of one label leaves a coordinate without an axis.
    single: list[Hashable] = [axis for axis in AXES if axis in data.coords and not data[axis].ndim]
    data = data.expand_dims(single)
    axes = [axis for axis in AXES if axis in data.dims]
    here = data[MEASURED].transpose(*axes).to_numpy().astype(bool)
    columns = [
        _column(data, field, axes, here)
        if field.name != "stream"
        else pa.array([data.attrs["stream"]] * int(here.sum()), field.type)
        for field in expected
    ]
    return pa.Table.from_arrays(columns, schema=expected)


def _column(data: xr.Dataset, field: pa.Field, axes: Sequence[str], here: Array) -> pa.Array:
    if field.name not in data.variables:
        return pa.nulls(int(here.sum()), field.type)
    shape = data[MEASURED].transpose(*axes)
    values = data[field.name].broadcast_like(shape).transpose(*axes).to_numpy()[here]
    if pa.types.is_string(field.type):
        return pa.array([str(text) for text in values], field.type)
    unknown = np.isnan(values) if field.nullable and values.dtype.kind == "f" else None
    if unknown is not None and pa.types.is_integer(field.type):
        values = np.where(unknown, 0, values)
    return pa.array(values, mask=unknown).cast(field.type)
