"""The products between the rows of a stream, by group of tensors: all pairs, or those of some lags.

Nothing here depends on a reference. With the moments of the rows (`analyze.compute`), which do,
every quantity on a pair follows (`analyze.pairs`), the PCA of the path from distances alone
(`analyze.path`), and the noise of a full gradient from the products of batches (`analyze.noise`).

Everything is read and multiplied in float64, tile by tile, from files that are mapped or a window
of them (`analyze.row_bytes`): memory is bounded by workers × windows and by what is returned, open
files by what the system allows. Sums are added in an order that follows from the run and the
question, so that blocks, workers, scheduler and limits do not change one byte of the result on
processors of one kind.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from analyze import schedulers
from analyze.blocks import most_open
from analyze.chain import SUMS, Piece, Segment, Values, batch_sums, chain_sums, direct_sums
from analyze.pair_blocks import PairBlock, choose_pairs, cut_pairs, cut_stretches
from analyze.row_bytes import Integers, RowBytes
from analyze.schedulers import Cluster
from analyze.sums import sum_groups
from capture.store import Run, open_run
from capture.store.layout import ITERATES
from capture.store.place import absolute_address


@dataclass(frozen=True)
class Gram:
    """Products between the rows of one stream; K groups of tensors.

    `steps` is int64 ``[T]``, `batches` B or `None`, `pairs` int64 ``[N, 2]`` are rows i < j.
    `sums` maps the names of `SUMS` to float64 ``[N, B, K]``, B = 1 where a stream has no batches;
    of points such as the weights there is ``dd`` alone. `batch_sums` ⟨g_b, g_b'⟩ of each row is
    ``[T, B, B, K]``, `None` without batches. Gradients are as stored: clipped, if they were.
    """

    stream: str
    steps: Integers
    batches: int | None
    pairs: Integers
    sums: dict[str, Values]
    batch_sums: Values | None


def compute_gram(
    run: str | os.PathLike[str],
    stream: str,
    groups: NDArray[np.int64],
    *,
    lags: Sequence[int] | None = None,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Gram:
    """Multiply the rows of `stream`, and the weights of their steps, with each other.

    `groups` is the group of each tensor, int64 ``[P]``, numbered from 0. Without `lags`, all pairs;
    else those whose steps differ by one of them, in updates. Every byte that leads to a number is
    verified. Scheduler, workers and progress are those of `analyze.compute.compute_moments`; any
    `InputError` of the run is raised as it is, and gives no numbers.
    """
    threads = schedulers.check(scheduler, workers)
    together = schedulers.tasks_at_once(scheduler, threads)
    try:
        session, pairs, blocks = plan_gram(run, stream, groups, lags, together)
        tasks = [partial(_measure, session.plan, block) for block in blocks]
        results = schedulers.run(tasks, scheduler, threads, progress)
        return _assemble(session, pairs, blocks, results)
    finally:
        _open.cache_clear()


def plan_gram(
    run: str | os.PathLike[str],
    stream: str,
    groups: NDArray[np.int64],
    lags: Sequence[int] | None,
    threads: int,
) -> tuple[_Session, Integers, list[PairBlock]]:
    """Open a run as `compute_gram` does, choose its pairs ``[N, 2]``, cut the work into blocks."""
    dense, numbers = lags is None, tuple(map(int, groups))
    plan = _Plan(uuid.uuid4().hex, absolute_address(run), stream, numbers, dense, threads)
    session = _open(plan)
    rows = session.stream
    pairs = choose_pairs(rows.steps, lags)
    stretches = cut_stretches(session.groups_of_chunk(), _bytes_per_group(session, pairs))
    blocks = cut_pairs(pairs, len(rows), rows.batches, stretches, dense=dense)
    return session, pairs, list(blocks)


def regroup(gram: Gram, group_of_group: NDArray[np.int64]) -> Gram:
    """Add groups of tensors to larger ones; `group_of_group` is int64 ``[K]``."""
    count = int(group_of_group.max()) + 1
    sums = sum_groups(gram.sums, group_of_group, count)
    crossed = gram.batch_sums
    if crossed is not None:
        crossed = sum_groups({"": crossed}, group_of_group, count)[""]
    return replace(gram, sums=sums, batch_sums=crossed)


@dataclass(frozen=True)
class _Plan:
    """What a worker has to know.

    `token` keeps one call's open files from serving the next; `threads` is the most tasks that one
    process works on at a time.
    """

    token: str
    path: str
    stream: str
    groups: tuple[int, ...]
    dense: bool
    threads: int


@dataclass(frozen=True)
class _Partial:
    """Sums of one block: `groups` ``[G]``, `pairs` ``[G, N, B, 5]``, `batches` ``[G, n, B, B]``."""

    groups: list[int]
    pairs: Values
    batches: Values


class _Session:
    """A run, open in one process for one call of `compute_gram`."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.run: Run = open_run(plan.path)
        self.stream = self.run.stream(plan.stream)
        self.points = plan.stream in ITERATES
        self.columns = ("dd",) if self.points else tuple(SUMS)

    def segments(self, chunk: int, window: int) -> list[Segment]:
        """Cut an inner chunk where a group of tensors follows another, or a window a window."""
        start, stop = self.stream.grid.bounds(chunk)
        offsets, found = self.run.table.offsets, list[Segment]()
        first = int(np.searchsorted(offsets, start, "right")) - 1
        last = int(np.searchsorted(offsets, stop, "left"))
        cuts = (np.clip(offsets[first : last + 1], start, stop) - start).tolist()
        for tensor, (low, high) in zip(range(first, last), pairwise(cuts), strict=True):
            group = self.plan.groups[tensor]
            if found and found[-1].group == group:
                low = found.pop().start
            if low < high:
                found.append(Segment(chunk, low, high, group))
        return [part for segment in found for part in _cut(segment, window)]

    def groups_of_chunk(self) -> list[set[int]]:
        """The groups that each inner chunk touches."""
        chunks, whole = range(self.stream.grid.num_chunks), self.stream.grid.chunk_elements
        return [{segment.group for segment in self.segments(chunk, whole)} for chunk in chunks]


