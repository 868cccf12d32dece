"""Rows of a run as float64 tiles: some rows of a stream, some coordinates at a time.

Axes: n rows, B batches, C coordinates of an inner chunk, c of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from capture.store import DamagedError, MappedShard, Run, Stream, UnknownNameError
from capture.store.layout import ITERATES, WEIGHTS

Values = NDArray[np.float64]
Integers = NDArray[np.int64]

# What a task holds of its rows in float64, and the lengths of tiles that this may come to. Part of
# the result, since sums are added tile after tile: never derive them from the machine.
_TILE_BYTES = 2**23
_SHORTEST, _LONGEST = 512, 16384


class Tiles:
    """Some rows of one stream, mapped, with the weights of their steps; use in a `with`.

    Of a stream of points, such as the weights, the rows are themselves the weights, and there are
    no gradients: B is 0.
    """

    def __init__(self, run: Run, stream: Stream, rows: Integers) -> None:
        self._stack = ExitStack()
        self.rows = len(rows)
        numbers: list[int] = rows.tolist()
        with ExitStack() as stack:
            if stream.name in ITERATES:
                self._weights = [stack.enter_context(stream.open(row)) for row in numbers]
                self._gradients: list[list[MappedShard]] = []
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
        self._length = _tile_length(self.rows * (2 + self.batches))

    def __enter__(self) -> Tiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def verify_rest(self) -> None:
        """Verify what is in the files beside the chunks."""
        for shard in self._shards():
            shard.verify_rest()

    def verify_chunk(self, chunk: int) -> None:
        """Verify an inner chunk of all rows."""
        for shard in self._shards():
            shard.verify_chunk(chunk)

    def read(self, chunk: int, start: int, stop: int) -> Iterator[tuple[Values, Values]]:
        """Give w ``[n, c]`` and g ``[B, n, c]`` on coordinates `start` to `stop` of a chunk.

        Contiguous float64; the next tile overwrites the one before.
        """
        length = min(self._length, stop - start)
        w_memory = np.empty(self.rows * length)
        g_memory = np.empty(self.batches * self.rows * length)
        w_views = [shard.chunk(chunk) for shard in self._weights]
        g_views = [[shard.chunk(chunk) for shard in batch] for batch in self._gradients]
        for low in range(start, stop, self._length):
            high = min(low + self._length, stop)
            w_shape = (self.rows, high - low)
            g_shape = (self.batches, *w_shape)
            w = w_memory[: self.rows * (high - low)].reshape(w_shape)
            g = g_memory[: self.batches * w.size].reshape(g_shape)
            for target, view in zip(w, w_views, strict=True):
                target[:] = view[low:high]
            for targets, views in zip(g, g_views, strict=True):
                for target, view in zip(targets, views, strict=True):
                    target[:] = view[low:high]
            yield w, g

    def _shards(self) -> Sequence[MappedShard]:
        return [*self._weights, *(shard for batch in self._gradients for shard in batch)]


def weights_row(run: Run, stream: Stream, row: int) -> int:
    """Row of the weights at which a row of `stream` was taken; `DamagedError` without one."""
    step = int(stream.steps[row])
    try:
        return run.stream(WEIGHTS).row_of(step)
    except UnknownNameError as error:
        raise DamagedError(
            f"row {row} (step {step}) of {stream.name!r} has no weights of the same step",
            where=run.path,
            fix="restore the run from a copy, or record it again",
        ) from error


def _tile_length(rows: int) -> int:
    length = _LONGEST
    while length > _SHORTEST and rows * length * 8 > _TILE_BYTES:
        length //= 2
    return length
