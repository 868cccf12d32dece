"""Which rows of several runs stand beside each other: at equal steps, or at equal epochs.

Runs of one group of settings may be of other lengths, and by epochs a step of one run is not one of
another. Compared is what all runs have: from the latest of their beginnings to the earliest of
their end effects, in thirds. For runs of one length that is what `analyze.verdict` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analyze.references import end_of_path
from analyze.verdict import END_SHARE, PARTS, part_of

Values = NDArray[np.float64]

STEPS, EPOCHS = "steps", "epochs"
# Beyond w_N, where a reference step:N is not the end of the run; and the three thirds as one.
AFTER, ALL = "after", "all"
# Of the common range: what rounding may move a row on the edge of a part.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Clock:
    """The recorded steps of a run, of all its streams, ascending, with their epochs; T at `end`.

    Both float64 ``[T]``; an epoch that is not known is NaN.
    """

    steps: Values
    epochs: Values
    end: int

    def epoch_at(self, step: float) -> float:
        """Epoch of a step: straight lines between the recorded ones, and on beyond them."""
        known = np.isfinite(self.epochs)
        steps, epochs = self.steps[known], self.epochs[known]
        if not len(steps):
            return float("nan")
        if step <= steps[-1] or steps[-1] <= steps[0]:
            return float(np.interp(step, steps, epochs))
        rate = (epochs[-1] - epochs[0]) / (steps[-1] - steps[0])
        return float(epochs[-1] + rate * (step - steps[-1]))

    def at(self, step: float, unit: str) -> float:
        """A step in this unit."""
        return float(step) if unit == STEPS else self.epoch_at(step)


@dataclass(frozen=True)
class Range:
    """What is compared, in `unit`: from `start` to `stop`, in thirds, and what follows w_N.

    That goes from `beyond` to `last`. `closed` says that `stop` itself belongs to the last third:
    there is no end effect before it. NaN where some run does not know its epochs.
    """

    unit: str
    start: float
    stop: float
    beyond: float
    last: float
    closed: bool

    @property
    def known(self) -> bool:
        """Whether every run could be put on this axis, and anything is common to all."""
        return self.start < self.stop or (not self.closed and self.beyond < self.last)

    def bounds(self, part: str) -> tuple[float, float]:
        """Where a part begins and ends."""
        if part == AFTER:
            return self.beyond, self.last
        third = (self.stop - self.start) / 3
        first = PARTS.index(part) if part in PARTS else 0
        return self.start + first * third, self.start + third * (first + 1 if part != ALL else 3)

    def describe(self) -> str:
        """Say in words what is compared."""
        name = "t" if self.unit == STEPS else "epoch"
        if not self.start < self.stop:
            return f"{_short(self.beyond)} < {name} ≤ {_short(self.last)}"
        until = "≤" if self.closed else "<"
        return f"{_short(self.start)} ≤ {name} {until} {_short(self.stop)}"


def common_range(clocks: Mapping[str, Clock], reference: str, unit: str) -> Range:
    """What all runs have in common on the way to w*."""
    ends = {run: end_of_path(reference, clock.end) for run, clock in clocks.items()}
    edges = [
        (
            clock.at(clock.steps[0], unit),
            clock.at(clock.end if end is None else (1 - END_SHARE) * end, unit),
            clock.at(clock.end if end is None else end, unit),
            clock.at(clock.steps[-1], unit),
        )
        for clock, end in zip(clocks.values(), ends.values(), strict=True)
    ]
    start, stop, beyond, last = np.array(edges).T
    # NaN, of a run without epochs, goes through.
    return Range(
        unit,
        float(start.max()),
        float(stop.min()),
        float(beyond.max()),
        float(last.min()),
        closed=None in ends.values(),
    )


def parts_in(
    steps: NDArray[np.int64], epochs: Values, reference: str, clock: Clock, common: Range
) -> NDArray[np.object_]:
    """Name the part of each row ``[N]`` of one run; empty where it is not compared.

    A row in the run's own end effect never is.
    """
    own = part_of(steps, reference, clock.end)
    place = steps if common.unit == STEPS else epochs
    slack = _ROUNDING * abs(common.stop - common.start)
    first, second = (common.bounds(part)[0] - slack for part in PARTS[1:])
    inside = np.isin(own, PARTS) & (place >= common.start - slack)
    inside &= (place <= common.stop + slack) if common.closed else (place < common.stop)
    after = (own == AFTER) & (place <= common.last + slack)
    conditions = [after, ~inside, place >= second, place >= first]
    return np.select(conditions, [AFTER, "", *PARTS[:0:-1]], PARTS[0]).astype(object)


def _short(value: float) -> str:
    return f"{value:.6g}"
