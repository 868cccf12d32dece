"""Rows of a run as float64 tiles: some rows of a stream, some coordinates at a time.

Axes: n rows, B batches, C coordinates of an inner chunk, c of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze.pair_kernels import load_rows, load_steps
from analyze.session import weights_row
from capture.store import Run, Shard, Stream, fetch_ahead
from capture.store.layout import ITERATES, WEIGHTS

Values = NDArray[np.float64]
Integers = NDArray[np.int64]

# What a task holds of its rows in float64, and the lengths of tiles that this may come to. Part of
# the result, since sums are added tile after tile: never derive them from the machine.
_TILE_BYTES = 2**23
_SHORTEST, _LONGEST = 512, 8192


class Tiles:
    """Some rows of one stream, mapped, with the weights of their steps; use in a `with`.

    Of a stream of points, such as the weights, the rows are themselves the weights, and there are
    no gradients: B is 0.
    """

    def __init__(self, run: Run, stream: Stream, rows: Integers) -> None:
        self.num_rows = len(rows)
        numbers: list[int] = rows.tolist()
        with ExitStack() as stack:
            if stream.name in ITERATES:
                self._weights = [stack.enter_context(stream.open(row)) for row in numbers]
                self._gradients: list[list[Shard]] = []
            else:
                weights = run.stream(WEIGHTS)
                of_step = [weights_row(run, stream, row) for row in numbers]
                self._weights = [stack.enter_context(weights.open(row)) for row in of_step]
                batches = [None] if stream.batches is None else range(stream.batches)
                self._gradients = [
                    [stack.enter_context(stream.open(row, batch)) for row in numbers]
                    for batch in batches
                ]
            self._stack = stack.pop_all()
        self.batches = len(self._gradients)
        self._views: list[NDArray[Any]] = []
        self._at = (np.empty(0, np.uint64),) * 2
        self._like = np.empty(0, stream.dtype)
        self._length = tile_length(self.num_rows * (1 + self.batches))

    def __enter__(self) -> Tiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fetch_ahead(self, chunks: range) -> None:
        """Send for what is on an object store; `use` then takes these chunks up in this order."""
        fetch_ahead(self._shards(), chunks)

    def verify_rest(self) -> None:
        """Verify what is in the files beside the chunks."""
        for shard in self._shards():
            shard.verify_rest()

    def use(self, chunk: int) -> None:
        """Take an inner chunk of all rows up, verified; from an object store it is fetched here."""
        count, shards = len(self._weights), self._shards()
        views = [shard.chunk(chunk) for shard in shards]
        for shard in shards:
            shard.verify_chunk(chunk)
        # Kept for as long as their addresses are in use.
        self._views = views
        self._at = _addresses(views[:count]), _addresses(views[count:])

    def rows(self, start: int, stop: int) -> Iterator[tuple[Values, Values]]:
        """Give w ``[n, c]`` and g ``[B, n, c]`` on coordinates `start` to `stop` of the chunk.

        Contiguous float64; each tile overwrites the one before.
        """
        weights, gradients = self._at
        for low, joint in self._memory(len(weights) + len(gradients), start, stop):
            w, g = joint[: self.num_rows], joint[self.num_rows :]
            load_rows(weights + self._bytes(low), self._like, w)
            load_rows(gradients + self._bytes(low), self._like, g)
            yield w, g.reshape(self.batches, *w.shape)

    def steps(
        self, start: int, stop: int, source: Integers
    ) -> Iterator[tuple[Values, Values, Values]]:
        """Give d ``[n - 1, c]`` and g ``[B, n, c]``, as `rows` does, and both as one matrix.

        d are the weights of each row less those of the row before, where the weights of row i are
        those of row ``source[i]``. The matrix is ``[n - 1 + B n, c]``, d above g.
        """
        weights, gradients = self._at
        for low, joint in self._memory(self.num_rows - 1 + len(gradients), start, stop):
            d, g = joint[: self.num_rows - 1], joint[self.num_rows - 1 :]
            load_steps(weights[source] + self._bytes(low), self._like, d)
            load_rows(gradients + self._bytes(low), self._like, g)
            yield d, g.reshape(self.batches, self.num_rows, d.shape[1]), joint

    def _bytes(self, coordinates: int) -> np.uint64:
        return np.uint64(coordinates * self._like.itemsize)

    def _memory(self, rows: int, start: int, stop: int) -> Iterator[tuple[int, Values]]:
        """Give the first coordinate of each tile, and room for it ``[rows, c]``."""
        length = min(self._length, stop - start)
        memory = np.empty(rows * length)
        for low in range(start, stop, length):
            width = min(length, stop - low)
            yield low, memory[: rows * width].reshape(rows, width)

    def _shards(self) -> Sequence[Shard]:
        return [*self._weights, *(shard for batch in self._gradients for shard in batch)]


def _addresses(views: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """Where each view begins in memory; all are contiguous."""
    return np.array([view.ctypes.data for view in views], np.uint64)


def tile_length(rows: int) -> int:
    """Coordinates in a tile of so many rows, those of weights and gradients together."""
    length = _LONGEST
    while length > _SHORTEST and rows * length * 8 > _TILE_BYTES:
        length //= 2
    return length