def _cut(segment: Segment, window: int) -> Iterator[Segment]:
    borders = range(segment.start // window * window + window, segment.stop, window)
    for start, stop in pairwise((segment.start, *borders, segment.stop)):
        yield replace(segment, start=start, stop=stop)


# At most two stay open on a worker that waits for the next call.
@lru_cache(maxsize=2)
def _open(plan: _Plan) -> _Session:
    return _Session(plan)


def _measure(plan: _Plan, block: PairBlock) -> _Partial:
    """Measure one block; runs on a worker."""
    session = _open(plan)
    stream, allowed = session.stream, most_open(plan.threads)
    with RowBytes(session.run, stream, block.rows, block.chunks, allowed) as rows:
        segments = [s for chunk in block.chunks for s in session.segments(chunk, rows.window)]
        groups = sorted({segment.group for segment in segments})
        batches = stream.batches or 1
        pairs = np.zeros((len(groups), len(block.pairs), batches, len(session.columns)))
        crossed = np.zeros((len(groups), len(block.own), batches, batches))
        measure = chain_sums if plan.dense else direct_sums
        for segment in segments:
            piece, place = Piece(rows, segment), groups.index(segment.group)
            if len(block.pairs):
                pairs[place] += measure(piece, block.pairs)
            if len(block.own):
                own = slice(int(block.own[0]), int(block.own[-1]) + 1)
                crossed[place] += batch_sums(piece, own)
    return _Partial(groups, pairs, crossed)


def _bytes_per_group(session: _Session, pairs: Integers) -> int:
    batches = session.stream.batches
    crossed = 0 if batches is None else len(session.stream) * batches**2
    return 8 * (len(pairs) * (batches or 1) * len(session.columns) + crossed)


def _assemble(
    session: _Session, pairs: Integers, blocks: Sequence[PairBlock], results: Sequence[_Partial]
) -> Gram:
    """Add the partial sums, stretch after stretch."""
    stream, count = session.stream, max(session.plan.groups, default=-1) + 1
    batches = stream.batches or 1
    sums = np.zeros((count, len(pairs), batches, len(session.columns)))
    crossed = np.zeros((count, len(stream), batches, batches))
    for block, part in zip(blocks, results, strict=True):
        for place, group in enumerate(part.groups):
            sums[group, block.place] += part.pairs[place]
            crossed[group, block.rows[block.own]] += part.batches[place]
    by_name = np.ascontiguousarray(np.moveaxis(sums, (-1, 0), (0, -1)))
    return Gram(
        stream.name,
        stream.steps,
        stream.batches,
        pairs,
        dict(zip(session.columns, by_name, strict=True)),
        None if stream.batches is None else np.moveaxis(crossed, 0, -1),
    )
