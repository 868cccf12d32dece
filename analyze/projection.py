"""What a measurement will cost, said before it starts: bytes, memory, space for a spill, time."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.amounts import duration, size
from analyze.blocks import Block, cut, most_open, pieces
from analyze.compute import measure_block
from analyze.moments import MOMENTS, moment_kind, segment_moments
from analyze.references import Reference
from analyze.schedulers import Cluster
from analyze.session import Plan, Session, drop, keep, weights_row
from capture.store import Run, Stream
from capture.store.layout import ITERATES
from capture.store.place import absolute_address

# Python, numpy, numba, pyarrow and dask without any data: 126 MB were measured, and some air.
PROCESS_BYTES = 160 * 2**20
# Lines of the logs as objects of their own, numbers taken from them.
LOG_FACTOR = 2
# Copies of one chunk of a reference that is no view: the values as stored, widened and joined.
_COPIES = 4
_ROW_BYTES = 8 * (len(MOMENTS) + 1)
_SAMPLE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Projection:
    """The cost of one pass over a run, by `compute_moments` or `compute_gram`; sizes in bytes.

    `rows` and `shards` are those of the streams, the weights beside them not counted.
    `bytes_to_read` counts what is read and verified: every shard as often as it is passed over,
    references as well. `memory` is an upper bound of what one process holds above mapped pages,
    `threads` tasks at a time, what it returns included; `spilled` lies in the folder for temporary
    files. On a cluster both hold for each worker. `rate` is bytes per second of one thread, timed
    on the first `sample` bytes, and `seconds` what follows if all threads go on like this.
    """

    rows: int
    shards: int
    threads: int
    bytes_to_read: int
    memory: int
    spilled: int
    sample: int
    rate: float
    seconds: float

    def __str__(self) -> str:
        spill = f", spills {size(self.spilled)}" if self.spilled else ""
        measured = f"; the first {size(self.sample)} came at {size(self.rate)}/s" * (self.rate > 0)
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"reads {size(self.bytes_to_read)} of {self.shards:,} shards{spill}, takes at most "
            f"{size(self.memory)} of memory with {threads}, about {duration(self.seconds)}"
            f"{measured}"
        )


def project(
    run: str | os.PathLike[str] | Run,
    streams: Sequence[str],
    references: Sequence[Reference],
    *,
    moments: Sequence[str] = MOMENTS,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    rows_per_block: int | None = None,
) -> Projection:
    """Say what `compute_moments` with the same arguments will cost; errors are the same.

    A `run` that is open is not opened again.
    Reads the logs and, for the rate, a few megabytes. A cluster is not asked: its workers count as
    `workers` threads that read as fast as this process does.
    """
    threads = schedulers.check(scheduler, workers)
    names, kind = tuple(dict.fromkeys(streams)), moment_kind(moments)
    opened = run if isinstance(run, Run) else None
    where = absolute_address(run.path if isinstance(run, Run) else run)
    plan = Plan(uuid.uuid4().hex, where, names, tuple(references), kind, threads)
    session = Session(plan, opened)
    keep(plan, session)
    try:
        blocks = [
            b for name in names for b in cut(session.run.stream(name), threads, rows_per_block)
        ]
        allowed = most_open(threads)
        total = sum(reference.bytes_once for reference in session.references)
        total += sum(_bytes_of(session, allowed, block) for block in blocks)
        sample, rate = _measure_rate(plan, session, blocks)
    finally:
        drop(plan)
    return Projection(
        rows=sum(len(session.run.stream(name)) for name in names),
        shards=sum(len(session.run.stream(name).commits) for name in names),
        threads=threads,
        bytes_to_read=total,
        memory=_memory(session, threads, blocks),
        spilled=sum(reference.bytes_spilled for reference in session.references),
        sample=sample,
        rate=rate,
        seconds=total / rate / threads if rate else 0.0,
    )


def _bytes_of(session: Session, allowed: int, block: Block) -> int:
    """Bytes of one block, of which `allowed` shards may be open at a time.

    From the committed sizes; what is in a file beside the chunks goes with chunk 0.
    """
    stream, grid = session.run.stream(block.stream), session.weights.grid
    inside, batches = len(block.chunks) * grid.chunk_bytes, stream.batches or 1
    parts = list(pieces(block.rows, batches, allowed))
    rest = grid.num_chunks * grid.chunk_bytes * (block.chunks.start == 0)
    rows, own = len(block.rows), slice(block.rows.start * batches, block.rows.stop * batches)
    total = rows * batches * (inside - rest) + int(stream.commits.sizes[own].sum()) * bool(rest)
    if stream.name not in ITERATES:
        sizes = session.weights.commits.sizes[_weights_rows(session, stream, block.rows)]
        total += len(parts[0]) * (rows * (inside - rest) + int(sizes.sum()) * bool(rest))
    again = sum(reference.bytes_per_pass for reference in session.references)
    first, last = grid.bounds(block.chunks.start)[0], grid.bounds(block.chunks[-1])[1]
    share = (last - first) / grid.num_elements
    return total + round(sum(map(len, parts)) * again * share)


def _weights_rows(session: Session, stream: Stream, rows: range) -> NDArray[np.int64]:
    """Rows of the weights at which some rows of `stream` were taken; `DamagedError` without one."""
    known, steps = session.weights.steps, stream.steps[rows.start : rows.stop]
    found = np.minimum(np.searchsorted(known, steps), max(0, len(known) - 1))
    lacking = np.flatnonzero(known[found] != steps).tolist() if len(known) else range(len(rows))
    for place in lacking:
        weights_row(session.run, stream, rows[place])  # which says what is wrong
    return np.asarray(found)


def _memory(session: Session, threads: int, blocks: Sequence[Block]) -> int:
    streams = {block.stream: session.run.stream(block.stream) for block in blocks}
    copies = sum(bool(r.bytes_per_pass or r.bytes_spilled) for r in session.references)
    segments = max((len(cuts) for _, cuts in session.segments), default=0)
    logs = sum(stream.commits.nbytes for stream in {**streams, "": session.weights}.values())
    across = len(session.references) * _ROW_BYTES
    returned = sum(len(stream.commits) for stream in streams.values()) * across
    largest = max(
        (len(b.rows) * len(b.chunks) * (streams[b.stream].batches or 1) for b in blocks), default=0
    )
    task = copies * _COPIES * 2 * session.weights.grid.chunk_bytes + 3 * largest * segments * across
    result = returned * len(session.run.table.parameters)
    return PROCESS_BYTES + LOG_FACTOR * logs + 2 * result + threads * task


def _measure_rate(plan: Plan, session: Session, blocks: Sequence[Block]) -> tuple[int, float]:
    """Measure a few chunks of the first row; return their bytes, and bytes per second."""
    if not blocks:
        return 0, 0.0
    stream, grid = session.run.stream(blocks[0].stream), session.weights.grid
    # Compiled or loaded before the clock starts.
    one = np.ones(64, stream.dtype)
    for reference in session.references:
        values = reference.chunk(0)[:1].repeat(64)
        given = None if stream.name in ITERATES else one
        cuts = np.array([0, 64])
        segment_moments(given, one, values, cuts, moments=plan.moments, check_weights=True)
    shards = 1 + (stream.batches or 1)
    chunks = range(max(1, min(grid.num_chunks, _SAMPLE_BYTES // (shards * grid.chunk_bytes))))
    block = Block(stream.name, range(1), chunks)
    start = time.perf_counter()
    measure_block(plan, block)
    taken = time.perf_counter() - start
    sample = _bytes_of(session, most_open(plan.threads), block)
    return sample, sample / taken
