"""Dependent rows of one path: how much they say, and how they may be drawn again.

Axes: T saved steps, B batches. Steps are consecutive *saved* steps: where a schedule leaves some
out, so does the autocorrelation.

Sources: C. J. Geyer, "Practical Markov chain Monte Carlo", Statistical Science 7 (1992); D. N.
Politis and H. White, "Automatic block-length selection for the dependent bootstrap", Econometric
Reviews 23 (2004), with the correction of A. Patton, 28 (2009); H. R. Künsch, "The jackknife and the
bootstrap for general stationary observations", Annals of Statistics 17 (1989); A. B. Owen, "The
pigeonhole bootstrap", Annals of Applied Statistics 1 (2007).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# Politis and White's constant: a lag counts while its correlation is beyond 2 √(log10 T / T).
_BAND = 2.0
# Below this many steps no correlation can be estimated.
FEWEST_STEPS = 8
# Numbers held at once while blocks are drawn.
_MOST_AT_ONCE = 1_000_000


def step_means(values: Values) -> Values:
    """Mean of the finite batches of each step that has one: ``[T, B]`` to at most ``[T]``."""
    finite = np.isfinite(values)
    counts = finite.sum(axis=1)
    sums = np.where(finite, values, 0.0).sum(axis=1)
    return np.asarray(sums[counts > 0] / counts[counts > 0])


def effective_size(series: Values) -> float:
    """How many independent steps would tell as much of the mean as these dependent ones ``[T]``.

    T / τ with τ = -1 + 2 Σ_m (ρ_2m + ρ_2m+1), the sum over the initial positive and monotone
    sequence of Geyer; never more than T. For a large T of an AR(1) process it is
    T (1 - ρ) / (1 + ρ). A trend within the series counts as correlation. NaN for fewer than
    `FEWEST_STEPS` steps, or where nothing varies.
    """
    count = len(series)
    covariance = _autocovariance(series)
    if count < FEWEST_STEPS or not _varies(covariance):
        return math.nan
    even = count // 2 * 2
    pairs = (covariance[0:even:2] + covariance[1:even:2]) / covariance[0]
    ends = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: ends[0] if len(ends) else None])
    tau = 2 * float(pairs.sum()) - 1
    return count / tau if tau > 1 else float(count)


def block_length(series: Values) -> int:
    """Length of the blocks, in steps, that suits the correlation of a series ``[T]``.

    The rule of Politis and White for overlapping blocks: (2 G² / D)^⅓ T^⅓ with G = Σ λ_k |k| R_k,
    D = 4/3 (Σ λ_k R_k)² and the flat-top window λ, rounded up. Where the rule says nothing (short
    series, no variance, a spectrum that is not positive at 0) T^⅓. At most a third of T.
    """
    count = len(series)
    longest = max(1, count // 3)
    covariance = _autocovariance(series)
    fallback: int = min(longest, max(1, math.ceil(math.cbrt(count))))
    if count < FEWEST_STEPS or not _varies(covariance):
        return fallback
    lag = np.arange(1, _window(covariance / covariance[0]) + 1)
    weight = np.minimum(1.0, 2 * (1 - lag / len(lag)))
    slope = 2 * float((weight * lag * covariance[lag]).sum())
    spectrum = float(covariance[0] + 2 * (weight * covariance[lag]).sum())
    if spectrum <= 0:
        return fallback
    best = (1.5 * (slope / spectrum) ** 2 * count) ** (1 / 3)
    return int(np.clip(math.ceil(best), 1, min(longest, math.ceil(3 * math.sqrt(count)))))


def draw_means(
    values: Values,
    block: int,
    rng: np.random.Generator,
    replicates: int,
    *,
    steps: bool = True,
    batches: bool = True,
) -> Values:
    """Means of `replicates` resampled sets of rows; `values` ``[T, B]``, NaN left out.

    `steps` draws overlapping blocks of consecutive steps until T are full (the last one is cut
    short), and `batches` draws, independently of it, B - 1 of B batches, with replacement: one less
    than there are, so that their variance is not (B - 1)/B of what it should be. One batch stays.
    What neither steps nor batches explain counts up to three times, as Owen shows: such an interval
    is rather too wide. A set that happens to hold no finite row is left out.
    """
    finite = np.isfinite(values)
    centre = values[finite].mean()
    rows = np.stack([np.where(finite, values - centre, 0.0), finite])
    width = values.shape[1]
    if steps:
        drawn = _drawn_blocks(rows, block, rng, replicates)
    else:
        drawn = np.repeat(rows.sum(axis=1)[:, None], replicates, axis=1)
    if batches and width > 1:
        drawn *= rng.multinomial(width - 1, np.full(width, 1 / width), replicates)
    sums, counts = drawn.sum(axis=2)
    return np.asarray(centre + sums[counts > 0] / counts[counts > 0])


def _drawn_blocks(rows: Values, block: int, rng: np.random.Generator, replicates: int) -> Values:
    """Sums over drawn blocks of the steps of ``[2, T, B]``: ``[2, replicates, B]``."""
    kinds, count, width = rows.shape
    until = np.concatenate([np.zeros((kinds, 1, width)), rows.cumsum(axis=1)], axis=1)
    whole = until[:, block:] - until[:, :-block]
    # The last block is cut short, so that every set has T steps.
    blocks, rest = divmod(count - 1, block)
    rest += 1
    short = until[:, rest : rest + whole.shape[1]] - until[:, : whole.shape[1]]
    drawn = np.empty((kinds, replicates, width))
    turn = max(1, _MOST_AT_ONCE // ((blocks + 1) * width))
    for first in range(0, replicates, turn):
        part = slice(first, min(first + turn, replicates))
        starts = rng.integers(0, whole.shape[1], (blocks + 1, part.stop - first))
        drawn[:, part] = short[:, starts[-1]]
        for kind in range(kinds):
            drawn[kind, part] += whole[kind].take(starts[:-1], axis=0).sum(axis=0)
    return drawn


def _autocovariance(series: Values) -> Values:
    """R_k of lags 0 to T - 1, each a sum over T - k products divided by T.

    Of the series over its largest number, so that no square overflows.
    """
    scaled = series / (np.abs(series).max(initial=0.0) or 1.0)
    deviations = scaled - scaled.mean() if len(series) else scaled
    spectrum = np.fft.rfft(deviations, 2 * max(1, len(series)))
    products = np.fft.irfft(spectrum * spectrum.conj(), 2 * max(1, len(series)))
    return np.asarray(products[: len(series)] / max(1, len(series)))


def _varies(covariance: Values) -> bool:
    """Whether there is variance beyond what rounding leaves of equal numbers."""
    return bool(covariance[0] > 1e-24)


def _window(correlation: Values) -> int:
    """Half-width of the lag window: twice the lag after which no correlation stands out."""
    count = len(correlation)
    run = max(5, math.ceil(math.sqrt(math.log10(count))))
    most = min(count - 1, math.ceil(math.sqrt(count)) + run)
    small = np.abs(correlation[1 : most + 1]) < _BAND * math.sqrt(math.log10(count) / count)
    quiet = [lag for lag in range(most - run + 1) if small[lag : lag + run].all()]
    last = quiet[0] if quiet else most - int(np.argmin(small[::-1]))
    return min(2 * max(last, 1), most)
