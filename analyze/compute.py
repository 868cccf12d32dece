"""The Dask side: cut a run into blocks, measure them anywhere, put the sums together in one order.

A block is some rows times some inner chunks. Sums are kept by (row, chunk ∩ tensor) and added chunk
after chunk at the end, so blocks, workers and scheduler do not change one byte of the result. (The
order of the sums within a tile is the compiler's: processors with other vector widths may differ in
the last bits.)
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.blocks import Block, cut
from analyze.moment_table import MOMENTS, Moments, StreamMoments
from analyze.moments import moment_kind, segment_moments
from analyze.references import BoundReference, Reference
from capture.store import (
    DamagedError,
    Run,
    Shard,
    Stream,
    UnknownNameError,
    UsageError,
    fetch_ahead,
    open_run,
)
from capture.store.layout import ITERATES, WEIGHTS
from capture.store.place import absolute_address


def compute_moments(
    run: str | os.PathLike[str],
    streams: Sequence[str],
    references: Sequence[Reference],
    *,
    moments: Sequence[str] = MOMENTS,
    scheduler: str = "threads",
    workers: int | None = None,
    rows_per_block: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """Measure every row of `streams` against all `references` in one pass over the run.

    A gradient or update of step t is paired with the weights of step t. Every byte that leads to a
    number is verified. `scheduler` is `threads`, `synchronous`, or the address of a running
    dask.distributed cluster (`tcp://…`, `tls://…`) whose workers see the same paths; `workers` is
    the number of threads, by default one per processor. `progress` is called with the numbers of
    blocks done and of all blocks. Any `InputError` of the run or a reference is raised as it is,
    and gives no numbers.
    """
    threads = schedulers.check(scheduler, workers)
    if not references:
        raise UsageError("there is no reference to measure against", fix="give one, such as final")
    names = tuple(dict.fromkeys(streams))
    token, path = uuid.uuid4().hex, absolute_address(run)
    plan = _Plan(token, path, names, tuple(references), moment_kind(moments))
    try:
        session = _open(plan)
        blocks = [
            block
            for name in names
            for block in cut(session.run.stream(name), threads, rows_per_block)
        ]
        tasks = [partial(_measure, plan, block) for block in blocks]
        results = schedulers.run(tasks, scheduler, threads, progress)
        measured = {name: _assemble(session, name, blocks, results) for name in names}
    finally:
        _open.cache_clear()
    return Moments(tuple(reference.text for reference in references), measured)


@dataclass(frozen=True)
class _Plan:
    """What a worker has to know; `token` keeps one call's open files from serving the next."""

    token: str
    path: str
    streams: tuple[str, ...]
    references: tuple[Reference, ...]
    moments: tuple[str, ...]


# Per chunk of a block: sums [rows, B, R, S, 7] and non-finite counts [rows, B, R, S].
_Partials = list[tuple[NDArray[np.float64], NDArray[np.int64]]]


class _Session:
    """A run with its references, open in one process for one call of `compute_moments`."""

    def __init__(self, plan: _Plan) -> None:
        self.run: Run = open_run(plan.path)
        # The streams first: in a run that is still recording, their weights are there by now.
        for name in plan.streams:
            self.run.stream(name)
        self.weights: Stream = self.run.stream(WEIGHTS)
        self.references: list[BoundReference] = [
            reference.bind(self.run) for reference in plan.references
        ]
        # When `_open` has dropped the session and the last block is done with it.
        weakref.finalize(self, _close, self.references)

    @cached_property
    def segments(self) -> list[tuple[int, NDArray[np.int64]]]:
        """Per inner chunk: its first tensor, and where tensors cut it, from 0 to its length."""
        grid, offsets = self.weights.grid, self.run.table.offsets
        found = []
        for chunk in range(grid.num_chunks):
            start, stop = grid.bounds(chunk)
            first = int(np.searchsorted(offsets, start, "right")) - 1
            last = int(np.searchsorted(offsets, stop, "left"))
            found.append((first, np.clip(offsets[first : last + 1], start, stop) - start))
        return found

    def weights_row(self, stream: Stream, row: int) -> int:
        """Row of the weights at which a row of `stream` was taken."""
        step = int(stream.steps[row])
        try:
            return self.weights.row_of(step)
        except UnknownNameError as error:
            raise DamagedError(
                f"row {row} (step {step}) of {stream.name!r} has no weights of the same step",
                where=self.run.path,
                fix="restore the run from a copy, or record it again",
            ) from error


