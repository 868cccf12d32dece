"""The table of a measurement: from runs to a table, or to its file, and read back.

One row per run, stream, step, batch, group of tensors and reference, in this order. Units and
formulas are in the metadata of the fields, the facts of the runs in the metadata of the file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from analyze.adam import AdamMoments, adam_moments
from analyze.cache import Where
from analyze.columns import schema
from analyze.groups import Grouping, name_of
from analyze.kinds import METADATA_KEY as METADATA_KEY
from analyze.kinds import WRITERS, kind_of
from analyze.metadata import flaw
from analyze.moment_table import StreamMoments
from analyze.parquet import ParquetPieces, writing_parquet
from analyze.references import parse_reference
from analyze.run_table import RunTable
from analyze.summing import measured_streams
from analyze.tensor_file import open_regular
from analyze.work import Work
from capture.store.errors import InputError
from capture.store.layout import WEIGHTS
from capture.store.reader import Run, open_run

if TYPE_CHECKING:
    from analyze.schedulers import Cluster

TABLE_VERSION = 1
_AGAIN = "make it again from the run"


def measure_run(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    by: Sequence[Grouping] = ("model",),
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Where = True,
    weight_decay: float | None = None,
) -> dict[str, pa.Table]:
    """Measure a run: one table for each grouping in `by`, by its name.

    One pass over its bytes, and where Adam's second moments were kept another over those rows;
    several where the moments of all streams would fill the memory.

    Without `streams`, all of the run that have rows but the weights, and the weights where there
    are no others; `references` as typed. What was summed before is not summed again: moments are
    kept in the folder NAME.moments beside the run, below the folder `cache` where it is a path, or
    neither looked up nor kept where it is `False`. A `weight_decay` λ takes the place of the run's
    own in the columns `_wd`, g + λw. Errors, scheduler, workers and progress are
    those of `compute_moments`; `InputError` where nothing is recorded in the streams.
    """
    summed = _sum(path, references, streams, Work(cache, scheduler, workers, progress))
    tables = [summed.table(grouping, path, weight_decay) for grouping in by]
    pieces: list[list[pa.Table]] = [[] for _ in tables]
    for stream in summed.streams:
        for table, own in zip(tables, pieces, strict=True):
            own += table.pieces(stream)
    return {
        name_of(table.by): _whole(own, table.metadata())
        for table, own in zip(tables, pieces, strict=True)
    }


def measure_into(
    file: TableFile,
    path: str,
    references: Sequence[str] = ("final",),
    *,
    keep: Sequence[str] | None = None,
    streams: Sequence[str] = (),
    by: Grouping = "model",
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Where = True,
    weight_decay: float | None = None,
) -> pa.Table:
    """Measure a run and add its rows to a file, piece by piece; all else as `measure_run`.

    Returns the rows of the whole model, with the columns `keep` alone where these are named. At no
    time is the table there whole, however many rows it has.
    """
    summed = _sum(path, references, streams, Work(cache, scheduler, workers, progress))
    table = summed.table(by, path, weight_decay)
    model = table if by == "model" else summed.table("model", path, weight_decay)
    kept = []
    for stream in summed.streams:
        for piece in table.pieces(stream):
            file.write(piece)
            if model is table:
                kept.append(piece.select(keep or piece.column_names))
        if model is not table:
            kept += [piece.select(keep or piece.column_names) for piece in model.pieces(stream)]
    file.describe(table.metadata())
    return _whole(kept, model.metadata())


@dataclass(frozen=True)
class _Summed:
    """A run with all that its tables are made of; `streams` come once."""

    run: Run
    references: Sequence[str]
    adam: AdamMoments
    streams: Iterable[StreamMoments]

    def table(self, by: Grouping, name: str, weight_decay: float | None) -> RunTable:
        return RunTable(
            self.run, self.references, by, adam=self.adam, name=name, weight_decay=weight_decay
        )


def _sum(path: str, references: Sequence[str], streams: Sequence[str], work: Work) -> _Summed:
    typed = list(dict.fromkeys(references))
    parsed = [parse_reference(text) for text in typed]
    run = open_run(path)
    chosen = choose_streams(run, streams)
    moments: Iterable[StreamMoments] = measured_streams(run, chosen, parsed, work)
    growing = not all(run.stream(name).finished for name in chosen)
    if growing:
        moments = list(moments)
    adam = adam_moments(run, chosen, parsed, work)
    # Opened again: a run that is still recording has written more by now.
    return _Summed(open_run(path) if growing else run, typed, adam, moments)


def choose_streams(run: Run, streams: Sequence[str] = ()) -> list[str]:
    """Choose what `measure_run` measures; `InputError` where nothing is recorded in it."""
    others = [name for name in run.stream_names if name != WEIGHTS and len(run.stream(name))]
    chosen = list(streams) or others or [WEIGHTS]
    if not any(len(run.stream(name)) for name in chosen):
        raise InputError(
            f"there are no rows to measure in {', '.join(map(repr, chosen))}",
            where=run.path,
            fix="choose another --stream, or wait until something is recorded",
        )
    return chosen


class TableFile:
    """The table of several runs on its way to a file, made by `writing_table`."""

    def __init__(self, pieces: ParquetPieces) -> None:
        self._pieces = pieces
        self._facts: list[dict[str, Any]] = []

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self._pieces.num_rows

    def write(self, piece: pa.Table) -> None:
        """Take the next rows."""
        self._pieces.write(piece)

    def describe(self, metadata: dict[str, Any]) -> None:
        """Take the facts of the run whose rows were written."""
        self._facts.append(metadata)

    def finish(self) -> None:
        """Write what is left, and the facts of all runs."""
        self._pieces.finish(encode_metadata(_versioned(_merged(self._facts))))


@contextmanager
def writing_table(path: str | PathLike[str]) -> Iterator[TableFile]:
    """Write a table run by run, with `measure_into`, inside the `with`.

    The file is there when that ends well, in full, and else not at all.
    """
    with writing_parquet(path, schema()) as pieces:
        file = TableFile(pieces)
        yield file
        file.finish()


def _whole(pieces: Sequence[pa.Table], metadata: dict[str, Any]) -> pa.Table:
    table = pa.concat_tables(pieces) if pieces else pa.Table.from_batches([], schema())
    return table.replace_schema_metadata(encode_metadata(_versioned(metadata)))


def _versioned(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"table": TABLE_VERSION, **metadata}


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Put tables of several runs below each other; their metadata are merged."""
    merged = _merged([read_metadata(table) for table in tables])
    bare = [table.replace_schema_metadata(None) for table in tables]
    return pa.concat_tables(bare).replace_schema_metadata(encode_metadata(merged))


