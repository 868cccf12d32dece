"""The verdict: the few rows that a researcher wants first, as numbers and as plain text.

For each run, reference and stream, of the whole model: the cosine, its null, their ratio and the
fraction below 0, early, middle and late on the way to w*, with the end effect left out. Intervals
are within the run, by `analyze.uncertainty`; what holds for other seeds `analyze compare` tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analyze.columns import values_of
from analyze.quantities import SIGN, Values, ratio
from analyze.references import end_of_path
from analyze.rows import select_rows, sizes_of, whole_model
from analyze.tables import read_metadata
from analyze.text_table import NONE, aligned, number, wrapped
from analyze.uncertainty import Interval, WithinRun, negative_interval, path_interval
from capture.store.layout import ITERATES

# What of the whole model's rows is read here.
COLUMNS = (
    *("run", "stream", "step", "batch", "group", "reference", "num_parameters"),
    *("cosine", "cosine_null", "cosine_update", "lolr", "lolr_null", "nonfinite"),
)

# The last part of the way to w*, where γ tends to its null whatever the landscape.
END_SHARE = 0.1
PARTS = ("early", "middle", "late")

LEVEL = 0.95

_HEAD = ("stream", "part", "n (eff.)", "γ [95 %]", "γ⁰", "γ/γ⁰ [10 %, 90 %]", "γ < 0 [95 %]")
_NOTE = (
    "γ and γ < 0: means of n rows with intervals within this run, by blocks of steps crossed with "
    "batches; (eff.): how many independent steps they are worth. γ⁰, γ/γ⁰: medians, [10 %, 90 %] "
    "quantiles of the rows. About other seeds this says nothing: see `analyze compare`."
)


@dataclass(frozen=True)
class Band:
    """The median of finite values and their quantiles at 10 % and 90 %; NaN where there are none.

    They tell how the rows spread, and are no confidence interval.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Part:
    """One stream in one part of the way.

    `name` is one of `PARTS`, or "before" where a branch that ends in w* had not left the run yet,
    or "after" for what follows w_N. `n` counts the rows whose cosine is defined, and all the rest
    is over these: the cosine γ that is positive towards w*, the median of its null γ⁰, γ/γ⁰,
    η*/a_t, and the fraction of γ < 0.
    `mean` and `below` are the mean cosine and that fraction with their intervals within the run.
    """

    stream: str
    name: str
    n: int
    cosine: Band
    null: float
    ratio: Band
    rate_ratio: Band
    negative: float
    mean: WithinRun
    below: WithinRun


@dataclass(frozen=True)
class Verdict:
    """The numbers of one run and reference.

    `entry` has the facts of the run and `final` is T, or the last step so far. `left_out` is the
    end effect: its first and last step, and how many rows it has. `undefined` counts rows without
    a cosine, `nonfinite` NaN and infinite coordinates; `null` says what γ⁰ rests on, and `start`
    at which step a branch that ends in w* left the run, 0 where none did.
    """

    entry: Mapping[str, Any]
    reference: str
    final: int
    streams: tuple[str, ...]
    parts: tuple[Part, ...]
    left_out: tuple[int, int, int] | None
    null: str | None
    undefined: int
    nonfinite: int
    start: int = 0


def summarise(table: pa.Table) -> list[Verdict]:
    """Compute the numbers of the verdict from a table of `analyze.tables.measure_run`.

    Only rows of the whole model are read; the list is empty where there are none.
    """
    metadata = read_metadata(table)
    entries = {entry["run"]: entry for entry in metadata["runs"]}
    table = whole_model(table, sizes_of(metadata["runs"]))
    blocks = (
        (select_rows(table, run=run, reference=reference), entries[run], reference)
        for run in table["run"].unique().to_pylist()
        for reference in table["reference"].unique().to_pylist()
    )
    branched = metadata.get("branched", {})
    return [_numbers(*block, metadata["null"], branched) for block in blocks if block[0].num_rows]


def verdict(table: pa.Table) -> str:
    """Summarise a table of `analyze.tables.measure_run`; several lines of plain text.

    Only rows of the whole model are read.
    """
    found = summarise(table)
    closing = [f"{SIGN}\n{_lines(_NOTE)}"] if any(each.streams for each in found) else []
    return "\n\n".join([*map(_text, found), *closing])


def part_of(
    steps: NDArray[np.int64], reference: str, final_step: int, start: int = 0
) -> NDArray[np.object_]:
    """Name the part of the way to w* in which each step lies.

    The thirds of the updates from `start` to the end effect, `end` for it, `after` for what follows
    w_N, and `before` for what lies before `start`, where a branch that ends in w* left the run.
    """
    end = end_of_path(reference, final_step)
    last = final_step if end is None else end
    before = last if end is None else (1 - END_SHARE) * last
    third = (before - start) / 3
    late, middle = steps >= start + 2 * third, steps >= start + third
    if end is None:
        return np.select(
            [steps < start, late, middle], ["before", "late", "middle"], "early"
        ).astype(object)
    names = ["before", "after", "end", "late", "middle"]
    conditions = [steps < start, steps > last, steps >= before, late, middle]
    return np.select(conditions, names, "early").astype(object)


