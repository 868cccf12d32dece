"""All pairs of some rows at the price of matrix products, without loss for rows that are close.

‖w_i - w_j‖² from ‖w_i‖² + ‖w_j‖² - 2⟨w_i, w_j⟩ loses all digits once the two are close, and so it
does from distances to any one centre. Here the rows are multiplied as the steps from each to the
next, d_k = w_{k+1} - w_k, and the sums of a pair are put together from the steps between its two
ends alone: the error is one of float64 relative to (Σ‖d_k‖)², of just those steps. Where even that
is far more than the distance (a path that comes back), the pair is measured on its own.

Axes: n rows, N pairs, B batches (1 where there are none, and no gradients), c coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analyze.pair_kernels import add_batches, add_chain, add_distances, add_pairs, find_finite
from analyze.row_bytes import Integers, RowBytes
from analyze.row_products import LANES, PANEL

Values = NDArray[np.float64]

# What is kept of a pair i < j, by batch. Points have no gradients, only the first.
SUMS = {
    "dd": "‖w_i - w_j‖²",
    "gg": "⟨g_i, g_j⟩",
    "gd": "⟨g_i, w_i - w_j⟩",
    "dg": "⟨g_j, w_j - w_i⟩",
    "hh": "‖g_i - g_j‖²",
}

# Coordinates that are multiplied at a time: of a hundred rows they fit into the processor's second
# cache. Part of the result, since sums are added tile after tile: never derive it from the machine.
TILE = 1024

# A sum of squares below this share of what it was put together from may be wrong in the tenth
# digit: 1e-16, times some for rounding along the way, over 1e-6.
_TOO_SMALL = 1e-6

# Which of `SUMS` need weights; of points there is the first alone.
_OF_WEIGHTS = (0, 2, 3)


@dataclass(frozen=True)
class Segment:
    """Coordinates `start` to `stop` of an inner chunk, all of one group and in one window."""

    chunk: int
    start: int
    stop: int
    group: int


class Piece:
    """A segment of all rows, at hand: addresses of weights ``[n]`` and of gradients ``[B, n]``."""

    def __init__(self, rows: RowBytes, segment: Segment) -> None:
        self.weights, self.gradients = rows.at(segment.chunk, segment.start, segment.stop)
        self.like, self.count = rows.like, segment.stop - segment.start


def direct_sums(piece: Piece, pairs: Integers) -> Values:
    """Measure each pair on its own: ``[N, B, 5]`` as in `SUMS`, ``[N, 1, 1]`` of points."""
    rows, places = np.unique(pairs, return_inverse=True)
    places, like, count = places.reshape(pairs.shape), piece.like, piece.count
    weights, gradients = piece.weights[rows], piece.gradients[:, rows]
    room = _room(1 + len(gradients), len(rows))
    if len(gradients):
        sums = np.zeros((len(pairs), len(gradients), len(SUMS)))
        add_pairs(weights, gradients, like, count, room, places, sums)
    else:
        sums = np.zeros((len(pairs), 1, 1))
        add_distances(weights, like, count, room, places, sums)
    return sums


def chain_sums(piece: Piece, pairs: Integers) -> Values:
    """Measure pairs as `direct_sums` does, from products of all rows with all."""
    everything = np.arange(len(piece.weights))
    found = _products(piece, everything)
    bad = np.zeros(len(everything), bool)
    if not np.isfinite(found.steps).all():
        # One row that is not finite would spoil every pair that the chain leads past.
        find_finite(piece.weights, piece.like, piece.count, bad)
        bad = ~bad
        found = _products(piece, _nearest(bad))
    sums, doubtful = _put_together(found, pairs)
    spoiled = bad[pairs[:, 0]] | bad[pairs[:, 1]]
    doubtful &= ~spoiled
    if doubtful.any():
        sums[doubtful] = direct_sums(piece, pairs[doubtful])
    # Of a pair with a bad end only what needs no weights is a number.
    for column in _OF_WEIGHTS[: sums.shape[-1]]:
        sums[spoiled, :, column] = np.nan
    return sums


def batch_sums(piece: Piece, own: slice) -> Values:
    """Multiply the batches of each row in `own` with each other: ``[n, B, B]``."""
    gradients = np.ascontiguousarray(piece.gradients[:, own])
    batches, rows = gradients.shape
    filled = _filled(batches)
    found = np.zeros((rows, filled, filled))
    add_batches(gradients, piece.like, piece.count, _room(1, filled)[0], found)
    upper = np.triu(found[:, :batches, :batches])
    return upper + np.triu(upper, 1).swapaxes(1, 2)


@dataclass(frozen=True)
class _Products:
    """⟨d_k, d_l⟩ ``[n-1, n-1]``, ⟨g_i, d_k⟩ ``[B, n, n-1]`` and ⟨g_i, g_j⟩ ``[B, n, n]``.

    Of what is symmetric the upper triangle alone.
    """

    steps: Values
    along: Values
    gradients: Values


def _products(piece: Piece, source: Integers) -> _Products:
    """Multiply all rows with all; the weights of row i are those of row ``source[i]``."""
    n, batches = len(piece.weights), len(piece.gradients)
    filled = _filled(n)
    steps = np.zeros((filled, filled))
    along, gradients = np.zeros((2, batches, filled, filled))
    add_chain(
        piece.weights[source],
        piece.gradients,
        piece.like,
        piece.count,
        _room(2, filled),
        steps,
        along,
        gradients,
    )
    return _Products(
        np.triu(steps[: n - 1, : n - 1]),
        along[:, : n - 1, :n].swapaxes(1, 2),
        np.triu(gradients[:, :n, :n]),
    )


def _room(matrices: int, rows: int) -> Values:
    return np.zeros((matrices, rows, TILE + LANES))


def _filled(rows: int) -> int:
    return -(-rows // PANEL) * PANEL


def _nearest(bad: NDArray[np.bool_]) -> Integers:
    """For each row the last good one up to it, else the first good one, else itself: ``[n]``."""
    rows = np.arange(len(bad))
    if bad.all():
        return rows
    last = np.maximum.accumulate(np.where(bad, -1, rows))
    return np.where(last < 0, np.argmin(bad), last)


def _put_together(found: _Products, pairs: Integers) -> tuple[Values, NDArray[np.bool_]]:
    """Give the sums of pairs ``[N, B, 5]`` or ``[N, 1, 1]``, and which are doubtful ``[N]``."""
    first, second = pairs.T
    with np.errstate(invalid="ignore", over="ignore"):
        dd = _spanned(found.steps)[first, second]
        walked = np.append(0.0, np.cumsum(np.sqrt(found.steps.diagonal())))
        # Or a step on the way has a square beyond float64, and the distance may not.
        doubtful = ~(dd >= _TOO_SMALL * (walked[second] - walked[first]) ** 2)
        if not len(found.gradients):
            return dd[:, None, None], doubtful
        norms = np.diagonal(found.gradients, axis1=1, axis2=2)
        largest = norms[:, first] + norms[:, second]
        gg = found.gradients[:, first, second]
        hh = largest - 2 * gg
        doubtful |= (hh < _TOO_SMALL * largest).any(axis=0)
        later, earlier = _summed(found.along)
        parts = (np.broadcast_to(dd, gg.shape), gg, -later[:, first, second])
        sums = np.stack((*parts, earlier[:, second, first], hh), axis=-1)
    return np.ascontiguousarray(sums.swapaxes(0, 1)), doubtful


def _spanned(steps: Values) -> Values:
    """‖Σ_{i≤k<j} d_k‖² for all i < j, ``[n, n]``, from ⟨d_k, d_l⟩.

    Column by column: d_m adds its own square and twice its products with d_i … d_{m-1}.
    """
    before = np.cumsum(np.triu(steps, 1)[::-1], axis=0)[::-1]
    added = np.triu(2 * before + steps.diagonal())
    return np.pad(np.cumsum(added, axis=1), ((0, 1), (1, 0)))


def _summed(along: Values) -> tuple[Values, Values]:
    """⟨g_i, w_j - w_i⟩ for j > i, and ⟨g_i, w_i - w_j⟩ for j < i: each ``[B, n, n]``."""
    n = along.shape[1]
    later = np.arange(n - 1) >= np.arange(n)[:, None]
    forth = np.cumsum(np.where(later, along, 0.0), axis=2)
    back = np.cumsum(np.where(later, 0.0, along)[..., ::-1], axis=2)[..., ::-1]
    return np.pad(forth, ((0, 0), (0, 0), (1, 0))), np.pad(back, ((0, 0), (0, 0), (0, 1)))
