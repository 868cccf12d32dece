"""Tables for other programs: CSV, Parquet, NetCDF, Zarr, and LaTeX for a paper.

A file or folder is there in full or not at all; one that was there before is replaced at the end.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from analyze.cache import Where
from analyze.dataset import FACTS
from analyze.flat_dataset import tree_of
from analyze.inputs import read_inputs
from analyze.kinds import WRITERS, kind_of
from analyze.other_tables import one_other
from analyze.tables import write_table
from analyze.verdict_tex import verdict_tex
from capture.store.errors import InputError, UsageError
from capture.store.files import remove, sync_folder, write_durably, writing
from capture.store.layout import METADATA
from capture.store.target import check_folder_target, check_target

if TYPE_CHECKING:
    from analyze.schedulers import Cluster

_ZARR = ".zarr"
# In elements: a packed variable of fewer takes more room than a plain one.
_WORTH_PACKING = 2**14


def export_inputs(
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    *,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> Path:
    """Write runs, and tables of `analyze compute`, as one table in the format of `out`'s suffix.

    Or tables of `pairs`, of its noise or of `pca`, or one of `compare`: all of one kind.

    A run is measured against final, as a whole and by layer; scheduler, workers and cache are those
    of `analyze.measure_run`. Formats, and the errors of the place, are those of `export_table`;
    `UsageError` too where `out` is an input, `InputError` for an input that is neither run nor
    table. Then nothing is written.
    """
    target = _check(out, inputs)
    table = one_other(inputs)
    if table is None:
        table = read_inputs(inputs, scheduler=scheduler, workers=workers, cache=cache).table
    _write(table, target)
    return target


def export_table(table: pa.Table, out: str | os.PathLike[str]) -> Path:
    """Write a table in the format that the suffix of `out` names; return the path.

    - ``.csv``: UTF-8, one line per row; floats with as many digits as give the same float64 back,
      NaN and null as an empty field.
    - ``.parquet``: as `write_table`.
    - ``.nc``: NetCDF 4, a group for each stream; units and formulas are attributes.
    - ``.zarr``: Zarr 3, a folder, a group for each stream, as in NetCDF.
    - ``.tex``: the numbers of the verdict, a LaTeX table for each run and reference.

    Groups are those of `to_dataset`; of other kinds of tables those of
    `analyze.flat_dataset.rows_tree`, and none of them goes to ``.tex``.

    `UsageError` for another suffix or a place that may not be written, `InputError` for a table
    without rows or one that the format cannot hold, `WriteError` where the disk refuses.
    """
    target = _check(out, ())
    _write(table, target)
    return target


def _check(out: str | os.PathLike[str], inputs: Sequence[str]) -> Path:
    suffix = Path(out).suffix.lower()
    if suffix != _ZARR and suffix not in _FILES:
        what = f"the suffix {suffix!r} names no format" if suffix else "a name without a suffix"
        raise UsageError(what, where=out, fix=f"end it in {', '.join([*_FILES, _ZARR])}")
    if suffix == _ZARR:
        return check_folder_target(out, inputs, _is_export)
    return check_target(out, inputs)


def _write(table: pa.Table, target: Path) -> None:
    if not table.num_rows:
        raise InputError("the table has no rows", fix="make it again from the run")
    if target.suffix.lower() == _ZARR:
        _write_zarr(table, target)
    else:
        _FILES[target.suffix.lower()](table, target)


def _write_csv(table: pa.Table, target: Path) -> None:
    columns = [
        pc.if_else(pc.is_nan(column), None, column) if pa.types.is_floating(column.type) else column
        for column in table.columns
    ]
    buffer = io.BytesIO()
    buffer.write(f"{','.join(table.column_names)}\n".encode())
    options = csv.WriteOptions(include_header=False, quoting_style="needed")
    csv.write_csv(pa.table(columns, names=table.column_names), buffer, options)
    write_durably(target, buffer.getvalue(), target.parent)


def _write_netcdf(table: pa.Table, target: Path) -> None:
    tree = tree_of(table)
    # Columns that do not apply to a stream are NaN throughout; what is small only grows.
    encoding: dict[str, Any] = {
        child.path: {
            name: {"zlib": True, "complevel": 4}
            for name, variable in child.variables.items()
            if variable.size >= _WORTH_PACKING and variable.dtype.kind != "O"
        }
        for child in tree.children.values()
    }
    data = tree.to_netcdf(engine="h5netcdf", encoding=encoding)
    write_durably(target, data, target.parent)


def _write_tex(table: pa.Table, target: Path) -> None:
    kind = kind_of(table.schema)
    if kind not in (None, "compute"):
        raise UsageError(
            f"a table of {WRITERS[str(kind)]} has no verdict to set in LaTeX",
            where=target,
            fix="end the name in .csv, .parquet, .nc or .zarr",
        )
    write_durably(target, verdict_tex(table).encode(), target.parent)


_FILES: Mapping[str, Callable[[pa.Table, Path], None]] = {
    ".csv": _write_csv,
    ".parquet": write_table,
    ".nc": _write_netcdf,
    ".tex": _write_tex,
}


def _write_zarr(table: pa.Table, target: Path) -> None:
    """Write beside the target, then rename; an older export steps aside until that is done."""
    with ThreadPoolExecutor(1) as pool:
        # Where no Ctrl-C can break into it: Zarr's own tasks would be left behind, and heard of.
        files = pool.submit(_zarr_files, table).result()
    new, old = (target.with_name(f"{target.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        with writing(target):
            for name, data in files.items():
                file = new / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            _sync(new)
            _swap(new, target, old)
    finally:
        remove(new)
        if target.exists():
            remove(old)


def _zarr_files(table: pa.Table) -> dict[str, bytes]:
    """The files of a Zarr store by their names, with all metadata in one place as well.

    There `xarray.open_zarr` looks first; Zarr warns that other readers may not know it, which find
    the usual metadata beside it. In memory, since Zarr writes with threads that go on after Ctrl-C.
    """
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        tree_of(table).to_zarr(MemoryStore(files), mode="w", zarr_format=3, consolidated=True)
    return {name: buffer.to_bytes() for name, buffer in files.items()}


def _swap(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    sync_folder(target.parent)


def _sync(folder: Path) -> None:
    """Make a folder and all that is in it durable."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _is_export(folder: Path) -> bool:
    try:
        document = json.loads((folder / METADATA).read_bytes())
        return FACTS in document["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
