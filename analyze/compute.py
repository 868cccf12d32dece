"""The Dask side: cut a run into blocks, measure them anywhere, put the sums together in one order.

A block is some rows times some inner chunks. Sums are kept by (row, chunk ∩ tensor) and added chunk
after chunk at the end, so blocks, workers and scheduler do not change one byte of the result. (The
order of the sums within a tile is the compiler's: processors with other vector widths may differ in
the last bits.)
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.blocks import Block, cut, most_open, pieces
from analyze.moment_table import (
    MOMENTS,
    NEXT_BOTH,
    NEXT_GRADIENT,
    NEXT_REFERENCE,
    Moments,
    StreamMoments,
)
from analyze.moments import moment_kind, segment_moments
from analyze.references import Reference
from analyze.schedulers import Cluster
from analyze.session import Plan, Session, drop, keep, session_of, weights_row
from capture.store import Shard, UsageError, fetch_ahead
from capture.store.layout import ITERATES
from capture.store.place import absolute_address


def compute_moments(
    run: str | os.PathLike[str],
    streams: Sequence[str],
    references: Sequence[Reference],
    *,
    moments: Sequence[str] = MOMENTS,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    rows_per_block: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Measure every row of `streams` against all `references` in one pass over the run.

    A gradient or update of step t is paired with the weights of step t. Every byte that leads to a
    number is verified. `scheduler` is `threads`, `synchronous`, the address of a running
    dask.distributed cluster whose workers see the same paths, or a `Cluster` where it needs
    certificates; `workers` is the number of threads, by default one per processor. `progress` is
    called with the numbers of blocks done and of all blocks. Any `InputError` of the run or a
    reference is raised as it is, and gives no numbers. A mean, or a reference on an object store,
    is kept in the folder for temporary files (`TMPDIR`) of every process that works, until the end.
    """
    threads = schedulers.check(scheduler, workers)
    if not references:
        raise UsageError("there is no reference to measure against", fix="give one, such as final")
    names = tuple(dict.fromkeys(streams))
    plan = Plan(
        uuid.uuid4().hex,
        absolute_address(run),
        names,
        tuple(references),
        moment_kind(moments),
        schedulers.tasks_at_once(scheduler, threads),
    )
    session = Session(plan)
    plan = replace(plan, seen=session.seen(names))
    keep(plan, session)
    try:
        sums = {name: _Sums(session, name) for name in names}
        blocks = [
            block
            for name in names
            for block in cut(session.run.stream(name), threads, rows_per_block)
        ]
        tasks = [partial(measure_block, plan, block) for block in blocks]
        schedulers.run_each(
            tasks,
            scheduler,
            threads,
            lambda number, part: sums[blocks[number].stream].add(blocks[number], part),
            progress,
        )
    finally:
        drop(plan)
    return Moments(
        tuple(reference.text for reference in references),
        {name: part.moments() for name, part in sums.items()},
    )


# Per chunk of a block: sums [rows, B, R, S, 7] and non-finite counts [rows, B, R, S].
_Partials = list[tuple[NDArray[np.float64], NDArray[np.int64]]]


def measure_block(plan: Plan, block: Block) -> _Partials:
    """Measure one block; runs on a worker, which opens no more of it at a time than it may."""
    session = session_of(plan)
    batches = session.run.stream(block.stream).batches or 1
    by_rows = [
        [_measure_piece(session, plan, block, rows, some) for rows, some in ranges]
        for ranges in pieces(block.rows, batches, most_open(plan.threads))
    ]
    if len(by_rows) == len(by_rows[0]) == 1:
        return by_rows[0][0]
    return [_join(by_rows, chunk) for chunk in range(len(block.chunks))]


