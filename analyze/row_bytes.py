"""The bytes of some rows of a run where compiled loops can read them, a piece of a chunk at a time.

Files that may all be open together are mapped. Where the system allows fewer, or where a chunk of
every row of an object store were too much for the memory, a window of each row is copied at a time:
opened, read and closed one after another, so that no more than `WINDOW_BYTES` are held.

Axes: n rows, B batches, C coordinates of an inner chunk. Shards are in one order throughout: the
weights of all rows, then batch after batch the gradients of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from analyze.session import weights_row
from capture.store import Run, Stream, fetch_ahead
from capture.store.fetched_shard import IN_FLIGHT, read_parts
from capture.store.layout import ITERATES, WEIGHTS
from capture.store.objects import ObjectPath

Integers = NDArray[np.int64]
Addresses = NDArray[np.uint64]

# What one task holds of the rows it works on. Part of the result, since pieces that are in no two
# windows are measured on their own: never derive it from the machine.
WINDOW_BYTES = 2**27
_MULTIPLE = 1024

# How to open a shard: its stream, row and batch.
Opening = tuple[Stream, int, int | None]


class RowBytes:
    """Some rows of one stream, with the weights of their steps; use in a `with`.

    Of a stream of points, such as the weights, the rows are themselves the weights, and there are
    no gradients: B is 0. `like` is an empty array of their dtype. No more than `most_open` files
    are open at a time. So many coordinates of a chunk come `at_once`, and `held` bytes of them are
    in memory instead of mapped.
    """

    def __init__(
        self, run: Run, stream: Stream, rows: Integers, chunks: range, most_open: int
    ) -> None:
        shards = _openings(run, stream, rows.tolist())
        self.num_rows, self.batches = len(rows), len(shards) // len(rows) - 1
        self.like = np.empty(0, stream.dtype)
        self.window = window_length(len(shards), stream.dtype.itemsize)
        remote, whole = isinstance(run.path, ObjectPath), stream.grid.chunk_elements
        in_windows = self.window < whole if remote else len(shards) > most_open
        self.at_once = min(self.window, whole) if in_windows else whole
        self.held = len(shards) * self.at_once * stream.dtype.itemsize * (remote or in_windows)
        self._source: _Windows | _OpenShards
        if in_windows:
            self._source = _Windows(shards, self.window, min(IN_FLIGHT, most_open))
        else:
            self._source = _OpenShards(shards, chunks)

    def __enter__(self) -> RowBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def at(self, chunk: int, start: int, stop: int) -> tuple[Addresses, Addresses]:
        """Where coordinates `start` to `stop` of a chunk begin: weights ``[n]``, g ``[B, n]``.

        They lie in one window, and are there until another window is asked for. Whoever goes
        through whole chunks in their order has every byte verified at the end of each;
        `DamagedError` where one is not as committed.
        """
        found = self._source.at(chunk, start, stop).reshape(1 + self.batches, self.num_rows)
        return found[0], found[1:]


def window_length(shards: int, itemsize: int) -> int:
    """Coordinates of a window of so many shards; windows lie one after another in each chunk."""
    length = WINDOW_BYTES // (max(1, shards) * itemsize)
    return max(_MULTIPLE, length // _MULTIPLE * _MULTIPLE)


def _openings(run: Run, stream: Stream, rows: list[int]) -> list[Opening]:
    if stream.name in ITERATES:
        return [(stream, row, None) for row in rows]
    batches = [None] if stream.batches is None else range(stream.batches)
    weights = run.stream(WEIGHTS)
    return [
        *((weights, weights_row(run, stream, row), None) for row in rows),
        *((stream, row, batch) for batch in batches for row in rows),
    ]


class _OpenShards:
    """Shards that are all open: mapped, or with a chunk of each held."""

    def __init__(self, openings: Sequence[Opening], chunks: range) -> None:
        with ExitStack() as stack:
            self._shards = [
                stack.enter_context(stream.open(row, batch)) for stream, row, batch in openings
            ]
            self._stack = stack.pop_all()
        # From an object store; chunks are then taken up in this order.
        fetch_ahead(self._shards, chunks)
        self._itemsize = openings[0][0].dtype.itemsize
        self._chunk = -1
        self._views: list[NDArray[Any]] = []
        self._starts = np.empty(0, np.uint64)

    def close(self) -> None:
        self._stack.close()

    def at(self, chunk: int, start: int, stop: int) -> Addresses:
        if chunk != self._chunk:
            self._take(chunk)
        return self._starts + np.uint64(start * self._itemsize)

    def _take(self, chunk: int) -> None:
        """Verify a chunk of every shard; with the first one what is in the files beside chunks."""
        self._views = []
        # Kept for as long as their addresses are in use.
        self._views = [shard.chunk(chunk) for shard in self._shards]
        for shard in self._shards:
            shard.verify_chunk(chunk)
            if chunk == 0:
                shard.verify_rest()
        self._starts = np.array([view.ctypes.data for view in self._views], np.uint64)
        self._chunk = chunk


class _Windows:
    """One window of every shard, in memory; a chunk is verified when its last window was read."""

    def __init__(self, openings: Sequence[Opening], length: int, together: int) -> None:
        self._openings, self._together = openings, together
        stream = openings[0][0]
        self._grid, self._itemsize = stream.grid, stream.dtype.itemsize
        self._length = min(length, self._grid.chunk_elements)
        self._memory = np.empty((len(openings), self._length), stream.dtype)
        self._checksums = [0] * len(openings)
        self._at = (-1, -1)

    def close(self) -> None:
        """Let go of nothing: no file is open."""

    def at(self, chunk: int, start: int, stop: int) -> Addresses:
        window = start // self._length
        assert stop <= (window + 1) * self._length, "a piece lies in one window"
        if (chunk, window) != self._at:
            self._read(chunk, window)
        offset = (start - window * self._length) * self._itemsize
        strides = np.arange(len(self._openings)) * self._memory.strides[0]
        return np.asarray(self._memory.ctypes.data + strides + offset, np.uint64)

    def _read(self, chunk: int, window: int) -> None:
        """Read a window of each shard; after the last one of a chunk, compare the checksums."""
        assert self._at == (chunk, window - 1) or window == 0, "windows are read in their order"
        low, high = self._grid.bounds(chunk)
        start = window * self._length
        stop = min(start + self._length, high - low)
        for place in range(0, len(self._openings), self._together):
            with ExitStack() as stack:
                shards = [
                    stack.enter_context(stream.open(row, batch))
                    for stream, row, batch in self._openings[place : place + self._together]
                ]
                parts = read_parts(shards, chunk, start * self._itemsize, stop * self._itemsize)
                for number, (shard, part) in enumerate(zip(shards, parts, strict=True), place):
                    self._memory[number, : stop - start] = np.frombuffer(part, self._memory.dtype)
                    before = self._checksums[number] if window else 0
                    self._checksums[number] = crc32c(part, before)
                    if stop == high - low:
                        shard.confirm(chunk, self._checksums[number])
                    if chunk == window == 0:
                        shard.verify_rest()
        self._at = (chunk, window)
