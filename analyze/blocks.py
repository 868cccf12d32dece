"""Blocks: how the work on a stream is cut into tasks, and each task to what a process may open."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from capture.store import Stream

# Blocks per worker, so that none waits long for the last; and a limit to what one block reads, so
# that progress moves and an interrupt is not kept waiting.
_BLOCKS_PER_WORKER = 3
_BLOCK_BYTES = 2**30
_MOST_ROWS = 16
_MAPS = Path("/proc/sys/vm/max_map_count")


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
    rows = max(1, rows_per_block or min(_MOST_ROWS, math.ceil(total / wanted)))
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


def most_open(threads: int) -> int:
    """How many shards each of `threads` tasks of this process may have open at a time.

    A mapped file costs one descriptor and one map. Half of what the system allows is for shards;
    the rest is left to references, the scheduler and its connections.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [] if files == resource.RLIM_INFINITY else [files]
    try:
        limits.append(int(_MAPS.read_text()))
    except (OSError, ValueError):  # no Linux, no such limit
        limits.append(65_530)
    return max(2, min(limits) // 2 // max(1, threads))


def pieces(rows: range, batches: int, shards: int) -> Iterator[list[tuple[range, range]]]:
    """Cut rows, and batches where one row has too many, so that at most `shards` are open.

    Every item is one range of rows, with the ranges of batches that it is cut into. Each row has
    its weights beside its batches.
    """
    at_once = max(1, shards // (1 + batches))
    most = batches if shards > batches else max(1, shards - 1)
    for first in range(rows.start, rows.stop, at_once):
        some = range(first, min(first + at_once, rows.stop))
        yield [
            (some, range(start, min(start + most, batches))) for start in range(0, batches, most)
        ]
