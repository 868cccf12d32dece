"""Intervals: over runs, for statements about training; within one run, for statements about it.

Steps of one run are dependent and share w*, so their number is no sample size. What holds for a
training is judged over runs that differ in nothing but their seeds (Student's t). Within one run
a bootstrap draws blocks of steps, crossed with batches; it says nothing about another seed.

Sources beside those of `analyze.resampling`: B. L. Welch, Biometrika 34 (1947); F. E.
Satterthwaite, Biometrics Bulletin 2 (1946); E. B. Wilson, Journal of the American Statistical
Association 22 (1927); T. C. Hesterberg, "What teachers should know about the bootstrap", The
American Statistician 69 (2015), for widening bootstrap intervals by Student's t.

Axes: T saved steps, B batches, n runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from analyze.resampling import (
    FEWEST_STEPS,
    block_length,
    draw_means,
    effective_size,
    step_means,
)
from capture.store.errors import UsageError

Values = NDArray[np.float64]

# Fewer effective steps give intervals that cover far less than they promise.
FEWEST_EFFECTIVE = 5.0
REPLICATES = 2000
# One batch a step, and this share of the steps effective: near enough to independent draws.
_INDEPENDENT = 0.9
# What differs by less, relatively, is equal but for rounding: a_t of runs of other seeds.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A value and its interval, `low` and `high` NaN where there is none.

    `method` says how it was found or, after "none: ", why there is none. `count` is what the
    interval rests on, finite ones only: runs, pairs of runs, or rows of one run.
    """

    value: float
    low: float
    high: float
    method: str
    count: int

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low)


@dataclass(frozen=True)
class WithinRun:
    """An interval within one run, and what it rests on.

    `steps` is T and `batches` B with at least one finite row, `left_out` the rows that are not
    finite, `effective` the effective number of steps, `block` the length of the drawn blocks.
    """

    interval: Interval
    steps: int
    batches: int
    left_out: int
    effective: float
    block: int


def check_level(level: float) -> float:
    """Return `level`; `UsageError` where it does not lie between 0 and 1."""
    if not 0 < level < 1:  # nor NaN
        raise UsageError(
            "the level of an interval lies between 0 and 1",
            where=f"level = {level:g}",
            fix="give 0.95 for intervals of 95 %",
        )
    return level


def check_seed(seed: int) -> int:
    """Return `seed`; `UsageError` where it is below 0."""
    if seed < 0:
        raise UsageError("the seed of the bootstrap is below 0", where=f"seed = {seed}")
    return seed


def run_interval(values: Values, level: float = 0.95) -> Interval:
    """Interval of Student's t for the mean over runs, of one number each ``[n]``."""
    known, check = _finite(values), check_level(level)
    if len(known) < 2:
        words = {0: "none: no run has a number", 1: "none: one run says nothing about another seed"}
        return _none(known, words[len(known)])
    scale = _largest(known)
    error = float((known / scale).std(ddof=1)) / math.sqrt(len(known))
    if error <= _ROUNDING:
        return _none(known, "none: no spread between the runs")
    half = scale * error * _student(len(known) - 1, check)
    return _around(float(known.mean()), half, "t over runs", len(known))


def welch_interval(first: Values, second: Values, level: float = 0.95) -> Interval:
    """Interval for mean(`first`) - mean(`second`) of independent runs ``[n]``, ``[m]``.

    Welch's t with Satterthwaite's degrees of freedom; `count` is n + m.
    """
    one, two, check = _finite(first), _finite(second), check_level(level)
    count = len(one) + len(two)
    value = float(one.mean() - two.mean()) if len(one) and len(two) else math.nan
    if min(len(one), len(two)) < 2:
        empty = not (len(one) and len(two))
        words = "a group has no number" if empty else "a group has one run only"
        return Interval(value, math.nan, math.nan, f"none: {words}", count)
    scale = _largest(np.concatenate([one, two]))
    parts = [float((group / scale).var(ddof=1)) / len(group) for group in (one, two)]
    if math.sqrt(sum(parts)) <= _ROUNDING:
        return Interval(
            value, math.nan, math.nan, "none: no spread between the runs of a group", count
        )
    weights = [part**2 / (len(group) - 1) for part, group in zip(parts, (one, two), strict=True)]
    half = scale * math.sqrt(sum(parts)) * _student(sum(parts) ** 2 / sum(weights), check)
    return _around(value, half, "Welch's t over runs", count)


def paired_interval(first: Values, second: Values, level: float = 0.95) -> Interval:
    """Interval for the mean of `first` - `second`, pairs of runs of equal seeds ``[n]``."""
    found = run_interval(np.asarray(first) - np.asarray(second), level)
    words = {
        "t over runs": "paired t over seeds",
        "none: one run says nothing about another seed": "none: one pair of runs only",
        "none: no run has a number": "none: no pair has two numbers",
        "none: no spread between the runs": "none: no spread between the pairs",
    }
    return replace(found, method=words[found.method])


def wilson_interval(share: float, count: float, level: float = 0.95) -> Interval:
    """Wilson's interval for a share found in `count` independent draws, not necessarily whole."""
    z = _normal(check_level(level))
    shrink = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / shrink
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / shrink
    # Exactly 0 and 1 where nothing, or everything, was found: rounding would miss them.
    low = 0.0 if share == 0 else max(0.0, middle - half)
    high = 1.0 if share == 1 else min(1.0, middle + half)
    return Interval(share, low, high, "Wilson", int(count))


