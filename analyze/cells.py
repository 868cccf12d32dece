"""One number of a comparison: a quantity of a group of runs in one part, or a difference of two.

The number of a run is the mean over its rows in the part, steps and batches alike; that of a group
is the mean over its runs. Axes: T saved steps, B batches, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analyze.derived import Columns, value_of
from analyze.resampling import effective_size, step_means
from analyze.uncertainty import (
    Interval,
    negative_interval,
    paired_interval,
    path_interval,
    run_interval,
    welch_interval,
    wilson_interval,
    within_unit,
)

Values = NDArray[np.float64]

SHARE = "negative"


@dataclass(frozen=True)
class Compared:
    """A quantity that groups are compared in: `function` maps columns of a table to its rows.

    `symbol` is how it is written.
    """

    name: str
    symbol: str
    function: Callable[[Columns], Values]


def _of(name: str, symbol: str) -> Compared:
    return Compared(name, symbol, lambda columns: value_of(name, columns))


# No comparison is drawn without the two ratios.
OF_GRADIENTS = (
    _of("cosine", "γ"),
    _of("cosine_null", "γ⁰"),
    _of("cosine_ratio", "γ/γ⁰"),
    _of("lolr", "η*"),
    _of("lolr_null", "a_t"),
    _of("lolr_ratio", "η*/a_t"),
    _of("rsi", "RSI"),
    _of("eb", "EB"),
    Compared(SHARE, "γ < 0", lambda columns: columns["cosine"]),
    _of("z", "z"),
)
OF_UPDATES = (
    _of("descent_update", "-cos(u, e)"),
    _of("descent_update_null", "γ⁰"),
    _of("descent_update_ratio", "γ/γ⁰"),
    _of("lolr_update", "η*/η"),
    _of("lolr_update_null", "a_t/η"),
    _of("lolr_update_ratio", "η*/a_t"),
    Compared(SHARE, "γ < 0", lambda columns: -columns["cosine_update"]),
)


def compared_in(stream: str) -> tuple[Compared, ...]:
    """The quantities of a stream, in the order of the table."""
    return OF_UPDATES if stream == "updates" else OF_GRADIENTS


@dataclass(frozen=True)
class Cell:
    """A quantity of one group in one part.

    `by_run` has the number of each run that has rows, NaN where none of them is finite. `low_band`
    and `high_band` are the 10 % and 90 % quantiles of the rows of all runs. `effective` is the
    effective number of steps, added over runs, `block` the length of the drawn blocks where there
    was one run.
    """

    interval: Interval
    by_run: Mapping[str, float]
    rows: int
    left_out: int
    low_band: float
    high_band: float
    steps: int
    effective: float
    batches: int
    block: int | None


@dataclass(frozen=True)
class Rows:
    """The rows of one run in one part, each ``[N]``; a stream without batches has batch -1."""

    steps: NDArray[np.int64]
    batches: NDArray[np.int64]
    values: Values

    def matrix(self) -> Values:
        """By step and batch ``[T, B]``, ascending; NaN where there is no row."""
        steps, at_step = np.unique(self.steps, return_inverse=True)
        batches, at_batch = np.unique(self.batches, return_inverse=True)
        matrix = np.full((len(steps), len(batches)), np.nan)
        matrix[at_step, at_batch] = self.values
        return matrix


def measure(runs: Mapping[str, Rows], name: str, *, level: float = 0.95, seed: int = 0) -> Cell:
    """Summarise the quantity `name` of the runs of a group.

    With two runs or more the interval is one over runs, else one within the run.
    """
    share = name == SHARE
    finite = {run: rows.values[np.isfinite(rows.values)] for run, rows in runs.items()}
    by_run = {
        run: float((values < 0).mean() if share else values.mean()) if len(values) else math.nan
        for run, values in finite.items()
    }
    known = [runs[run].matrix() for run, value in by_run.items() if math.isfinite(value)]
    series = [step_means(matrix) for matrix in known]
    effective = [effective_size(values) for values in series]
    block = None
    if len(known) == 1:
        found = (negative_interval if share else path_interval)(known[0], level, seed)
        interval, block = found.interval, found.block if found.interval.known else None
    else:
        interval = run_interval(np.array(list(by_run.values())), level)
        interval = _share_over_runs(interval, effective, level) if share else interval
    pooled = np.concatenate([*finite.values(), np.empty(0)])
    banded = len(pooled) and not share
    low, high = np.quantile(pooled, [0.1, 0.9]) if banded else (math.nan, math.nan)
    return Cell(
        interval=interval,
        by_run=by_run,
        rows=len(pooled),
        left_out=sum(len(rows.values) for rows in runs.values()) - len(pooled),
        low_band=float(low),
        high_band=float(high),
        steps=sum(map(len, series)),
        effective=sum(effective) if effective else math.nan,
        batches=max((matrix.shape[1] for matrix in known), default=0),
        block=block,
    )


def difference(
    first: Cell, second: Cell, pairs: Sequence[tuple[str, str]] | None, level: float = 0.95
) -> Interval:
    """Interval for `first` - `second`: of `pairs` of runs, or of independent runs for `None`."""
    if pairs is None:
        one, two = (np.array(list(cell.by_run.values())) for cell in (first, second))
        return welch_interval(one, two, level)
    values = [(first.by_run.get(a, math.nan), second.by_run.get(b, math.nan)) for a, b in pairs]
    one, two = np.array(values).T
    return paired_interval(one, two, level)


def _share_over_runs(interval: Interval, effective: Sequence[float], level: float) -> Interval:
    """The interval of a share: within 0 and 1, and Wilson's where no row counts, or every one.

    Of the effective number of steps of all runs; a run too short to tell it counts once.
    """
    if interval.value not in (0.0, 1.0):
        return within_unit(interval)
    draws = sum(1.0 if math.isnan(size) else size for size in effective)
    wilson = wilson_interval(interval.value, draws, level)
    return replace(wilson, method="Wilson, effective steps", count=interval.count)
