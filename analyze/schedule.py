"""A learning rate for a fresh training: the locally optimal rate of a recorded run, smoothed.

With d the step back for a rate of 1, w_{t+1} = w_t - η_t d_t, the rate that lands closest to w* is

    argmin over η of ‖w_t - η d_t - w*‖²  =  ⟨d_t, e_t⟩ / ‖d_t‖²                            (raw)

For the recorded updates d = -u/η_t, and raw is η_t · lolr_update, whatever the optimizer. For the
minibatch gradient of plain SGD d = g + λw, and raw is η*. One row is noisy and may be negative. So
each row takes the one rate for all the rows of its window that has the smallest sum of squares,

    argmin over η of Σ ‖w_s - η d_s - w*‖²  =  Σ ⟨d_s, e_s⟩ / Σ ‖d_s‖²,

in which a negative row counts for what it is; nothing is divided before it is summed. Where even
that is not above 0 the rate is 0. The last tenth of the way to w* is an end effect, in which the
rate tends to that of orthogonal gradients whatever the landscape: it enters no window, and the
last rate before it is held. The derivation is our own.

Axes: T saved steps.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analyze.cache import Where
from analyze.directions import (
    choose_source,
    directions,
    first_step,
    last_step,
    rated_streams,
)
from analyze.groups import Grouping, name_of
from analyze.metadata import printable
from analyze.quantities import Values, ratio
from analyze.rates import rate_verdict
from analyze.rows import select_rows
from analyze.tables import measure_run
from analyze.text_table import span
from analyze.verdict import PARTS, part_of
from capture.store.errors import InputError, UsageError
from capture.store.files import write_durably
from capture.store.reader import Run, open_run

if TYPE_CHECKING:
    from analyze.schedulers import Cluster

Integers = NDArray[np.int64]

# Beyond it a rate is infinite to weights in float32.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Schedule:
    """Learning rates at the saved steps of one run, each array ``[T]``, steps ascending.

    `steps` int64, updates applied before, counted from the start of the whole training; `lr`
    float64, in units of the run's own `run_lr`; `raw` the optimum of the row alone, NaN where it
    has none. `window` int64, the rows that `lr` rests on. `status` is "fit"; "zero" where the
    optimum of the window is not above 0; "gap" where the window has no optimum; "held" in the end
    effect and after w*. `source` is one of `SOURCES`, `smooth` the rows of a full window, and
    `factor` what the optimum was multiplied with. `UsageError` where a rate is below 0, or none
    that weights in float32 could be moved with.
    """

    run: str
    reference: str
    source: str
    smooth: int
    factor: float
    steps: Integers
    lr: Values
    raw: Values
    window: Integers
    status: NDArray[np.object_]
    run_lr: Values

    def __post_init__(self) -> None:
        """Refuse rates that no training could follow."""
        unusable = np.flatnonzero(~((self.lr >= 0) & (self.lr <= _LARGEST)))
        if len(unusable):
            step, rate = int(self.steps[unusable[0]]), float(self.lr[unusable[0]])
            raise UsageError(
                f"the rate at step {step} would be {rate:g}, which no training can follow",
                where=self.run,
                fix="use a smaller --factor" if self.factor > 1 else "choose another --reference",
            )

    def describe(self) -> str:
        """Say in a few lines what the rates are and what became of the rows."""
        count = Counter(self.status.tolist())
        kinds = [f"{count[name]} {text}" for name, text in _STATUS.items() if count[name]]
        rate, own = (span(values, 3) or "unknown" for values in (self.lr, self.run_lr))
        lines = [
            f"rate {rate} at {len(self.steps)} steps, that of the run itself {own}",
            f"from {_ORIGIN[self.source]}",
            f"smoothed over {self.smooth} rows: Σ⟨d, e⟩ / Σ‖d‖² with w_t+1 = w_t - η d, the one "
            "rate that suits the window best",
            ", ".join(kinds),
        ]
        alone = int(np.isnan(self.raw[self.status != "held"]).sum())
        if alone:
            why = "the rate is 0 or a number not finite"
            lines.append(f"left out of every window: {alone}, {why}")
        lines.append(
            "each rate suits its own steps, all others being as they were: a training that follows "
            "them all takes another path"
        )
        if self.factor != 1:
            lines.append(f"times {self.factor:g}")
        wrapped = (
            textwrap.wrap(line, 98, break_on_hyphens=False, subsequent_indent="  ")
            for line in lines
        )
        return "\n  ".join(line for part in wrapped for line in part)


_ORIGIN = {
    "updates": "the updates: η · lolr_update",
    "minibatch": "the minibatch gradients: η*, along -(g + λw)",
}
_STATUS = {
    "fit": "fitted",
    "zero": "set to 0, the optimum of the window is not above 0",
    "gap": "between their neighbours, no step in the window",
    "held": "held, in the last tenth before w* or after it",
}


def schedule_run(
    path: str,
    reference: str = "final",
    *,
    source: str | None = None,
    smooth: int | None = None,
    factor: float = 1.0,
    by: Grouping = "layer",
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Where = True,
) -> tuple[Schedule, str]:
    """Measure a run; return its schedule and the verdict on its learning rate, as plain text.

    See `fit_schedule`, and `analyze.rates.rate_verdict` for the verdict, which is in the groups
    `by` of `analyze.groups`. Scheduler, workers, progress and cache are those of `measure_run`.
    Raises what these raise, what is wrong with the arguments before anything is measured.
    """
    run = open_run(path)
    choose_source(run, source)
    _check(smooth, factor)
    groupings: list[Grouping] = ["model"] if by == "model" else ["model", by]
    tables = measure_run(
        path,
        [reference],
        streams=rated_streams(run),
        by=groupings,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
        cache=cache,
    )
    run = open_run(path)  # as `measure_run` does: it may have grown
    schedule = fit_schedule(
        run, tables["model"], reference, source=source, smooth=smooth, factor=factor
    )
    verdict = rate_verdict(
        run, tables["model"], tables[name_of(by)], by, reference, schedule.source
    )
    return schedule, verdict


def fit_schedule(
    run: Run,
    table: pa.Table,
    reference: str = "final",
    *,
    source: str | None = None,
    smooth: int | None = None,
    factor: float = 1.0,
) -> Schedule:
    """Fit the rates to a table of `run` alone, by model, that holds `reference` and the source.

    `source` is one of `SOURCES`, by default the updates where they are recorded. `smooth` is the
    odd number of saved rows in a window, by default a tenth of them and at least 5. Raises
    `UsageError`, and `InputError` where no rate follows or the run has not what it needs.
    """
    _check(smooth, factor)
    source = choose_source(run, source)
    rows = select_rows(table, stream=source, group="model", reference=printable(reference))
    steps, rates = rows["step"].to_numpy(), rows["lr"].to_numpy()
    dot, square = directions(rows, source)
    raw = ratio(dot, square)
    before = np.isin(part_of(steps, reference, last_step(run, steps)), PARTS)
    usable = before & np.isfinite(raw)
    if not usable.any():
        raise InputError(
            "no rate follows: no saved step lies before the end effect, with a rate above 0 and "
            f"finite numbers, in {source!r}",
            where=run.path,
            fix="choose another --reference, or save more steps (--every)",
        )
    smooth = max(5, len(steps) // 10 | 1) if smooth is None else smooth
    fitted, window = _fit(np.where(usable, dot, 0), np.where(usable, square, 0), usable, smooth)
    known = before & np.isfinite(fitted)
    if not (fitted[known] > 0).any():
        raise InputError(
            "no rate follows: no step towards this w* can be told in any window, the optimum is "
            "nowhere above 0",
            where=run.path,
            fix="choose another --reference, or a wider --smooth",
        )
    status = np.select([~before, ~known, fitted <= 0], ["held", "gap", "zero"], "fit")
    fitted = np.interp(steps, steps[known], np.maximum(fitted[known], 0))
    with np.errstate(over="ignore"):  # refused below
        scaled = factor * fitted
    return Schedule(
        run=table["run"][0].as_py(),
        reference=reference,
        source=source,
        smooth=smooth,
        factor=factor,
        steps=steps + first_step(run),
        lr=scaled,
        raw=raw,
        window=np.where(before, window, 0),
        status=status.astype(object),
        run_lr=rates,
    )


def write_schedule(schedule: Schedule, path: str | PathLike[str]) -> None:
    """Write CSV for ``capture train --lr-schedule``, in full or not at all; `WriteError`.

    The rate between steps is linear there, and held before the first and after the last. Numbers
    are written so that reading gives the same float64.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    same = {name: getattr(schedule, name) for name in ("source", "smooth", "factor")}
    same["reference"] = printable(schedule.reference)
    rows.writerow(["step", "lr", *_BY_ROW, *same])
    columns = (schedule.steps, schedule.lr, *(getattr(schedule, name) for name in _BY_ROW))
    for values in zip(*(column.tolist() for column in columns), strict=True):
        rows.writerow([*values, *same.values()])
    write_durably(Path(path), text.getvalue().encode("utf-8"), Path(path).parent)


_BY_ROW = ("status", "raw", "window", "run_lr")


def _fit(
    dot: Values, square: Values, usable: NDArray[np.bool_], smooth: int
) -> tuple[Values, Integers]:
    """Optimum of the window around each row, NaN where it has none, and the rows in the window."""
    half, count = smooth // 2, len(dot)
    windows = [slice(max(row - half, 0), row + half + 1) for row in range(count)]
    dots, squares = (np.array([x[part].sum() for part in windows]) for x in (dot, square))
    return ratio(dots, squares), np.array([usable[part].sum() for part in windows], np.int64)


def _check(smooth: int | None, factor: float) -> None:
    if smooth is not None and (smooth < 1 or smooth % 2 == 0):
        raise UsageError(
            f"a window of {smooth} rows has no middle", fix="use an odd number: 1, 3, 5, …"
        )
    if not 0 < factor < math.inf:
        raise UsageError(f"rates cannot be multiplied with {factor:g}", fix="use a number above 0")
