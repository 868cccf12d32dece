"""What multiplying the rows of a stream with each other will cost, said before it starts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.blocks import most_open
from analyze.chain import SUMS, TILE, Piece, Segment, chain_sums, direct_sums
from analyze.gram import plan_gram
from analyze.pair_blocks import PairBlock
from analyze.projection import LOG_FACTOR, PROCESS_BYTES, Projection
from analyze.row_bytes import RowBytes
from analyze.schedulers import Cluster
from analyze.session import weights_row
from capture.store import Run, Stream
from capture.store.layout import ITERATES, WEIGHTS

# Float64 that a dense block holds for each two of its rows and each batch, while it is put
# together; and copies of the sums of its pairs.
_PER_ROWS = 14
_PER_PAIRS = 4
# In float64: what is multiplied to time it.
_SAMPLE_BYTES = 32 * 2**20


def project_gram(
    run: str | os.PathLike[str],
    stream: str,
    groups: NDArray[np.int64],
    *,
    lags: Sequence[int] | None = None,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
) -> Projection:
    """Say what `analyze.gram.compute_gram` with the same arguments will cost; errors are the same.

    Reads the logs and, for the rate, the first inner chunk of the rows of one block.
    """
    threads = schedulers.check(scheduler, workers)
    session, pairs, blocks = plan_gram(run, stream, groups, lags, threads)
    rows, of_chunk, dense = session.stream, session.groups_of_chunk(), lags is None
    waiting = sum(
        _sums_bytes(rows, len(_groups_in(of_chunk, block)), len(block.pairs), len(block.own))
        for block in blocks
    )
    returned = _sums_bytes(rows, int(groups.max(initial=-1)) + 1, len(pairs), len(rows))
    tasks = [_task_bytes(rows, of_chunk, block, dense=dense) for block in blocks]
    logs = rows.commits.nbytes + session.run.stream(WEIGHTS).commits.nbytes
    largest = max(blocks, key=lambda block: len(block.pairs), default=None)
    sampled = _Sample(0, 0.0, 0)
    if largest is not None:
        sampled = _measure_rate(session.run, rows, largest, most_open(threads), dense=dense)
    total = sum(_bytes_of(session.run, rows, block) for block in blocks)
    task = max(tasks, default=0) + sampled.held
    return Projection(
        rows=len(rows),
        shards=len(rows.commits),
        threads=threads,
        bytes_to_read=total,
        memory=PROCESS_BYTES + LOG_FACTOR * logs + waiting + 2 * returned + threads * task,
        spilled=0,
        sample=sampled.size,
        rate=sampled.rate,
        seconds=total / sampled.rate / threads if sampled.rate else 0.0,
    )


def _bytes_of(run: Run, stream: Stream, block: PairBlock) -> int:
    """Bytes of one block, from the committed sizes; what is beside the chunks goes with chunk 0."""
    grid, batches = stream.grid, stream.batches or 1
    inside, whole = len(block.chunks) * grid.chunk_bytes, grid.num_chunks * grid.chunk_bytes
    own = (block.rows[:, None] * batches + np.arange(batches)).ravel()
    sizes = stream.commits.sizes[own].tolist()
    if stream.name not in ITERATES:
        of_step = [weights_row(run, stream, int(row)) for row in block.rows]
        sizes += run.stream(WEIGHTS).commits.sizes[of_step].tolist()
    return sum(inside + (size - whole if block.chunks.start == 0 else 0) for size in sizes)


def _groups_in(of_chunk: Sequence[set[int]], block: PairBlock) -> set[int]:
    return set().union(*(of_chunk[chunk] for chunk in block.chunks))


def _sums_bytes(stream: Stream, groups: int, pairs: int, own: int) -> int:
    """Bytes of the sums of so many groups, pairs, and rows whose batches are multiplied."""
    columns = 1 if stream.name in ITERATES else len(SUMS)
    crossed = own * stream.batches**2 if stream.batches else 0
    return 8 * groups * (pairs * (stream.batches or 1) * columns + crossed)


def _task_bytes(
    stream: Stream, of_chunk: Sequence[set[int]], block: PairBlock, *, dense: bool
) -> int:
    """What one task holds beside its rows: tiles of them, their products, its sums."""
    count, batches = len(block.rows), 0 if stream.name in ITERATES else stream.batches or 1
    tiles = 8 * count * (1 + batches) * TILE
    products = 8 * _PER_ROWS * (1 + batches) * count**2 if dense else 0
    sums = _sums_bytes(stream, 1, len(block.pairs), len(block.own))
    groups = len(_groups_in(of_chunk, block))
    return 2 * tiles + products + (groups + _PER_PAIRS) * sums


@dataclass(frozen=True)
class _Sample:
    """Bytes that were read, at how many a second, and how many a task holds in memory of such."""

    size: int
    rate: float
    held: int


def _measure_rate(
    run: Run, stream: Stream, block: PairBlock, allowed: int, *, dense: bool
) -> _Sample:
    """Take up the first coordinates of one block, and multiply a few of them."""
    measure, size = chain_sums if dense else direct_sums, stream.grid.bounds(0)[1]
    with RowBytes(run, stream, block.rows, range(1), allowed) as rows:
        shards = len(block.rows) * (1 + rows.batches)
        covered = min(size, rows.at_once)
        part = max(1, min(covered, rows.window, _SAMPLE_BYTES // (8 * shards)))
        start = time.perf_counter()
        piece = Piece(rows, Segment(0, 0, part, 0))
        taken = (time.perf_counter() - start) / covered
        # Compiled or loaded before the clock starts.
        measure(Piece(rows, Segment(0, 0, 1, 0)), block.pairs[:1])
        start = time.perf_counter()
        measure(piece, block.pairs)
        taken += (time.perf_counter() - start) / part
        nbytes = shards * stream.grid.chunk_bytes
        return _Sample(round(nbytes * covered / size), nbytes / (taken * size), rows.held)
