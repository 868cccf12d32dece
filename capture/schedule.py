"""Which steps of a run are saved: every k, log-spaced, per epoch, in bursts, or a union of these.

    10                    steps 0, 10, 20, …                       (also written every:10)
    log:50                50 log-spaced steps, 0 and the last one included
    epoch                 the first step of every epoch
    bursts:51:1,2,5       steps i, i+1, i+2, i+5 for i = 0, 51, 102, …
    epoch+log:50          both

Step t is the state before update t, so step 0 is the initialisation and belongs to every schedule.
The final iterate, after the last update, is saved whatever the schedule.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capture.store.errors import UsageError

# These are listed one by one.
MAX_LISTED = 1_000_000

FORMS = "10, log:50, epoch, bursts:51:1,2,5 or a union such as epoch+log:50"


@dataclass(frozen=True)
class Burst:
    """The steps ``i + lag`` for every multiple i of `period` and every lag; lag 0 is among them."""

    period: int
    lags: tuple[int, ...] = (0,)

    def due(self, step: int) -> bool:
        """Whether `step` is one of them."""
        return any(step >= lag and (step - lag) % self.period == 0 for lag in self.lags)


@dataclass(frozen=True)
class Schedule:
    """A set of steps, as parsed by `parse_schedule`."""

    text: str
    bursts: tuple[Burst, ...] = ()
    listed: frozenset[int] = frozenset()
    every_epoch: bool = False
    steps_per_epoch: int | None = None

    def due(self, step: int, epoch_start: bool = False) -> bool:
        """Whether `step` is saved.

        `epoch_start` says that it is the first step of an epoch, for loops whose epochs have no
        fixed length.
        """
        return (
            (self.every_epoch and (epoch_start or self._starts_epoch(step)))
            or step in self.listed
            or any(burst.due(step) for burst in self.bursts)
        )

    def union(self, other: Schedule) -> Schedule:
        """The steps of both."""
        return Schedule(
            f"{self.text}+{other.text}",
            self.bursts + other.bursts,
            self.listed | other.listed,
            self.every_epoch or other.every_epoch,
            self.steps_per_epoch,
        )

    def steps(self, total_steps: int) -> list[int]:
        """All steps below `total_steps` that are saved, ascending, without the final iterate."""
        steps: list[int] = np.flatnonzero(self.mask(total_steps)).tolist()
        return steps

    def mask(self, stop: int, start: int = 0) -> NDArray[np.bool_]:
        """Whether each step from `start` up to, not including, `stop` is saved: a bool for each."""
        mask = np.zeros(stop - start, bool)
        bursts = self.bursts
        if self.every_epoch:
            if self.steps_per_epoch is None:
                raise _error(self.text, "the number of steps per epoch is not known")
            bursts = (*bursts, Burst(self.steps_per_epoch))
        for burst in bursts:
            for lag in burst.lags:
                first = lag if lag >= start else start + (lag - start) % burst.period
                mask[first - start :: burst.period] = True
        mask[[step - start for step in self.listed if start <= step < stop]] = True
        return mask

    def _starts_epoch(self, step: int) -> bool:
        return step == 0 or (self.steps_per_epoch is not None and step % self.steps_per_epoch == 0)


def parse_schedule(
    text: str | int, *, total_steps: int | None = None, steps_per_epoch: int | None = None
) -> Schedule:
    """Parse a schedule; ``log:N`` needs `total_steps`, the length of the run in updates.

    Raises `UsageError` for anything that is not one of the forms above.
    """
    text = str(text).replace(" ", "")
    bursts: list[Burst] = []
    listed: set[int] = set()
    every_epoch = False
    for part in text.split("+"):
        name, _, rest = part.partition(":")
        if part.isdecimal():
            bursts.append(Burst(_positive(part, text)))
        elif name == "every":
            bursts.append(Burst(_positive(rest, text)))
        elif name == "bursts":
            bursts.append(_parse_burst(rest, text))
        elif name == "log":
            listed.update(_log_spaced(_positive(rest, text), total_steps, text))
        elif part == "epoch":
            every_epoch = True
        else:
            near = difflib.get_close_matches(name, ["every", "log", "epoch", "bursts"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{part!r} is none of the forms"
            raise _error(text, hint)
    return Schedule(text, tuple(bursts), frozenset(listed), every_epoch, steps_per_epoch)


def _parse_burst(rest: str, text: str) -> Burst:
    period, _, lags = rest.partition(":")
    numbers = {_positive(lag, text) for lag in lags.split(",")}
    return Burst(_positive(period, text), (0, *sorted(numbers)))


def _log_spaced(count: int, total_steps: int | None, text: str) -> list[int]:
    """`count` distinct steps from 0 to ``total_steps - 1``, or all of them where there are fewer.

    Early ones, which would coincide after rounding, are consecutive; the rest are log-spaced.
    """
    if count > MAX_LISTED:
        raise _error(text, f"log:N takes at most {MAX_LISTED:,} steps")
    if total_steps is None:
        raise UsageError(
            "no schedule: log:N needs the length of the run",
            where=repr(text),
            fix="give Recorder(…, total_steps=N)",
        )
    if count >= total_steps:
        return list(range(total_steps))
    steps, last = [0], total_steps - 1
    for remaining in range(count - 1, 0, -1):
        previous = steps[-1]
        target: float = last if remaining == 1 else 1
        if previous:
            target = previous * (last / previous) ** (1 / remaining)
        steps.append(max(previous + 1, round(target)))
    return steps


def _positive(digits: str, text: str) -> int:
    if not digits.isdecimal() or int(digits) == 0:
        raise _error(text, f"expected a whole number of at least 1, found {digits!r}")
    return int(digits)


def _error(text: str, why: str) -> UsageError:
    return UsageError(f"no schedule: {why}", where=repr(text), fix=f"write {FORMS}")