def _join(by_rows: list[list[_Partials]], chunk: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Put the pieces of one chunk together: batches on axis 1, then rows on axis 0."""
    sums, counts = (
        np.concatenate(
            [np.concatenate([piece[chunk][kind] for piece in row], axis=1) for row in by_rows]
        )
        for kind in range(2)
    )
    return sums, counts


def _measure_piece(
    session: Session, plan: Plan, block: Block, rows: range, batches: range
) -> _Partials:
    partials: _Partials = []
    with ExitStack() as stack:
        opened = [_open_row(session, block, row, batches, stack) for row in rows]
        # In the order in which they are used below; only what lies on object stores is asked for.
        fetch_ahead([shard for weights, more in opened for shard in (weights, *more)], block.chunks)
        for chunk in block.chunks:
            if session.stopped:
                raise CancelledError
            references = [reference.chunk(chunk) for reference in session.references]
            cuts = session.segments[chunk][1]
            measured = [
                _measure_row(weights, gradients, chunk, references, cuts, plan.moments)
                for weights, gradients in opened
            ]
            sums, nonfinite = (np.stack(part) for part in zip(*measured, strict=True))
            partials.append((sums, nonfinite))
    return partials


def _open_row(
    session: Session, block: Block, row: int, batches: range, stack: ExitStack
) -> tuple[Shard, list[Shard]]:
    """Open one row: its weights and, where the stream is not the weights, some of its batches."""
    stream = session.run.stream(block.stream)
    if stream.name in ITERATES:
        weights, gradients = stack.enter_context(stream.open(row)), []
    else:
        weights = stack.enter_context(session.weights.open(weights_row(session.run, stream, row)))
        numbers: Sequence[int | None] = [None] if stream.batches is None else batches
        gradients = [stack.enter_context(stream.open(row, batch)) for batch in numbers]
    return weights, gradients


def _measure_row(
    weights: Shard,
    gradients: list[Shard],
    chunk: int,
    references: list[NDArray[Any]],
    cuts: NDArray[np.int64],
    moments: tuple[str, ...],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Measure one inner chunk of one row: sums ``[B, R, S, 7]``, counts ``[B, R, S]``.

    The first pass over the bytes of a shard takes their checksum as well.
    """
    w, g = weights.chunk(chunk), None
    shape = (max(1, len(gradients)), len(references), len(cuts) - 1)
    sums, nonfinite = np.empty((*shape, len(MOMENTS))), np.empty(shape, np.int64)
    for batch, place in np.ndindex(shape[:2]):
        if gradients and place == 0:
            g = gradients[batch].chunk(chunk)
        found = segment_moments(
            g,
            w,
            references[place],
            cuts,
            moments=_lacking(moments, batch, place),
            check_weights=batch == place == 0,
            check_gradient=place == 0,
        )
        if batch == place == 0:
            weights.confirm(chunk, found.weights_checksum)
        if gradients and place == 0:
            gradients[batch].confirm(chunk, found.gradient_checksum)
        sums[batch, place], nonfinite[batch, place] = found.sums, found.nonfinite
    if moments == MOMENTS and gradients:
        sums[1:, :, :, _OF_WEIGHTS] = sums[:1, :, :, _OF_WEIGHTS]
        sums[:, 1:, :, _OF_GRADIENT] = sums[:, :1, :, _OF_GRADIENT]
    if chunk == 0:  # once per shard: what is in the file beside the chunks
        for shard in (weights, *gradients):
            shard.verify_rest()
    return sums, nonfinite


# What is the same for every gradient at w, and what for every w*; ‖w‖² is both.
_OF_WEIGHTS = [MOMENTS.index(name) for name in ("ee", "we", "ww")]
_OF_GRADIENT = [MOMENTS.index(name) for name in ("gg", "gw", "ww")]


def _lacking(moments: tuple[str, ...], batch: int, reference: int) -> tuple[str, ...]:
    """Which of `moments` the sums of the batches and references before do not have already."""
    if moments != MOMENTS or batch == reference == 0:
        return moments
    if batch and reference:
        return NEXT_BOTH
    return NEXT_GRADIENT if batch else NEXT_REFERENCE


class _Sums:
    """The sums of one stream: partial ones are added for each tensor chunk after chunk.

    Blocks may come in any order; those whose predecessors are missing wait.
    """

    def __init__(self, session: Session, name: str) -> None:
        # Not the session itself: it closes its references when nobody holds it.
        self._segments = session.segments
        self._stream = session.run.stream(name)
        rows, parameters = len(self._stream.steps), session.run.table.parameters
        shape = (rows, self._stream.batches or 1, len(session.references), len(parameters))
        self._array, self._nonfinite = np.zeros((*shape, len(MOMENTS))), np.zeros(shape, np.int64)
        self._next: dict[range, int] = {}
        self._waiting: dict[tuple[range, int], tuple[Block, _Partials]] = {}

    def add(self, block: Block, partials: _Partials) -> None:
        """Take the partial sums of one block."""
        rows = block.rows
        self._waiting[rows, block.chunks.start] = block, partials
        while (key := (rows, self._next.get(rows, 0))) in self._waiting:
            block, partials = self._waiting.pop(key)
            self._add(block, partials)
            self._next[rows] = block.chunks.stop

    def _add(self, block: Block, partials: _Partials) -> None:
        rows = slice(block.rows.start, block.rows.stop)
        for chunk, (sums, counts) in zip(block.chunks, partials, strict=True):
            first, cuts = self._segments[chunk]
            tensors = slice(first, first + len(cuts) - 1)
            self._array[rows, :, :, tensors] += sums
            self._nonfinite[rows, :, :, tensors] += counts

    def moments(self) -> StreamMoments:
        """Give the sums when every block was taken."""
        assert not self._waiting, "every block was taken"
        stream, array, nonfinite = self._stream, self._array, self._nonfinite
        if stream.batches is None:
            array, nonfinite = array[:, 0], nonfinite[:, 0]
        return StreamMoments(stream.name, stream.steps, stream.batches, array, nonfinite)