def _close(references: Sequence[BoundReference]) -> None:
    for reference in references:
        reference.close()


# At most two stay open on a worker that waits for the next call.
@lru_cache(maxsize=2)
def _open(plan: _Plan) -> _Session:
    return _Session(plan)


def _measure(plan: _Plan, block: Block) -> _Partials:
    """Measure one block; runs on a worker."""
    session = _open(plan)
    partials: _Partials = []
    with ExitStack() as stack:
        rows = [_open_row(session, block, row, stack) for row in block.rows]
        # In the order in which they are used below; only what lies on object stores is asked for.
        fetch_ahead([shard for weights, more in rows for shard in (weights, *more)], block.chunks)
        for chunk in block.chunks:
            references = [reference.chunk(chunk) for reference in session.references]
            cuts = session.segments[chunk][1]
            measured = [
                _measure_row(weights, gradients, chunk, references, cuts, plan.moments)
                for weights, gradients in rows
            ]
            sums, nonfinite = (np.stack(part) for part in zip(*measured, strict=True))
            partials.append((sums, nonfinite))
    return partials


def _open_row(
    session: _Session, block: Block, row: int, stack: ExitStack
) -> tuple[Shard, list[Shard]]:
    """Open one row: its weights and, where the stream is not the weights, each of its batches."""
    stream = session.run.stream(block.stream)
    if stream.name in ITERATES:
        weights, gradients = stack.enter_context(stream.open(row)), []
    else:
        weights = stack.enter_context(session.weights.open(session.weights_row(stream, row)))
        batches: Sequence[int | None] = [None] if stream.batches is None else range(stream.batches)
        gradients = [stack.enter_context(stream.open(row, batch)) for batch in batches]
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
            moments=moments,
            check_weights=batch == place == 0,
            check_gradient=place == 0,
        )
        if batch == place == 0:
            weights.confirm(chunk, found.weights_checksum)
        if gradients and place == 0:
            gradients[batch].confirm(chunk, found.gradient_checksum)
        sums[batch, place], nonfinite[batch, place] = found.sums, found.nonfinite
    if chunk == 0:  # once per shard: what is in the file beside the chunks
        for shard in (weights, *gradients):
            shard.verify_rest()
    return sums, nonfinite


def _assemble(
    session: _Session, name: str, blocks: Sequence[Block], results: Sequence[_Partials]
) -> StreamMoments:
    """Add the partial sums of one stream, for each tensor chunk after chunk."""
    stream = session.run.stream(name)
    shape = (
        len(stream.steps),
        stream.batches or 1,
        len(session.references),
        len(session.run.table.parameters),
    )
    array, nonfinite = np.zeros((*shape, len(MOMENTS))), np.zeros(shape, np.int64)
    for block, partials in zip(blocks, results, strict=True):
        if block.stream != name:
            continue
        rows = slice(block.rows.start, block.rows.stop)
        for chunk, (sums, counts) in zip(block.chunks, partials, strict=True):
            first, cuts = session.segments[chunk]
            tensors = slice(first, first + len(cuts) - 1)
            array[rows, :, :, tensors] += sums
            nonfinite[rows, :, :, tensors] += counts
    if stream.batches is None:
        array, nonfinite = array[:, 0], nonfinite[:, 0]
    return StreamMoments(name, stream.steps, stream.batches, array, nonfinite)
