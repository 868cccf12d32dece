"""The pass over a run that sums in Adam's metric: state after state, chunk after chunk.

A block is one kept state times some inner chunks. Each takes the state, the weights of its step,
and every gradient of that step once; the references as often as there are blocks. Sums are kept by
chunk ∩ tensor and added chunk after chunk, so that blocks and workers change no byte of a result.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.references import BoundReference, Reference
from analyze.second_moments import Diagonal, find_diagonals, find_places
from capture.store import MappedShard, Run, Stream, open_run
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
    path: str,
    steps: Mapping[str, Integers],
    references: Sequence[Reference],
    *,
    scheduler: Any = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fresh] | str:
    """Sum in Adam's metric at some steps of each stream, all of them with a kept state.

    In words, why there is no metric. Arguments and errors as in `analyze.adam.adam_moments`.
    """
    threads = schedulers.check(scheduler, workers)
    known = sorted({int(step) for listed in steps.values() for step in listed})
    at = {step: tuple(name for name in steps if step in steps[name]) for step in known}
    plan = _Plan(uuid.uuid4().hex, absolute_address(path), tuple(references))
    try:
        session = _open(plan)
        blocks = [
            _Block(step, at[step], part) for step in known for part in session.cut(at, threads)
        ]
        tasks = [partial(_measure, plan, block) for block in blocks]
        results = schedulers.run(tasks, scheduler, threads, progress)
        reasons = [result for result in results if isinstance(result, str)]
        if reasons:
            return reasons[0]
        measured = [result for result in results if not isinstance(result, str)]
        return {
            name: _assemble(session, name, listed, blocks, measured)
            for name, listed in steps.items()
        }
    finally:
        _open.cache_clear()


@dataclass(frozen=True)
class _Plan:
    """What a worker has to know; `token` keeps one call's open files from serving the next."""

    token: str
    path: str
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class _Block:
    """The state kept after `step` updates, the streams with a row there, and some inner chunks."""

    step: int
    streams: tuple[str, ...]
    chunks: range


@dataclass(frozen=True)
class _Partial:
    """The sums of one inner chunk cut into S tensors: `dist` ``[R, S]``, `grad` ``[B, S]``."""

    dist: Floats
    grad: dict[str, Floats]


@dataclass(frozen=True)
class _Measured:
    """The sums of a block by chunk, and which tensors have second moments, int64 ``[P]``."""

    known: Integers
    partials: list[_Partial]


class _Session:
    """A run with its references, open in one process for one call of `measure`."""

    def __init__(self, plan: _Plan) -> None:
        self.run: Run = open_run(plan.path)
        self.weights: Stream = self.run.stream(WEIGHTS)
        self.references: list[BoundReference] = [
            reference.bind(self.run) for reference in plan.references
        ]
        # When `_open` has dropped the session and the last block is done with it.
        weakref.finalize(self, _close, self.references)

    def cut(self, states: Mapping[int, Any], threads: int) -> Iterator[range]:
        """Cut the inner chunks so that a few states keep all threads busy.

        Each block verifies the whole state, so one that has to be fetched is never cut.
        """
        chunks, parts = self.weights.grid.num_chunks, 1
        if not isinstance(self.run.path, ObjectPath) and len(states) < threads:
            parts = -(-_BLOCKS_PER_WORKER * threads // len(states))
        size = -(-chunks // min(parts, chunks))
        for first in range(0, chunks, size):
            yield range(first, min(first + size, chunks))

    def segments(self, chunk: int) -> tuple[int, Integers]:
        """Give the first tensor of a chunk, and where tensors cut it, from 0 to its length."""
        offsets = self.run.table.offsets
        start, stop = self.weights.grid.bounds(chunk)
        first = int(np.searchsorted(offsets, start, "right")) - 1
        last = int(np.searchsorted(offsets, stop, "left"))
        return first, np.clip(offsets[first : last + 1], start, stop) - start


def _close(references: Sequence[BoundReference]) -> None:
    for reference in references:
        reference.close()


# At most two stay open on a worker that waits for the next call.
@lru_cache(maxsize=2)
def _open(plan: _Plan) -> _Session:
    return _Session(plan)


def _measure(plan: _Plan, block: _Block) -> _Measured | str:
    """Measure one block; runs on a worker."""
    session = _open(plan)
    with ExitStack() as stack:
        state = stack.enter_context(KeptState(session.run.path, block.step))
        places = find_places(session.run, state.tree)
        found = places if isinstance(places, str) else find_diagonals(session.run, places, state)
        if isinstance(found, str):
            return found
        row = session.weights.row_of(block.step)
        weights = stack.enter_context(session.weights.open(row))
        gradients = {
            name: [stack.enter_context(s) for s in _shards(session.run.stream(name), block.step)]
            for name in block.streams
        }
        if block.chunks.start == 0:  # once per state: what is in the files beside the chunks
            for shard in (weights, *(shard for shards in gradients.values() for shard in shards)):
                shard.verify_rest()
        partials = []
        for chunk in block.chunks:
            parts = _diagonals(session, state, found, chunk)
            w = _verified(weights, chunk)
            dist = [_sum_dist(w, bound.chunk(chunk), parts) for bound in session.references]
            grad = {
                name: np.array([_sum_grad(_verified(shard, chunk), parts) for shard in shards])
                for name, shards in gradients.items()
            }
            partials.append(_Partial(np.array(dist), grad))
    return _Measured(np.array([diagonal is not None for diagonal in found], np.int64), partials)


def _shards(stream: Stream, step: int) -> Iterator[MappedShard]:
    for batch in [None] if stream.batches is None else range(stream.batches):
        yield stream.open(stream.row_of(step), batch)


# Each tensor's part of a chunk, with M there; `None` where the tensor has none.
_Parts = list[tuple[slice, Floats | None]]


def _diagonals(
    session: _Session, state: KeptState, found: Sequence[Diagonal | None], chunk: int
) -> _Parts:
    first, cuts = session.segments(chunk)
    before = session.weights.grid.bounds(chunk)[0] - session.run.table.offsets
    parts: _Parts = []
    for tensor, (start, stop) in enumerate(pairwise(cuts.tolist()), first):
        diagonal, skip = found[tensor], int(before[tensor])
        values = None if diagonal is None else diagonal.read(state, skip + start, skip + stop)
        parts.append((slice(start, stop), values))
    return parts


def _verified(shard: MappedShard, chunk: int) -> NDArray[Any]:
    shard.verify_chunk(chunk)
    return shard.chunk(chunk)


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
    session: _Session,
    name: str,
    steps: Integers,
    blocks: Sequence[_Block],
    results: Sequence[_Measured],
) -> Fresh:
    """Add the partial sums of one stream, for each tensor chunk after chunk."""
    tensors, batches = len(session.run.table.parameters), session.run.stream(name).batches
    dist = np.zeros((len(steps), len(session.references), tensors))
    grad = np.zeros((len(steps), batches or 1, tensors))
    known = np.zeros((len(steps), tensors), np.int64)
    for block, measured in zip(blocks, results, strict=True):
        if name in block.streams:
            place = int(np.searchsorted(steps, block.step))
            known[place] = measured.known
            for chunk, partial_sums in zip(block.chunks, measured.partials, strict=True):
                first, cuts = session.segments(chunk)
                own = slice(first, first + len(cuts) - 1)
                dist[place, :, own] += partial_sums.dist
                grad[place, :, own] += partial_sums.grad[name]
    return Fresh(dist, grad[:, 0] if batches is None else grad, known)
