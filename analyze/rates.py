"""The verdict on a learning rate: how far from the locally optimal one, and what it contracted.

By group of tensors and part of the way to w*: η/η*, and η* beside the a_t of orthogonal gradients.
For the whole model: the contraction of ‖w - w*‖² that happened, and the one that would follow if
the measured bounds held everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analyze.directions import (
    SOURCES,
    directions,
    last_step,
    not_plain,
    several_rates,
)
from analyze.groups import Grouping, group_tensors, name_of
from analyze.metadata import printable
from analyze.optimizer import read_optimizer
from analyze.quantities import Values, ratio
from analyze.rows import select_rows
from analyze.sums import unclipping
from analyze.tables import read_metadata
from analyze.text_table import NONE, aligned, band, number, wrapped
from analyze.verdict import PARTS, part_of
from capture.store.reader import Run

_ORIGIN = {
    "updates": "of the updates: η* = η · lolr_update, along the step really taken",
    "minibatch": "of the minibatch gradients: η* = lolr, along -g",
}
_NULL = "a_t: η* if all gradients were orthogonal, with momentum β about η/(1 - β)"
_CONDITION = (
    "conditional: if ⟨g,e⟩ ≥ μ‖e‖² and ‖g‖ ≤ L‖e‖ held for every point and minibatch, SGD with "
    "step μ/L² would contract ‖w - w*‖² by (1 - μ²/L²) each step; this also forces every minibatch "
    "gradient to vanish at w*. μ and L are the extremes of the measured rows of one path, which "
    "prove nothing"
)


@dataclass(frozen=True)
class Contraction:
    """How ‖w - w*‖² shrank in one part of the way, as factors for each step.

    `happened` is (‖e_t2‖²/‖e_t1‖²)^(1/(t2 - t1)) between the part's first and last saved step.
    `taken` and `optimal` are geometric means over `rows` single steps, as they were taken and had
    their rate been η*: 1 - γ²[1 - (1 - η/η*)²] and 1 - γ², γ the cosine of the step. `mu` is the
    smallest RSI⁻ and `bound` the largest EB⁺ of `gradients` minibatch gradients, `negative` of
    which had an RSI⁻ not above 0. NaN where a number is not known.
    """

    part: str
    rows: int
    happened: float
    taken: float
    optimal: float
    gradients: int
    negative: int
    mu: float
    bound: float

    @property
    def conditional(self) -> float:
        """1 - μ²/L², the rate that would follow if the bounds held everywhere; NaN for μ ≤ 0."""
        return 1 - (self.mu / self.bound) ** 2 if self.mu > 0 else np.nan


def rate_verdict(
    run: Run, whole: pa.Table, grouped: pa.Table, by: Grouping, reference: str, source: str
) -> str:
    """Say how the learning rate of `run` compares with η*, a_t and a conditional rate.

    `whole` and `grouped` are tables of this run alone, with the streams `SOURCES` as far as they
    are recorded, by model and in the groups `by`. Single steps are those of `source`.
    """
    name = printable(reference)
    entry, final = read_metadata(whole)["runs"][0], run.final_step
    total = "not finished" if final is None else f"T = {final} updates"
    lines = [f"{entry['run']}   w* = {reference}   {total}   D = {entry['num_parameters']:,}"]
    notes = ["numbers are medians of n saved steps, [10 %, 90 %] their quantiles"]
    kind = read_optimizer(run).kind
    for stream in SOURCES:
        rows = select_rows(grouped, stream=stream, reference=name)
        if not rows.num_rows:
            continue
        if stream == "minibatch" and kind != "sgd":
            notes.append("minibatch: no η/η*, the rate of this optimizer is not one along -g")
            continue
        if stream != source and not_plain(run) is None:
            notes.append("plain SGD steps along its minibatch gradients: one table for both")
            continue
        lines += [
            _ORIGIN[stream],
            *aligned(list(_rate_cells(run, rows, by, reference, stream)), left=2),
        ]
    null = read_metadata(whole)["null"].get(f"{entry['run']}|{name}")
    known = null is not None and not null.startswith("no null")
    notes.append(f"{_NULL}; {null}" if known else f"η*/a_t: {null or 'no null'}")
    if several_rates(run):
        notes.append("η: that of the first parameter group, others had rates of their own")
    found = contractions(run, select_rows(whole, group="model", reference=name), reference, source)
    lines += [
        "contraction of ‖w - w*‖², for each step",
        *aligned(list(_contraction_cells(found)), left=2),
    ]
    notes += _contraction_notes(found, source)
    for note in notes:
        lines += wrapped(note)
    return "\n".join(lines)


def contractions(run: Run, rows: pa.Table, reference: str, source: str) -> list[Contraction]:
    """Compute the contraction of the whole model in each of `PARTS`; `rows` as in `rate_verdict`.

    Single steps are those of the stream `source`.
    """
    steps = rows["step"].to_numpy()
    last = last_step(run, steps)
    dist = rows["norm_dist"].to_numpy()
    own, minibatch = (select_rows(rows, stream=stream) for stream in (source, "minibatch"))
    taken, optimal = _one_step(own, source)
    gradient = np.stack([minibatch[name].to_numpy() for name in ("rsi", "eb")])
    gradient = np.where(np.isfinite(gradient).all(axis=0), gradient, np.nan)
    at = {
        "any": part_of(steps, reference, last),
        "own": part_of(own["step"].to_numpy(), reference, last),
        "minibatch": part_of(minibatch["step"].to_numpy(), reference, last),
    }
    found = []
    for part in PARTS:
        here = at["own"] == part
        rsi, eb = gradient[:, (at["minibatch"] == part) & np.isfinite(gradient[0])]
        found.append(
            Contraction(
                part=part,
                rows=int(np.isfinite(taken[here]).sum()),
                happened=_happened(steps[at["any"] == part], dist[at["any"] == part]),
                taken=_geometric_mean(taken[here]),
                optimal=_geometric_mean(optimal[here]),
                gradients=len(rsi),
                negative=int((rsi <= 0).sum()),
                mu=float(rsi.min()) if len(rsi) else np.nan,
                bound=float(eb.max()) if len(eb) else np.nan,
            )
        )
    return found


def _one_step(rows: pa.Table, source: str) -> tuple[Values, Values]:
    """What one step makes of ‖e‖², as it was taken and with the rate η*, each ``[N]``."""
    dot, square = directions(rows, source)
    rate, distance = rows["lr"].to_numpy(), rows["norm_dist"].to_numpy() ** 2
    taken = 1 - ratio(2 * rate * dot - rate**2 * square, distance)
    return taken, np.maximum(1 - ratio(dot**2, square, distance), 0)


def _happened(steps: NDArray[np.int64], dist: Values) -> float:
    """Contraction of ‖e‖² for each step from the first to the last of `steps`; NaN for one."""
    known = np.isfinite(dist) & (dist > 0)
    steps, dist = steps[known], dist[known]
    if not len(steps) or steps.min() == steps.max():
        return np.nan
    first, last = np.argmin(steps), np.argmax(steps)
    return float((dist[last] / dist[first]) ** (2 / (steps[last] - steps[first])))


def _geometric_mean(values: Values) -> float:
    values = values[np.isfinite(values)]
    with np.errstate(divide="ignore"):
        # Rounding can take a contraction to 0 a little below it.
        return float(np.exp(np.log(np.maximum(values, 0)).mean())) if len(values) else np.nan


def _rate_cells(
    run: Run, rows: pa.Table, by: Grouping, reference: str, stream: str
) -> Iterator[tuple[str, ...]]:
    labels, _ = group_tensors(run.table, by)
    steps = rows["step"].to_numpy()[:: len(labels)]
    best, rate, null = (values.reshape(-1, len(labels)) for values in _compared(rows, stream))
    parts = part_of(steps, reference, last_step(run, steps))
    yield (name_of(by), "part", "n", "η/η* [10 %, 90 %]", "η* < 0", "η*/a_t [10 %, 90 %]")
    for column, label in enumerate(labels):
        for part in PARTS:
            here = (parts == part) & np.isfinite(best[:, column])
            values = best[here, column]
            yield (
                label,
                part,
                str(here.sum()),
                band(ratio(rate[here, column], values)),
                f"{100 * (values < 0).mean():.3g} %" if len(values) else NONE,
                band(ratio(values, null[here, column])),
            )


def _compared(rows: pa.Table, stream: str) -> tuple[Values, Values, Values]:
    """η*, η and the η* of orthogonal gradients in each row, ``[N * K]``."""
    rate = rows["lr"].to_numpy()
    if stream == "updates":
        factors = (rows[name].to_numpy() for name in ("lolr_update", "lolr_update_null"))
        best, null = (rate * factor for factor in factors)
        return best, rate, null
    # η* is that of the gradient as it was before clipping.
    rate = rate / unclipping(rows["clip_factor"].to_numpy())
    return rows["lolr"].to_numpy(), rate, rows["lolr_null"].to_numpy()


def _contraction_cells(found: list[Contraction]) -> Iterator[tuple[str, ...]]:
    yield (
        *("part", "happened", "n", "one step with η", "with η*"),
        *("gradients", "μ", "L", "μ/L²", "conditional"),
    )
    for one in found:
        yield (
            one.part,
            _shrinks(one.happened),
            str(one.rows),
            _shrinks(one.taken),
            _shrinks(one.optimal),
            str(one.gradients),
            number(one.mu),
            number(one.bound),
            number(one.mu / one.bound**2) if one.mu > 0 else NONE,
            _shrinks(one.conditional),
        )


def _contraction_notes(found: list[Contraction], source: str) -> Iterator[str]:
    yield (
        "happened: (‖e_t2‖²/‖e_t1‖²)^(1/(t2-t1)) from the first to the last saved step of the part"
    )
    yield (
        f"one step: geometric means over n {source} of 1 - γ²[1 - (1 - η/η*)²], as it was taken, "
        "and of 1 - γ², with η*"
    )
    if not any(one.gradients for one in found):
        yield "no conditional rate: no minibatch gradients are recorded"
        return
    yield _CONDITION
    for one in found:
        if one.negative:
            yield (
                f"{one.part}: no rate, not even a conditional one: RSI⁻ was not above 0 at "
                f"{one.negative} of {one.gradients} rows"
            )


def _shrinks(factor: float) -> str:
    if not np.isfinite(factor):
        return NONE
    return f"1 {'-' if factor <= 1 else '+'} {abs(1 - factor):.3g}"
