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

from analyze.pair_kernels import add_distances, add_pairs
from analyze.tiles import Integers, Tiles, Values

# What is kept of a pair i < j, by batch. Points have no gradients, only the first.
SUMS = {
    "dd": "‖w_i - w_j‖²",
    "gg": "⟨g_i, g_j⟩",
    "gd": "⟨g_i, w_i - w_j⟩",
    "dg": "⟨g_j, w_j - w_i⟩",
    "hh": "‖g_i - g_j‖²",
}

# A sum of squares below this share of what it was put together from may be wrong in the tenth
# digit: 1e-16, times some for rounding along the way, over 1e-6.
_TOO_SMALL = 1e-6

# Which of `SUMS` need weights; of points there is the first alone.
_OF_WEIGHTS = (0, 2, 3)


@dataclass(frozen=True)
class Segment:
    """Coordinates `start` to `stop` of an inner chunk, all of one group; tiles use that chunk."""

    chunk: int
    start: int
    stop: int
    group: int


def direct_sums(tiles: Tiles, segment: Segment, pairs: Integers) -> Values:
    """Measure each pair on its own: ``[N, B, 5]`` as in `SUMS`, ``[N, 1, 1]`` of points."""
    shape = (len(pairs), tiles.batches, len(SUMS)) if tiles.batches else (len(pairs), 1, 1)
    sums = np.zeros(shape)
    for w, g in tiles.rows(segment.start, segment.stop):
        if tiles.batches:
            add_pairs(w, g, pairs, sums)
        else:
            add_distances(w, pairs, sums)
    return sums


def chain_sums(tiles: Tiles, segment: Segment, pairs: Integers) -> Values:
    """Measure pairs as `direct_sums` does, from products of all rows with all."""
    everything = np.arange(tiles.num_rows)
    found = _products(tiles, segment, everything)
    bad = np.zeros(tiles.num_rows, bool)
    if not np.isfinite(found.steps).all():
        # One row that is not finite would spoil every pair that the chain leads past.
        bad = ~_sound(tiles, segment)
        found = _products(tiles, segment, _nearest(bad))
    sums, doubtful = _put_together(found, pairs)
    spoiled = bad[pairs[:, 0]] | bad[pairs[:, 1]]
    doubtful &= ~spoiled
    if doubtful.any():
        sums[doubtful] = direct_sums(tiles, segment, pairs[doubtful])
    # Of a pair with a bad end only what needs no weights is a number.
    for column in _OF_WEIGHTS[: sums.shape[-1]]:
        sums[spoiled, :, column] = np.nan
    return sums


def batch_sums(tiles: Tiles, segment: Segment, own: slice) -> Values:
    """Multiply the batches of each row in `own` with each other: ``[n, B, B]``."""
    sums = np.zeros((own.stop - own.start, tiles.batches, tiles.batches))
    for _, g in tiles.rows(segment.start, segment.stop):
        by_row = g[:, own].swapaxes(0, 1)
        with np.errstate(invalid="ignore", over="ignore"):
            sums += by_row @ by_row.swapaxes(1, 2)
    return sums


@dataclass(frozen=True)
class _Products:
    """⟨d_k, d_l⟩ ``[n-1, n-1]``, ⟨g_i, d_k⟩ ``[B, n, n-1]`` and ⟨g_i, g_j⟩ ``[B, n, n]``."""

    steps: Values
    along: Values
    gradients: Values


def _products(tiles: Tiles, segment: Segment, source: Integers) -> _Products:
    """Multiply all rows with all; the weights of row i are those of row ``source[i]``."""
    n, batches = tiles.num_rows, tiles.batches
    steps, along = np.zeros((n - 1, n - 1)), np.zeros((batches, n, n - 1))
    gradients = np.zeros((batches, n, n))
    with np.errstate(invalid="ignore", over="ignore"):
        for d, g, joint in tiles.steps(segment.start, segment.stop, source):
            if batches == 1:
                # The same products as below, a fifth faster in one than in three.
                product = joint @ joint.T
                steps += product[: n - 1, : n - 1]
                along[0] += product[n - 1 :, : n - 1]
                gradients[0] += product[n - 1 :, n - 1 :]
                continue
            steps += d @ d.T
            for batch in range(batches):
                along[batch] += g[batch] @ d.T
                gradients[batch] += g[batch] @ g[batch].T
    return _Products(steps, along, gradients)


def _sound(tiles: Tiles, segment: Segment) -> NDArray[np.bool_]:
    """Which rows of weights are finite on a segment, ``[n]``."""
    sound = np.ones(tiles.num_rows, bool)
    for w, _ in tiles.rows(segment.start, segment.stop):
        sound &= np.isfinite(w).all(axis=1)
    return sound


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
