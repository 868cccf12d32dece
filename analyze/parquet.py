"""Parquet files written piece by piece: in full in the end, or not at all."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO, RawIOBase
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capture.store.files import write_all, writing, written_durably

# Rows of a row group, however they come: equal tables give equal bytes.
_GROUP_ROWS = 2**16
# Where Arrow keeps its own schema, with the metadata of the table, in a Parquet file.
_ARROW_SCHEMA = b"ARROW:schema"


class ParquetPieces:
    """A table on its way to a file, made by `writing_parquet`."""

    def __init__(self, path: Path, schema: pa.Schema, stack: ExitStack) -> None:
        self._path = path
        self._schema = schema.remove_metadata()
        self._stack = stack
        self._pending = pa.Table.from_batches([], self._schema)
        self._writer: Any = None
        self.num_rows = 0

    def write(self, piece: pa.Table) -> None:
        """Take the next rows, of the file's schema."""
        self.num_rows += piece.num_rows
        self._pending = pa.concat_tables([self._pending, piece.replace_schema_metadata(None)])
        while self._pending.num_rows >= _GROUP_ROWS:
            self._write_group(_GROUP_ROWS)

    def finish(self, metadata: Mapping[bytes, bytes] | None) -> None:
        """Write what is left, and the metadata of the table, which come last in the file."""
        if self._pending.num_rows or self._writer is None:
            self._write_group(self._pending.num_rows)
        with writing(self._path):
            if metadata is not None:
                told = self._schema.with_metadata(metadata).serialize().to_pybytes()
                self._writer.add_key_value_metadata(
                    {**metadata, _ARROW_SCHEMA: base64.b64encode(told)}
                )
            self._writer.close()

    def _write_group(self, rows: int) -> None:
        group, rest = self._pending.slice(0, rows), self._pending.slice(rows)
        self._pending = rest
        with writing(self._path):
            if self._writer is None:
                file = self._stack.enter_context(written_durably(self._path, self._path.parent))
                self._writer = pq.ParquetWriter(_Whole(file), self._schema, compression="zstd")
                # Before the file is: where an error left it open, it would be closed later.
                self._stack.callback(_close, self._writer)
            self._writer.write_table(group.combine_chunks(), row_group_size=max(1, rows))


class _Whole(RawIOBase):
    """A file to which nothing is written in part."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        write_all(self._file.fileno(), view)
        return len(view)


def _close(writer: Any) -> None:
    with suppress(OSError, ValueError, pa.ArrowException):
        writer.close()


@contextmanager
def writing_parquet(path: str | PathLike[str], schema: pa.Schema) -> Iterator[ParquetPieces]:
    """Write a Parquet file whose pieces, and at last metadata, are given inside the `with`.

    Nothing is left behind where that ends with an error. `WriteError` where the disk refuses.
    """
    with ExitStack() as stack:
        yield ParquetPieces(Path(path), schema, stack)
