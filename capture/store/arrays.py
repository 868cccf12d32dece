"""Small append-only Zarr arrays: the coordinates of the rows and the every-step scalars.

Plain chunks, each ending with a crc32c that any Zarr reader checks. Zarr reads a missing chunk as
fill values, silently, so our reader insists that every chunk is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store.errors import RESTORE, DamagedError
from capture.store.layout import METADATA, small_chunk_rows, small_document
from capture.store.place import (
    Place,
    make_folders,
    read_confined,
    remove,
    write_durably,
    write_json,
)


class SmallArray:
    """Appends rows to one small array; holds only the rows of its last chunk in memory.

    `columns` are the sizes of the trailing dimensions, empty for a 1-D array.
    """

    def __init__(
        self,
        root: Place,
        relative: str,
        dtype: np.dtype[Any],
        dimensions: Sequence[str],
        columns: tuple[int, ...] = (),
    ) -> None:
        self.folder = root / relative
        self._root = root
        self._relative = relative
        self._dtype = dtype
        self._dimensions = tuple(dimensions)
        self._columns = columns
        self._chunk_rows = small_chunk_rows(columns)
        self._tail = np.empty((self._chunk_rows, *columns), dtype)
        self._rows = 0
        self._written = -1

    def __len__(self) -> int:
        return self._rows

    def append(self, row: Any, scratch: Place) -> None:
        """Add one row: a number, or an array of shape `columns`; full chunks go to disk."""
        self._tail[self._rows % self._chunk_rows] = row
        self._rows += 1
        if self._rows % self._chunk_rows == 0:
            self._write_chunk(self._rows // self._chunk_rows - 1, scratch)

    def flush(self, scratch: Place) -> None:
        """Write the last, partly filled chunk and the shape; nothing where nothing changed."""
        if self._written == self._rows:
            return
        if self._rows % self._chunk_rows:
            self._write_chunk(self._rows // self._chunk_rows, scratch)
        self._write_shape(scratch)
        self._written = self._rows

    def load(self, rows: int, scratch: Place) -> None:
        """Continue a stored array after its first `rows` rows; what came after them is dropped."""
        stored = read_small(self._root, self._relative)[:rows]
        if len(stored) < rows or stored.shape[1:] != self._columns:
            raise DamagedError(
                f"shape {list(stored.shape)} where {rows} rows of {list(self._columns)} must be",
                where=self.folder,
                fix=RESTORE,
            )
        self._rows = rows
        tail = rows % self._chunk_rows
        self._tail[:tail] = stored[rows - tail :]
        # The shape first: while it went too far, it would show NaN for what is cut off.
        self._write_shape(scratch)
        if tail:
            self._write_chunk(rows // self._chunk_rows, scratch)
        self._written = rows
        self.trim()

    def trim(self) -> None:
        """Remove chunks that lie beyond the last row."""
        last = -(-self._rows // self._chunk_rows)
        for path in (self.folder / "c").glob("*"):
            if path.name.isdigit() and int(path.name) >= last:
                remove(path)

    def _write_chunk(self, chunk: int, scratch: Place) -> None:
        used = self._rows - chunk * self._chunk_rows
        self._tail[used:] = np.nan if self._dtype.kind == "f" else 0
        body = self._tail.tobytes()
        path = self.folder / _chunk_key(chunk, len(self._columns))
        make_folders(path.parent, self._root)
        write_durably(path, body + crc32c(body).to_bytes(4, "little"), scratch)

    def _write_shape(self, scratch: Place) -> None:
        make_folders(self.folder, self._root)
        shape = (self._rows, *self._columns)
        document = small_document(shape, self._dtype, self._dimensions)
        write_json(self.folder / METADATA, document, scratch)


def read_small(root: Place, relative: str) -> NDArray[Any]:
    """Read a whole small array below `root`, every chunk present and its crc32c right."""
    path = root / relative / METADATA
    document = read_document(root, f"{relative}/{METADATA}")
    try:
        shape = tuple(int(size) for size in document["shape"])
        dtype = np.dtype(str(document["data_type"])).newbyteorder("<")
        expected = small_document(shape, dtype, document["dimension_names"])
    except (KeyError, TypeError, ValueError) as error:
        what = "no metadata of an array of this store"
        raise DamagedError(what, where=path, fix=RESTORE) from error
    if document != expected:
        what = "the metadata are not those of an array of this store"
        raise DamagedError(what, where=path, fix=RESTORE)
    rows = small_chunk_rows(shape[1:])
    values = np.empty((-(-shape[0] // rows) * rows, *shape[1:]), dtype)
    for chunk in range(len(values) // rows):
        key = f"{relative}/{_chunk_key(chunk, len(shape) - 1)}"
        values[chunk * rows : (chunk + 1) * rows] = _read_chunk(
            root, key, dtype, (rows, *shape[1:])
        )
    return values[: shape[0]]


def read_document(root: Place, relative: str) -> dict[str, Any]:
    """Read a JSON object below `root`; `DamagedError` where it is none."""
    try:
        document = json.loads(read_confined(root, relative))
    except (ValueError, RecursionError) as error:
        where = root / relative
        raise DamagedError("the metadata are no JSON", where=where, fix=RESTORE) from error
    if not isinstance(document, dict):
        raise DamagedError("the metadata are no JSON object", where=root / relative, fix=RESTORE)
    return document


def _read_chunk(
    root: Place, key: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    data = read_confined(root, key)
    body, checksum = data[:-4], data[-4:]
    expected = int(np.prod(shape)) * dtype.itemsize
    if len(body) != expected or crc32c(body) != int.from_bytes(checksum, "little"):
        raise DamagedError(
            "the chunk does not match its checksum",
            where=root / key,
            fix=RESTORE,
        )
    return np.frombuffer(body, dtype).reshape(shape)


def _chunk_key(chunk: int, trailing: int) -> str:
    return "/".join(["c", str(chunk), *["0"] * trailing])
