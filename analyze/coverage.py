"""Which coordinates a run never touched: how many are 0 in every saved row, by tensor.

Of the weights and other iterates, what is counted is w_t - w_first: a coordinate that never moved.
Words that never occur, units that never fire and tensors that nothing reads show up here. Only
saved rows are seen, so that a count says "in none of these rows". NaN is not 0.

Blocks are inner chunks of all rows. A block keeps one byte for each of its coordinates, whatever
the number of rows; every byte that leads to a number is verified.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.blocks import most_open, pieces
from analyze.projection import LOG_FACTOR, PROCESS_BYTES, Projection
from analyze.schedulers import Cluster
from analyze.session import Plan, Session, drop, keep, session_of
from capture.store import InputError, Shard, Stream, fetch_ahead
from capture.store.layout import ITERATES, WEIGHTS
from capture.store.place import absolute_address

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

# A block's flags, at most 16 MB with float32; and blocks per worker, so that progress moves.
_MOST_CHUNKS = 16
_BLOCKS_PER_WORKER = 3


@dataclass(frozen=True)
class Coverage:
    """Counts of one stream, by tensor.

    `vectors` is how many there are to count in: T B of a stream of gradients or updates,
    T - 1 of iterates. `never` is int64 ``[P]``, coordinates that are 0 in all of them; `zeros` is
    int64 ``[P]``, how often a coordinate was 0, summed over the vectors. `sizes` is int64 ``[P]``.
    """

    stream: str
    vectors: int
    sizes: Integers
    never: Integers
    zeros: Integers


def measure_coverage(
    run: str | os.PathLike[str],
    streams: Sequence[str] = (),
    *,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Coverage]:
    """Count the coordinates that no saved row of a stream touches.

    Without `streams`, all that have something to count, the weights last; `InputError` where one of
    them, or all, have nothing. Scheduler, workers, progress and other errors are those of
    `analyze.compute.compute_moments`.
    """
    threads = schedulers.check(scheduler, workers)
    plan, session = _open(run, streams, schedulers.tasks_at_once(scheduler, threads))
    names = plan.streams
    blocks = [
        (name, chunks) for name in names for chunks in _cut(session.run.stream(name), threads)
    ]
    parameters = session.run.table.parameters
    counts = {name: np.zeros((2, len(parameters)), np.int64) for name in names}

    def take(number: int, found: list[Integers]) -> None:
        name, chunks = blocks[number]
        for chunk, part in zip(chunks, found, strict=True):
            first = session.segments[chunk][0]
            counts[name][:, first : first + part.shape[1]] += part

    try:
        tasks = [partial(_count, plan, name, chunks) for name, chunks in blocks]
        schedulers.run_each(tasks, scheduler, threads, take, progress)
    finally:
        drop(plan)
    sizes = np.diff(session.run.table.offsets).astype(np.int64)
    return [
        Coverage(name, _vectors(session.run.stream(name)), sizes, *counts[name]) for name in names
    ]


def project_coverage(
    run: str | os.PathLike[str],
    streams: Sequence[str] = (),
    *,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
) -> Projection:
    """Say what `measure_coverage` with the same arguments will cost; errors are the same.

    Reads the logs and, for the rate, some inner chunks of two rows.
    """
    threads = schedulers.check(scheduler, workers)
    plan, session = _open(run, streams, threads)
    opened = [session.run.stream(name) for name in plan.streams]
    logs = sum(stream.commits.nbytes for stream in opened)
    coordinates = session.weights.grid.chunk_bytes // session.weights.dtype.itemsize
    try:
        start = time.perf_counter()
        first, chunks = opened[0], next(_cut(opened[0], threads))
        _look_at(session, first, _rows(first)[:2], range(1), chunks, _counters(session, chunks))
        taken = time.perf_counter() - start
    finally:
        drop(plan)
    shards = min(2, len(_rows(first))) + (first.name in ITERATES)
    sample = shards * len(chunks) * first.grid.chunk_bytes
    total = sum(_bytes_of(stream, most_open(threads)) for stream in opened)
    return Projection(
        rows=sum(map(len, opened)),
        shards=sum(len(stream.commits) for stream in opened),
        threads=threads,
        bytes_to_read=total,
        memory=PROCESS_BYTES + LOG_FACTOR * logs + threads * (_MOST_CHUNKS + 2) * coordinates,
        spilled=0,
        sample=sample,
        rate=sample / taken,
        seconds=total * taken / sample / threads,
    )


def _open(run: str | os.PathLike[str], streams: Sequence[str], tasks: int) -> tuple[Plan, Session]:
    """Open a run for `tasks` at a time in one process; `plan.streams` are those to count in."""
    plan = Plan(uuid.uuid4().hex, absolute_address(run), (), (), (), tasks)
    session = Session(plan)
    names = _choose(session, streams)
    plan = replace(plan, streams=names, seen=session.seen(names))
    keep(plan, session)
    return plan, session


def _bytes_of(stream: Stream, allowed: int) -> int:
    """Bytes that counting in one stream reads; the first of iterates once per piece of the rows."""
    total = int(stream.commits.sizes.sum())
    if stream.name not in ITERATES:
        return total
    again = len(list(pieces(_rows(stream), 1, allowed))) - 1
    return total + again * int(stream.commits.sizes[0])


def _choose(session: Session, wanted: Sequence[str]) -> tuple[str, ...]:
    run = session.run
    names = tuple(dict.fromkeys(wanted or [*run.stream_names[1:], WEIGHTS]))
    counted = tuple(name for name in names if _vectors(run.stream(name)))
    empty = [name for name in names if name not in counted]
    if not counted or (wanted and empty):
        raise InputError(
            f"there are too few rows in {empty[0]!r}",
            where=run.path,
            fix="choose another --stream, or wait until more is recorded",
        )
    return counted


def _vectors(stream: Stream) -> int:
    return len(_rows(stream)) * (stream.batches or 1)


def _rows(stream: Stream) -> range:
    """The rows to count in; the first of iterates is what the others are compared with."""
    return range(1 if stream.name in ITERATES else 0, len(stream))


def _cut(stream: Stream, workers: int) -> Iterator[range]:
    """Cut the inner chunks of a stream into blocks."""
    total = stream.grid.num_chunks
    length = min(_MOST_CHUNKS, math.ceil(total / (_BLOCKS_PER_WORKER * workers)))
    for first in range(0, total, length):
        yield range(first, min(first + length, total))


def _count(plan: Plan, name: str, chunks: range) -> list[Integers]:
    """Count in some chunks of all rows; runs on a worker. Per chunk never and zeros, ``[2, S]``."""
    session = session_of(plan)
    stream = session.run.stream(name)
    counting = _counters(session, chunks)
    for ranges in pieces(_rows(stream), stream.batches or 1, most_open(plan.threads)):
        for some, batches in ranges:
            _look_at(session, stream, some, batches, chunks, counting)
    return [each.counts() for each in counting]


def _look_at(
    session: Session,
    stream: Stream,
    rows: range,
    batches: range,
    chunks: range,
    counting: Sequence[_Counting],
) -> None:
    numbers: Sequence[int | None] = [None] if stream.batches is None else batches
    with ExitStack() as stack:
        start = [stack.enter_context(stream.open(0))] if stream.name in ITERATES else []
        shards = [stack.enter_context(stream.open(row, batch)) for row in rows for batch in numbers]
        # In the order in which they are used below; only what lies on object stores is asked for.
        fetch_ahead([*start, *shards], chunks)
        for chunk, counts in zip(chunks, counting, strict=True):
            if session.stopped:
                raise CancelledError
            zero = _verified(start[0], chunk) if start else 0
            for shard in shards:
                counts.add(_verified(shard, chunk) != zero)


def _verified(shard: Shard, chunk: int) -> NDArray[Any]:
    if chunk == 0:  # once per shard: what is in the file beside the chunks
        shard.verify_rest()
    values = shard.chunk(chunk)
    shard.verify_chunk(chunk)
    return values


def _counters(session: Session, chunks: range) -> list[_Counting]:
    return [_Counting(session, chunk) for chunk in chunks]


class _Counting:
    """The counts of one inner chunk, cut into the S segments of its tensors."""

    def __init__(self, session: Session, chunk: int) -> None:
        start, stop = session.weights.grid.bounds(chunk)
        self._cuts: list[tuple[int, int]] = list(pairwise(session.segments[chunk][1].tolist()))
        self._touched: Flags = np.zeros(stop - start, bool)
        self._zeros = np.zeros(len(self._cuts), np.int64)

    def add(self, touched: Flags) -> None:
        """Take one vector: which of its coordinates are not 0."""
        self._zeros += self._without(touched)
        self._touched |= touched

    def counts(self) -> Integers:
        """Give never and zeros of each segment, ``[2, S]``."""
        return np.stack([self._without(self._touched), self._zeros])

    def _without(self, touched: Flags) -> Integers:
        counts = [
            stop - start - np.count_nonzero(touched[start:stop]) for start, stop in self._cuts
        ]
        return np.array(counts, np.int64)
