"""What a measurement will cost, said before it starts: bytes, memory, space for a spill, time."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analyze import schedulers
from analyze.adam import states_to_read
from analyze.blocks import Block, cut, most_open, pieces
from analyze.cache import Where
from analyze.compute import measure_block
from analyze.moments import MOMENTS, moment_kind, segment_moments
from analyze.references import Reference, parse_reference
from analyze.schedulers import Cluster
from analyze.session import Plan, Session, drop, keep, weights_row
from analyze.summing import lacking_moments
from analyze.tables import choose_streams
from capture.store import open_run
from capture.store.layout import ITERATES
from capture.store.place import absolute_address

# Python, numpy, numba, pyarrow and dask without any data: 126 MB were measured, and some air.
_PROCESS_BYTES = 160 * 2**20
# Lines of the logs as objects of their own, numbers taken from them.
_LOG_FACTOR = 2
# Copies of one chunk of a reference that is no view: the values as stored, widened and joined.
_COPIES = 4
_ROW_BYTES = 8 * (len(MOMENTS) + 1)
_SAMPLE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Projection:
    """The cost of one call of `compute_moments`; sizes in bytes.

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
    run: str | os.PathLike[str],
    streams: Sequence[str],
    references: Sequence[Reference],
    *,
    moments: Sequence[str] = MOMENTS,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    rows_per_block: int | None = None,
) -> Projection:
    """Say what `compute_moments` with the same arguments will cost; errors are the same.

    Reads the logs and, for the rate, a few megabytes. A cluster is not asked: its workers count as
    `workers` threads that read as fast as this process does.
    """
    threads = schedulers.check(scheduler, workers)
    names, kind = tuple(dict.fromkeys(streams)), moment_kind(moments)
    where = absolute_address(run)
    plan = Plan(uuid.uuid4().hex, where, names, tuple(references), kind, threads)
    session = Session(plan)
    keep(plan, session)
    try:
        blocks = [
            b for name in names for b in cut(session.run.stream(name), threads, rows_per_block)
        ]
        total = sum(reference.bytes_once for reference in session.references)
        total += sum(_bytes_of(session, threads, block) for block in blocks)
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


def project_run(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> list[Projection]:
    """Say what `analyze.measure_run` with the same arguments will cost, one pass after another.

    Empty where all its moments were kept, so that nothing is read; what Adam's metric reads beside
    them says `project_metric`.
    """
    parsed = [parse_reference(text) for text in dict.fromkeys(references)]
    chosen = choose_streams(open_run(path), streams)
    return [
        project(path, names, lacking, scheduler=scheduler, workers=workers)
        for names, lacking in lacking_moments(path, chosen, parsed, where=cache)
    ]


def project_metric(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    cache: Where = True,
) -> list[str]:
    """Say in words what Adam's metric reads beside the passes of `project_run`, if anything."""
    parsed = [parse_reference(text) for text in dict.fromkeys(references)]
    chosen = choose_streams(open_run(path), streams)
    count, nbytes = states_to_read(path, chosen, parsed, where=cache)
    if not count:
        return []
    states = "1 kept state" if count == 1 else f"{count} kept states"
    return [f"for Adam's metric reads {states} of {size(nbytes)}, and the rows of their steps"]


def _bytes_of(session: Session, threads: int, block: Block) -> int:
    """Bytes of one block, from the committed sizes; what is beside the chunks goes with chunk 0."""
    stream, grid = session.run.stream(block.stream), session.weights.grid
    inside, batches = len(block.chunks) * grid.chunk_bytes, stream.batches or 1
    parts = list(pieces(block.rows, batches, most_open(threads)))
    rest = grid.num_chunks * grid.chunk_bytes * (block.chunks.start == 0)
    total = 0
    for row in block.rows:
        sizes = stream.commits.sizes[row * batches : (row + 1) * batches]
        passes = [(size, 1) for size in sizes.tolist()]
        if stream.name not in ITERATES:
            weights = session.weights.commits.sizes[weights_row(session.run, stream, row)]
            passes.append((int(weights), len(parts[0])))
        total += sum(times * (inside + (size - rest if rest else 0)) for size, times in passes)
    again = sum(reference.bytes_per_pass for reference in session.references)
    first, last = grid.bounds(block.chunks.start)[0], grid.bounds(block.chunks[-1])[1]
    share = (last - first) / grid.num_elements
    return total + round(sum(map(len, parts)) * again * share)


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
    return _PROCESS_BYTES + _LOG_FACTOR * logs + 2 * result + threads * task


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
    sample = _bytes_of(session, plan.threads, block)
    return sample, sample / taken


def size(nbytes: float) -> str:
    """Write a number of bytes with its unit, three digits: ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def duration(seconds: float) -> str:
    """Write a time as one would say it: ``8 s``, ``12 min``, ``3.4 h``."""
    if seconds < 1:
        return "a second"
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 120 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
