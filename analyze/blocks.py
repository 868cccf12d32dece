"""Blocks: how the work on a stream is cut into tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from capture.store import Stream

# Blocks per worker, so that none waits long for the last; and a limit to what one block reads, so
# that progress moves and an interrupt is not kept waiting.
_BLOCKS_PER_WORKER = 3
_BLOCK_BYTES = 2**30
_MOST_ROWS = 16
_MOST_SHARDS = 4096


@dataclass(frozen=True)
class Block:
    """Rows `rows` and inner chunks `chunks` of one stream."""

    stream: str
    rows: range
    chunks: range


def cut(stream: Stream, workers: int, rows_per_block: int | None) -> Iterator[Block]:
    """Cut a stream into blocks, chunk-major: enough for the workers, none too large."""
    total, grid = len(stream.steps), stream.grid
    wanted, shards_per_row = _BLOCKS_PER_WORKER * workers, 1 + (stream.batches or 1)
    rows = rows_per_block or min(_MOST_ROWS, math.ceil(total / wanted))
    rows = max(1, min(rows, _MOST_SHARDS // shards_per_row))
    parts = math.ceil(wanted * rows / max(1, total))
    largest = _BLOCK_BYTES // (rows * shards_per_row * grid.chunk_bytes)
    chunks = max(1, min(math.ceil(grid.num_chunks / parts), largest))
    for first_chunk in range(0, grid.num_chunks, chunks):
        for first_row in range(0, total, rows):
            yield Block(
                stream.name,
                range(first_row, min(first_row + rows, total)),
                range(first_chunk, min(first_chunk + chunks, grid.num_chunks)),
            )