def _merged(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = facts
    merged, nan = dict(first), Counter(first["nan"])
    for metadata in others:
        nan.update(metadata["nan"])
        new = [entry for entry in metadata["runs"] if entry not in merged["runs"]]
        merged["runs"] = [*merged["runs"], *new]
        merged["null"] = {**merged["null"], **metadata["null"]}
        merged["branched"] = {**merged.get("branched", {}), **metadata.get("branched", {})}
    merged["nan"] = dict(nan)
    merged["by"] = "+".join(dict.fromkeys(metadata["by"] for metadata in facts))
    return merged


def write_table(table: pa.Table, path: str | PathLike[str]) -> None:
    """Write Parquet, in full or not at all; equal tables give equal bytes.

    `WriteError` where the disk refuses.
    """
    with writing_parquet(path, table.schema) as pieces:
        pieces.write(table)
        pieces.finish(table.schema.metadata)


def read_table(path: str | PathLike[str]) -> pa.Table:
    """Read what `write_table` wrote of a measurement; `InputError` where the file is another."""
    table = read_parquet(path)
    other = kind_of(table.schema)
    if other not in (None, "compute"):
        raise InputError(
            f"another kind of table: that of {WRITERS[str(other)]}",
            where=path,
            fix="draw it with `analyze report`, or write it in another format with `analyze "
            "export`; here goes a run, or a table of `analyze compute`",
        )
    if METADATA_KEY not in (table.schema.metadata or {}):
        what: str | None = "it has no facts of runs"
    else:
        try:
            what = flaw(table, schema(), read_metadata(table), TABLE_VERSION)
        except (ValueError, RecursionError):
            what = "its facts cannot be read"
    if what is not None:
        raise InputError(
            f"not a table of this version of `analyze compute`, {what}", where=path, fix=_AGAIN
        )
    return table


def read_parquet(path: str | PathLike[str]) -> pa.Table:
    """Read a Parquet file with whatever is in it; `InputError` where there is none."""
    with os.fdopen(open_regular(path, "table"), "rb") as file:
        try:
            # Not the file itself: a thread of Arrow's that still waits for Python when the process
            # ends would abort it.
            return pq.read_table(pa.BufferReader(file.read()))
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"no table can be read ({reason})", where=path, fix=_AGAIN) from error


def read_metadata(table: pa.Table) -> dict[str, Any]:
    """Return the facts in a table's metadata: runs, nulls, sign convention, counts of NaN."""
    document: dict[str, Any] = json.loads(table.schema.metadata[METADATA_KEY])
    return document


def encode_metadata(metadata: dict[str, Any]) -> dict[bytes, bytes]:
    """Write the facts of a table as its file keeps them; `read_metadata` gives them back."""
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
    # A lone surrogate, which a run may hold, becomes its escape again, as JSON has it.
    return {METADATA_KEY: text.encode("utf-8", "backslashreplace")}