def path_interval(
    values: Values, level: float = 0.95, seed: int = 0, replicates: int = REPLICATES
) -> WithinRun:
    """Interval within one run for the mean over its rows ``[T, B]``; NaN are left out.

    Percentiles of `draw_means`, blocks of `block_length` steps, widened around the mean by two
    factors: Student's t with Satterthwaite's degrees of freedom (whole blocks less 1, batches less
    1) over the normal, and what the standard error lacks to s / √(effective steps - 1). There is
    none where fewer than `FEWEST_STEPS` steps, or `FEWEST_EFFECTIVE` effective ones, are left.
    """
    check = check_level(level)
    check_seed(seed)
    rows = _rows(values)
    count, left_out = int(np.isfinite(rows).sum()), int(np.asarray(values).size)
    left_out -= count
    series = step_means(rows)
    effective, block = effective_size(series), block_length(series) if len(series) else 0
    mean = float(rows[np.isfinite(rows)].mean()) if count else math.nan

    def found(interval: Interval) -> WithinRun:
        return WithinRun(interval, len(rows), rows.shape[1], left_out, effective, block)

    why = _no_interval(series, effective)
    if why is not None:
        return found(Interval(mean, math.nan, math.nan, f"none: {why}", count))
    # Divided by the largest, so that the square of none overflows.
    scale = _largest(series)
    below, above = _reach(rows / scale, effective, block, check, seed, replicates)
    method = "block bootstrap within the run"
    return found(Interval(mean, mean - scale * below, mean + scale * above, method, count))


def negative_interval(
    values: Values, level: float = 0.95, seed: int = 0, replicates: int = REPLICATES
) -> WithinRun:
    """Interval within one run for the share of its rows ``[T, B]`` that are below 0.

    That of `path_interval`, cut to 0 and 1. Where the rows have one batch and are as good as
    independent Wilson's; where no row is negative, or all are, Wilson's too, of the effective
    number of steps of the values, since drawing them again would tell nothing.
    """
    rows = _rows(values)
    share = np.where(np.isfinite(rows), np.where(rows < 0, 1.0, 0.0), np.nan)
    found = path_interval(share, level, seed, replicates)
    found = replace(found, left_out=int(np.asarray(values).size) - found.interval.count)
    count, value = found.interval.count, found.interval.value
    series = step_means(rows)
    effective = effective_size(series)
    if math.isnan(effective):
        return found
    if value in (0.0, 1.0):
        interval = replace(wilson_interval(value, effective, level), count=count)
        interval = replace(interval, method="Wilson, effective steps")
        return replace(found, interval=interval, effective=effective, block=block_length(series))
    if rows.shape[1] == 1 and min(effective, found.effective) >= _INDEPENDENT * len(rows):
        interval = replace(wilson_interval(value, count, level), method="Wilson, independent rows")
        return replace(found, interval=interval)
    return replace(found, interval=within_unit(found.interval))


def within_unit(interval: Interval) -> Interval:
    """Cut the interval of a share to 0 and 1."""
    low, high = np.clip([interval.low, interval.high], 0.0, 1.0)
    return replace(interval, low=float(low), high=float(high))


def _reach(
    rows: Values, effective: float, block: int, level: float, seed: int, replicates: int
) -> tuple[float, float]:
    """How far the interval of `path_interval` reaches below and above the mean."""
    rng = np.random.default_rng(seed)
    mean = float(rows[np.isfinite(rows)].mean())
    drawn = draw_means(rows, block, rng, replicates)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    steps, batches = (
        float(draw_means(rows, block, rng, replicates, steps=which, batches=not which).var())
        for which in (True, False)
    )
    # Blocks too short, or too few, understate what the correlation tells.
    steps = max(steps, float(step_means(rows).var()) / (effective - 1))
    freedom = (len(rows) / block - 1, max(1, rows.shape[1] - 1))
    degrees = (steps + batches) ** 2 / (steps**2 / freedom[0] + batches**2 / freedom[1])
    wider = math.sqrt(max(1.0, (steps + batches) / float(drawn.var())))
    wider *= _student(degrees, level) / _normal(level)
    return wider * (mean - float(low)), wider * (float(high) - mean)


def _no_interval(series: Values, effective: float) -> str | None:
    if len(series) < FEWEST_STEPS:
        return f"fewer than {FEWEST_STEPS} steps"
    if math.isnan(effective):
        return "nothing varies"
    if effective < FEWEST_EFFECTIVE:
        return f"fewer than {FEWEST_EFFECTIVE:g} effective steps"
    return None


def _rows(values: Values) -> Values:
    """``[T, B]`` without the steps and batches that have no finite row; ``[T]`` has one batch."""
    rows = np.asarray(values, np.float64)
    rows = rows[:, None] if rows.ndim == 1 else rows
    finite = np.isfinite(rows)
    rows = np.where(finite, rows, np.nan)
    return rows[np.ix_(finite.any(axis=1), finite.any(axis=0))]


def _finite(values: Values) -> Values:
    array = np.asarray(values, np.float64)
    return array[np.isfinite(array)]


def _largest(values: Values) -> float:
    """The scale of some numbers, so that the square of none overflows; 1 where all are 0."""
    return float(np.abs(values).max(initial=0.0)) or 1.0


def _none(known: Values, method: str) -> Interval:
    value = float(known.mean()) if len(known) else math.nan
    return Interval(value, math.nan, math.nan, method, len(known))


def _around(value: float, half: float, method: str, count: int) -> Interval:
    return Interval(value, value - half, value + half, method, count)


def _student(degrees: float, level: float) -> float:
    """Quantile of Student's t that leaves half of 1 - `level` above it."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(degrees, (1 + level) / 2))


def _normal(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
