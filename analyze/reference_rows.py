"""Weight rows as a reference point: one row, or the mean of several, cut like the rows of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from analyze.spill import SpilledChunks
from capture.store import ChunkGrid, Run, Stream, fetch_ahead
from capture.store.layout import WEIGHTS
from capture.store.objects import ObjectPath

# Rows of a mean that are open at a time.
_ROWS_AT_ONCE = 16


class BoundReference(Protocol):
    """A reference opened for one run, cut like the run's rows.

    `bytes_to_open` is what was read to open it, `bytes_once` that and what is read for all chunks
    however often they are asked for, `bytes_per_pass` what is read each time, and `bytes_spilled`
    what lies in the folder for temporary files.
    """

    @property
    def bytes_to_open(self) -> int:
        """Bytes that were read already."""

    @property
    def bytes_once(self) -> int:
        """Bytes that are read once."""

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that are read whenever all chunks are asked for."""

    @property
    def bytes_spilled(self) -> int:
        """Bytes of temporary files."""

    def chunk(self, chunk: int) -> NDArray[Any]:
        """Give w* on one inner chunk of the run: ``[C]``, verified.

        Float32 where w* is stored in no wider dtype, else float64.
        """

    def close(self) -> None:
        """Unmap the files."""


def bind_rows(run: Run, source: Run, rows: Sequence[int]) -> BoundReference:
    """Open one weight row of `source`, or the mean of several.

    Chunks that take long to come by, sums and those from an object store, are made once.
    """
    if len(rows) == 1 and not isinstance(source.path, ObjectPath):
        return _Row(run, source, rows[0])
    mean = _Mean(run, source, rows)
    once = mean.bytes_to_open, mean.bytes_once
    return SpilledChunks(run.stream(WEIGHTS).grid, mean.dtype, mean.chunk, *once)


class _Row:
    """One weight row of `source`, cut like the rows of `run`."""

    def __init__(self, run: Run, source: Run, row: int) -> None:
        weights = source.stream(WEIGHTS)
        self._grid = run.stream(WEIGHTS).grid
        self._source_grid = weights.grid
        self._shard = weights.open(row)
        self.bytes_to_open = _beside_chunks(weights, [row])
        self.bytes_once, self.bytes_per_pass, self.bytes_spilled = self._shard.commit.size, 0, 0
        self._verified = np.zeros(weights.grid.num_chunks, bool)
        self._shard.verify_rest()

    def chunk(self, chunk: int) -> NDArray[Any]:
        """Give w* on one inner chunk of the run, ``[C]``; a view where both are cut alike."""
        start, stop = self._grid.bounds(chunk)
        parts = [self._verified_chunk(n)[cut] for n, cut in _cut(self._source_grid, start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Unmap the row."""
        self._shard.close()

    def _verified_chunk(self, chunk: int) -> NDArray[Any]:
        if not self._verified[chunk]:
            self._shard.verify_chunk(chunk)
            self._verified[chunk] = True
        return self._shard.chunk(chunk)


class _Mean:
    """The mean of weight rows of `source`, cut like the rows of `run`; one row is that row.

    A few rows are open at a time, however many there are.
    """

    def __init__(self, run: Run, source: Run, rows: Sequence[int]) -> None:
        self._weights = source.stream(WEIGHTS)
        self._grid = run.stream(WEIGHTS).grid
        self._rows = rows
        self.bytes_to_open = _beside_chunks(self._weights, rows)
        self.bytes_once = int(self._weights.commits.sizes[list(rows)].sum())
        self.dtype = self._weights.dtype if len(rows) == 1 else np.dtype(np.float64)
        for row in rows:
            with self._weights.open(row) as shard:
                shard.verify_rest()

    def chunk(self, chunk: int) -> NDArray[Any]:
        """Read and verify all rows on one inner chunk of the run: their mean, ``[C]``."""
        start, stop = self._grid.bounds(chunk)
        total, cuts = np.zeros(stop - start, self.dtype), _cut(self._weights.grid, start, stop)
        for first in range(0, len(self._rows), _ROWS_AT_ONCE):
            with ExitStack() as stack:
                rows = self._rows[first : first + _ROWS_AT_ONCE]
                shards = [stack.enter_context(self._weights.open(row)) for row in rows]
                fetch_ahead(shards, range(cuts[0][0], cuts[-1][0] + 1))
                place = 0
                for number, cut in cuts:
                    stop = place + cut.stop - cut.start
                    for shard in shards:
                        total[place:stop] += shard.chunk(number)[cut]
                        shard.verify_chunk(number)
                    place = stop
        if len(self._rows) > 1:
            total /= len(self._rows)
        return total


def _beside_chunks(weights: Stream, rows: Sequence[int]) -> int:
    """Bytes of some rows that lie beside their inner chunks: header, buffers, index."""
    chunks = weights.grid.num_chunks * weights.grid.chunk_bytes
    return int((weights.commits.sizes[list(rows)] - chunks).sum())


def _cut(grid: ChunkGrid, start: int, stop: int) -> list[tuple[int, slice]]:
    """Chunks of a grid that hold coordinates `start` to `stop`, and which part of each."""
    size, found = grid.chunk_elements, []
    for chunk in range(start // size, -(-stop // size)):
        first, last = grid.bounds(chunk)
        found.append((chunk, slice(max(first, start) - first, min(last, stop) - first)))
    return found
