"""The pass over a run that sums in Adam's metric: state after state, chunk after chunk.

A block is one kept state times some inner chunks. Each takes the state, the weights of its step,
and every gradient of that step once; the references as often as there are blocks. Sums are kept by
chunk ∩ tensor and added chunk after chunk, so that blocks and workers change no byte of a result.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.blocks import most_open
from analyze.references import Reference
from analyze.schedulers import Cluster
from analyze.second_moments import Diagonal, find_diagonals, find_places
from analyze.session import Plan, Session, drop, keep, session_of
from capture.store import Run, Shard, fetch_ahead
from capture.store.kept_states import KeptState
from capture.store.layout import WEIGHTS
from capture.store.objects import ObjectPath
from capture.store.place import absolute_address

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_BLOCKS_PER_WORKER = 3


@dataclass(frozen=True)
class Fresh:
    """The sums of one stream: `dist` ``[K, R, P]``, else as `analyze.adam.Entry`."""

    dist: Floats
    grad: Floats
    known: Integers


def measure(
    path: str | os.PathLike[str],
    steps: Mapping[str, Integers],
    references: Sequence[Reference],
    *,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fresh] | str:
    """Sum in Adam's metric at some steps of each stream, all of them with a kept state.

    In words, why there is no metric. Arguments and errors as in `analyze.adam.adam_moments`.
    """
    threads = schedulers.check(scheduler, workers)
    plan = Plan(
        uuid.uuid4().hex,
        absolute_address(path),
        tuple(steps),
        tuple(references),
        (),
        schedulers.tasks_at_once(scheduler, threads),
    )
    session = Session(plan)
    plan = replace(plan, seen=session.seen(plan.streams))
    keep(plan, session)
    try:
        blocks = list(cut(session.run, steps, threads))
        tasks = [partial(_measure, plan, block) for block in blocks]
        results = schedulers.run(tasks, scheduler, threads, progress)
    finally:
        drop(plan)
    measured = [result for result in results if not isinstance(result, str)]
    if len(measured) < len(results):
        return next(result for result in results if isinstance(result, str))
    return {name: _assemble(session, name, steps[name], blocks, measured) for name in steps}


@dataclass(frozen=True)
class Block:
    """The state kept after `step` updates, the streams with a row there, and some inner chunks."""

    step: int
    streams: tuple[str, ...]
    chunks: range


def cut(run: Run, steps: Mapping[str, Integers], threads: int) -> Iterator[Block]:
    """Cut the work into blocks: one for each state, more where a few keep not all threads busy.

    Each block verifies the whole state, so one that has to be fetched is never cut.
    """
    grid = run.stream(WEIGHTS).grid
    states = sorted({int(step) for listed in steps.values() for step in listed})
    parts = 1
    if not isinstance(run.path, ObjectPath) and len(states) < threads:
        parts = min(grid.num_chunks, -(-_BLOCKS_PER_WORKER * threads // len(states)))
    size = -(-grid.num_chunks // parts)
    for step in states:
        streams = tuple(name for name in steps if step in steps[name])
        for first in range(0, grid.num_chunks, size):
            yield Block(step, streams, range(first, min(first + size, grid.num_chunks)))


@dataclass(frozen=True)
class _Measured:
    """The sums of a block: for each chunk `dist` ``[R, S]`` and `grad` ``[N, S]``.

    S tensors cut a chunk; N are the gradients of the block, stream after stream. `known` is whether
    a tensor has second moments, int64 ``[P]``.
    """

    known: Integers
    dist: list[Floats]
    grad: list[Floats]


def _measure(plan: Plan, block: Block) -> _Measured | str:
    """Measure one block; runs on a worker, which opens no more of it at a time than it may."""
    session = session_of(plan)
    with KeptState(session.run.path, block.step) as state:
        places = find_places(session.run, state.tree)
        found = places if isinstance(places, str) else find_diagonals(session.run, places, state)
        if isinstance(found, str):
            return found
        metric = _Metric(session, state, found)
        known = np.array([diagonal is not None for diagonal in found], np.int64)
        gradients = list(_gradients(session.run, block))
        most = max(1, most_open(plan.threads) - 1)
        pieces = [gradients[first : first + most] for first in range(0, len(gradients), most)]
        by_piece = [_grad_sums(metric, block, piece) for piece in pieces]
        grad = [np.concatenate(parts) for parts in zip(*by_piece, strict=True)]
        return _Measured(known, _dist_sums(metric, block), grad)


def _gradients(run: Run, block: Block) -> Iterator[tuple[str, int | None]]:
    """Name the gradients of a block: stream and batch."""
    for name in block.streams:
        batches = run.stream(name).batches
        for batch in [None] if batches is None else range(batches):
            yield name, batch


# Each tensor's part of a chunk, with M there; `None` where the tensor has none.
_Parts = list[tuple[slice, Floats | None]]


@dataclass(frozen=True)
class _Metric:
    """An open state, and the diagonal of M for each tensor."""

    session: Session
    state: KeptState
    diagonals: Sequence[Diagonal | None]

    def parts(self, chunk: int) -> _Parts:
        """Compute M on one inner chunk, tensor by tensor."""
        if self.session.stopped:
            raise CancelledError
        first, cuts = self.session.segments[chunk]
        before = self.session.weights.grid.bounds(chunk)[0] - self.session.run.table.offsets
        parts: _Parts = []
        for tensor, (start, stop) in enumerate(pairwise(cuts.tolist()), first):
            diagonal, skip = self.diagonals[tensor], int(before[tensor])
            part = (self.state, skip + start, skip + stop)
            parts.append((slice(start, stop), None if diagonal is None else diagonal.read(*part)))
        return parts


def _dist_sums(metric: _Metric, block: Block) -> list[Floats]:
    """Sum the distances to every reference, chunk by chunk ``[R, S]``."""
    session = metric.session
    with session.weights.open(session.weights.row_of(block.step)) as weights:
        fetch_ahead([weights], block.chunks)
        sums = []
        for chunk in block.chunks:
            parts, w = metric.parts(chunk), _verified(weights, chunk)
            found = [_sum_dist(w, bound.chunk(chunk), parts) for bound in session.references]
            sums.append(np.array(found))
        if block.chunks.start == 0:  # once per state: what is in the file beside the chunks
            weights.verify_rest()
    return sums


def _grad_sums(
    metric: _Metric, block: Block, gradients: Sequence[tuple[str, int | None]]
) -> list[Floats]:
    """Sum the norms of some gradients, chunk by chunk ``[N, S]``."""
    run = metric.session.run
    with ExitStack() as stack:
        shards = [
            stack.enter_context(run.stream(name).open(run.stream(name).row_of(block.step), batch))
            for name, batch in gradients
        ]
        fetch_ahead(shards, block.chunks)
        sums = []
        for chunk in block.chunks:
            parts = metric.parts(chunk)
            sums.append(np.array([_sum_grad(_verified(s, chunk), parts) for s in shards]))
        if block.chunks.start == 0:
            for shard in shards:
                shard.verify_rest()
    return sums


def _verified(shard: Shard, chunk: int) -> NDArray[Any]:
    # In this order: what was fetched need not be fetched again to be verified.
    values = shard.chunk(chunk)
    shard.verify_chunk(chunk)
    return values


def _sum_dist(weights: NDArray[Any], reference: NDArray[Any], parts: _Parts) -> Floats:
    """Σ M (w - w*)² of each part, float64 ``[S]``; 0 where there is no M."""
    sums = np.zeros(len(parts))
    with np.errstate(all="ignore"):
        for place, (part, diagonal) in enumerate(parts):
            if diagonal is not None:
                e = np.subtract(weights[part], reference[part], dtype=np.float64)
                e *= e
                e *= diagonal
                sums[place] = e.sum()
    return sums


def _sum_grad(gradient: NDArray[Any], parts: _Parts) -> Floats:
    """Σ g² / M of each part, float64 ``[S]``; 0 where there is no M."""
    sums = np.zeros(len(parts))
    with np.errstate(all="ignore"):
        for place, (part, diagonal) in enumerate(parts):
            if diagonal is not None:
                g = gradient[part].astype(np.float64)
                g *= g
                g /= diagonal
                sums[place] = g.sum()
    return sums


def _assemble(
    session: Session,
    name: str,
    steps: Integers,
    blocks: Sequence[Block],
    results: Sequence[_Measured],
) -> Fresh:
    """Add the partial sums of one stream, for each tensor chunk after chunk."""
    tensors, batches = len(session.run.table.parameters), session.run.stream(name).batches
    dist = np.zeros((len(steps), len(session.references), tensors))
    grad = np.zeros((len(steps), batches or 1, tensors))
    known = np.zeros((len(steps), tensors), np.int64)
    for block, measured in zip(blocks, results, strict=True):
        if name not in block.streams:
            continue
        place = int(np.searchsorted(steps, block.step))
        own = [index for index, (n, _) in enumerate(_gradients(session.run, block)) if n == name]
        known[place] = measured.known
        for number, chunk in enumerate(block.chunks):
            first, cuts = session.segments[chunk]
            inside = slice(first, first + len(cuts) - 1)
            dist[place, :, inside] += measured.dist[number]
            grad[place, :, inside] += measured.grad[number][own]
    return Fresh(dist, grad[:, 0] if batches is None else grad, known)
