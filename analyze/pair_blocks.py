"""Which pairs of rows are measured, and how the work on them is cut into tasks.

The cut follows from the run and the question alone, never from the workers: the sums of a task are
added up on their own, so it decides about the last bits of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capture.store import UsageError

Integers = NDArray[np.int64]

# Rows that are multiplied with each other at a time, and shards that a task reads for it.
MOST_ROWS = 256
_MOST_SHARDS = 2048
# Parts of the coordinates that are added up on their own: at most so many, and so many bytes.
_MOST_STRETCHES = 64
_PARTIAL_BYTES = 2**28


@dataclass(frozen=True)
class PairBlock:
    """Pairs of rows on a stretch of inner chunks.

    `rows` are rows of the stream, ascending; `pairs` int64 ``[N, 2]`` are places among them, and
    `place` int64 ``[N]`` is where each pair stands among all. `own` are the places of the rows
    whose batches are multiplied with each other here.
    """

    rows: Integers
    pairs: Integers
    place: Integers
    own: Integers
    chunks: range


def parse_lags(text: str | None) -> list[int] | str | None:
    """Read `--lags`: whole numbers with commas between, or ``all``; `UsageError` for the rest."""
    if text is None or text == "all":
        return text
    parts = text.replace(" ", "").split(",")
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and _is_lag(part))]
    if wrong:
        raise UsageError(
            f"{wrong[0]!r} is no lag between two steps",
            fix="use all, or numbers of updates such as 1,2,5,10,20,50",
        )
    return [int(part) for part in parts]


def _is_lag(digits: str) -> bool:
    return 0 < int(digits) < 2**63


def choose_pairs(steps: Integers, lags: Sequence[int] | None) -> Integers:
    """List the pairs of rows ``[N, 2]``, first row below second, in order: all, or of some lags.

    `steps` is int64 ``[T]``, ascending; `lags` count steps, that is updates, not rows.
    """
    if lags is None:
        return np.stack(np.triu_indices(len(steps), 1), axis=1).astype(np.int64)
    if not lags or any(lag < 1 for lag in lags):
        wrong = next((lag for lag in lags if lag < 1), "no number")
        raise UsageError(
            f"{wrong} is no lag between two steps", fix="give whole numbers of updates, 1 or more"
        )
    found = []
    for lag in set(lags):
        second = np.searchsorted(steps, steps + lag)
        there = np.flatnonzero(np.append(steps, -1)[second] == steps + lag)
        found.append(np.stack([there, second[there]], axis=1))
    pairs = np.concatenate(found).astype(np.int64)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def cut_pairs(
    pairs: Integers, num_rows: int, batches: int | None, stretches: Sequence[range], *, dense: bool
) -> Iterator[PairBlock]:
    """Cut pairs into blocks: of all pairs squares of rows, of chosen lags one band after another.

    Chunk-major: all rows of a stretch of coordinates, then the next.
    """
    most = max(2, min(MOST_ROWS, _MOST_SHARDS // (1 + (batches or 1))))
    parts = list(_squares(pairs, num_rows, most) if dense else _bands(pairs, num_rows, most))
    for chunks in stretches:
        for place, own in parts:
            own = own if batches is not None else own[:0]
            rows = np.unique(np.concatenate([pairs[place].ravel(), own]))
            if len(rows):
                yield PairBlock(
                    rows,
                    np.searchsorted(rows, pairs[place]),
                    place,
                    np.searchsorted(rows, own),
                    chunks,
                )


def _squares(pairs: Integers, num_rows: int, most: int) -> Iterator[tuple[Integers, Integers]]:
    """Give the pairs between any two intervals of rows, and the rows that come with them."""
    if num_rows <= most:
        yield np.arange(len(pairs)), np.arange(num_rows)
        return
    intervals = math.ceil(num_rows / (most // 2))
    of_pair = pairs * intervals // num_rows
    of_row = np.arange(num_rows) * intervals // num_rows
    for first in range(intervals):
        for second in range(first, intervals):
            here = (of_pair[:, 0] == first) & (of_pair[:, 1] == second)
            own = of_row == first if first == second else np.zeros(num_rows, bool)
            yield np.flatnonzero(here), np.flatnonzero(own)


def _bands(pairs: Integers, num_rows: int, most: int) -> Iterator[tuple[Integers, Integers]]:
    """Give the pairs of consecutive first rows, as many as `most` different rows allow."""
    bounds = np.searchsorted(pairs[:, 0], np.arange(num_rows + 1))
    start, needed = 0, set[int]()
    for row in range(num_rows):
        wanted = {row, *pairs[bounds[row] : bounds[row + 1], 1].tolist()}
        if row > start and len(needed | wanted) > most:
            yield np.arange(bounds[start], bounds[row]), np.arange(start, row)
            start, needed = row, set()
        needed |= wanted
    yield np.arange(bounds[start], bounds[num_rows]), np.arange(start, num_rows)


def cut_stretches(groups_of_chunk: Sequence[set[int]], bytes_per_group: int) -> list[range]:
    """Cut the inner chunks into stretches: many for the workers, none too many for the memory.

    Each stretch has sums of its own for each group that it touches, which wait until all are there.
    """
    total = len(groups_of_chunk)
    count = min(_MOST_STRETCHES, total)
    while True:
        size = math.ceil(total / count)
        stretches = [range(at, min(at + size, total)) for at in range(0, total, size)]
        held = sum(len(set().union(*(groups_of_chunk[c] for c in part))) for part in stretches)
        if count == 1 or held * bytes_per_group <= _PARTIAL_BYTES:
            return stretches
        count //= 2