def counted(rows: int) -> str:
    """Say how many rows."""
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def band_of(values: Values) -> Band:
    """Summarise the finite ones among `values` ``[n]``."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Band(math.nan, math.nan, math.nan)
    low, high = np.quantile(values, [0.1, 0.9])
    return Band(float(np.median(values)), float(low), float(high))


def _numbers(
    rows: pa.Table,
    entry: Mapping[str, Any],
    reference: str,
    nulls: Mapping[str, str],
    branched: Mapping[str, int],
) -> Verdict:
    key = f"{entry['run']}|{reference}"
    start = branched.get(key, 0)
    final = entry["final_step"]
    final = int(pc.max(rows["step"]).as_py()) if final is None else final
    names = [name for name in rows["stream"].unique().to_pylist() if name not in ITERATES]
    by_stream = {name: select_rows(rows, stream=name) for name in names}
    defined = sum(int(_cosine(own)[1].sum()) for own in by_stream.values())
    end = end_of_path(reference, final)
    tail = part_of(values_of(rows["step"]), reference, final) == "end"
    first = math.ceil((1 - END_SHARE) * (end or 0))
    return Verdict(
        entry=entry,
        reference=reference,
        final=final,
        streams=tuple(names),
        parts=tuple(
            part
            for name, own in by_stream.items()
            for part in _parts(own, name, reference, final, start)
        ),
        left_out=(first, end, int(tail.sum())) if end and names else None,
        null=nulls.get(key) if names else None,
        start=start,
        undefined=sum(own.num_rows for own in by_stream.values()) - defined,
        nonfinite=int(pc.sum(rows["nonfinite"]).as_py()),
    )


def _parts(rows: pa.Table, stream: str, reference: str, final: int, start: int) -> Iterator[Part]:
    cosine, defined = _cosine(rows)
    null, rate, rate_null = (values_of(rows[n]) for n in ("cosine_null", "lolr", "lolr_null"))
    parts = part_of(values_of(rows["step"]), reference, final, start)
    batches = max(1, len(rows["batch"].unique()))
    for name in ("before", *PARTS, "after"):
        here = (parts == name) & defined
        # By step and batch, in the order of the table.
        all_of_part = cosine[parts == name].reshape(-1, batches)
        # Nothing lies before w_0, and after another w* only what was recorded there.
        if not here.any() and (name not in PARTS or reference == "step:0"):
            continue
        yield Part(
            stream=stream,
            name=name,
            n=int(here.sum()),
            cosine=band_of(cosine[here]),
            null=band_of(null[here]).median,
            ratio=band_of(ratio(cosine[here], null[here])),
            rate_ratio=band_of(ratio(rate[here], rate_null[here])),
            negative=float((cosine[here] < 0).mean()) if here.any() else math.nan,
            mean=path_interval(all_of_part, LEVEL),
            below=negative_interval(all_of_part, LEVEL),
        )


def _cosine(rows: pa.Table) -> tuple[Values, NDArray[np.bool_]]:
    """Give the cosine that is positive towards w* and where it is defined."""
    updates = rows["stream"][0].as_py() == "updates"
    cosine = -values_of(rows["cosine_update"]) if updates else values_of(rows["cosine"])
    return cosine, np.isfinite(cosine)


def _text(found: Verdict) -> str:
    unfinished = (
        "" if found.entry["final_step"] is not None else " so far, the run has not finished"
    )
    lines = [
        f"{found.entry['run']}   w* = {found.reference}   T = {found.final} updates{unfinished}   "
        f"D = {found.entry['num_parameters']:,}"
    ]
    cells = [_HEAD, *map(_cells, found.parts)]
    lines += (
        aligned(cells, left=2)
        if found.streams
        else ["no gradients or updates: see norm_dist in the table"]
    )
    lines += map(_lines, _notes(found))
    return "\n".join(lines)


def _cells(part: Part) -> tuple[str, ...]:
    effective = part.mean.effective
    count = str(part.n) if math.isnan(effective) else f"{part.n} ({effective:.0f})"
    numbers = [_estimate(part.mean.interval), number(part.null), _written(part.ratio)]
    share = part.below.interval
    negative = f"{100 * part.negative:.3g} %" if part.n else NONE
    if part.n and share.known:
        negative += f" [{100 * share.low:.3g}, {100 * share.high:.3g}]"
    return (part.stream, part.name, count, *numbers, negative)


def _notes(found: Verdict) -> Iterator[str]:
    if found.left_out is not None:
        first, last, rows = found.left_out
        yield (
            f"left out: the last {100 * END_SHARE:g} % before w*, t = {first} to {last} "
            f"({counted(rows)}); there γ tends to γ⁰ anyway"
        )
    if found.start:
        yield (
            f"before: t < {found.start}, where the branch had not left this run yet: its way to w* "
            "is made of these gradients too, and they are no control"
        )
    if found.null is not None:
        yield f"γ⁰: {found.null}"
    others = [name for name in found.streams if name not in ("minibatch", "updates")]
    if others:
        yield f"{', '.join(others)}: no null, only the minibatch gradients made the path"
    if "updates" in found.streams:
        yield "updates: -cos(u, e) in the place of γ, positive where u starts out towards w*"
    if found.undefined:
        why = "where a norm is 0 or a number is not finite"
        yield f"undefined: {counted(found.undefined)}, left out, {why}"
    if found.nonfinite:
        yield f"non-finite coordinates: {found.nonfinite}"


def _written(band: Band) -> str:
    if not math.isfinite(band.median):
        return NONE
    return f"{band.median:.3g} [{band.low:.3g}, {band.high:.3g}]"


def _estimate(interval: Interval) -> str:
    if not interval.known:
        return number(interval.value)
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def _lines(note: str) -> str:
    return "\n".join(wrapped(note))
