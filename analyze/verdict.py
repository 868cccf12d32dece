"""The verdict: the few numbers that a researcher wants first; `analyze.verdict_text` writes them.

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
from analyze.derived import SOURCES, cosine_of, rate_of, value_of
from analyze.quantities import Values
from analyze.references import end_of_path
from analyze.rows import select_rows, sizes_of, whole_model
from analyze.spread import Band, band_of
from analyze.tables import read_metadata
from analyze.uncertainty import WithinRun, negative_interval, path_interval
from capture.store.layout import ITERATES

# What of the whole model's rows is read here.
COLUMNS = (
    *("run", "stream", "step", "batch", "group", "reference", "num_parameters"),
    *(*SOURCES, "norm_dist", "nonfinite"),
)

# The last part of the way to w*, where γ tends to its null whatever the landscape.
END_SHARE = 0.1
PARTS = ("early", "middle", "late")

LEVEL = 0.95


@dataclass(frozen=True)
class Part:
    """One stream in one part of the way.

    `name` is one of `PARTS`, or "before" where a branch that ends in w* had not left the run yet,
    or "after" for what follows w_N. `n` counts the rows whose cosine γ, positive towards w*,
    is defined, and all the rest is over these: the median of its null γ⁰, γ/γ⁰ and η*/a_t with
    their quantiles, the fraction of γ < 0, and in `mean` and `below` the mean γ and that fraction
    with their intervals within the run.
    """

    stream: str
    name: str
    n: int
    null: float
    ratio: Band
    rate_ratio: Band
    negative: float
    mean: WithinRun
    below: WithinRun


@dataclass(frozen=True)
class Way:
    """How far a stream of iterates is from w* at its first saved step, and at its last."""

    stream: str
    first: int
    first_dist: float
    last: int
    last_dist: float


@dataclass(frozen=True)
class Verdict:
    """The numbers of one run and reference.

    `entry` has the facts of the run and `final` is T, or the last step so far. `left_out` is the
    end effect: its first and last step, and how many rows it has. `there` counts the rows at w*
    itself, where e = 0 has no direction, and `undefined` the others without a cosine; `nonfinite`
    counts NaN and infinite coordinates; `null` says what γ⁰ rests on, `ways` has the streams of
    iterates, such as the weights, and `start` is the step at which a branch that ends in w* left
    the run, 0 where none did.
    """

    entry: Mapping[str, Any]
    reference: str
    final: int
    streams: tuple[str, ...]
    parts: tuple[Part, ...]
    left_out: tuple[int, int, int] | None
    null: str | None
    there: int
    undefined: int
    nonfinite: int
    ways: tuple[Way, ...] = ()
    start: int = 0

    @property
    def end(self) -> int | None:
        """Step N of a w* on the run's own way; `None` where it lies elsewhere."""
        return end_of_path(self.reference, self.final)


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
    missing = [_missing(own, name) for name, own in by_stream.items()]
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
        there=sum(there for there, _ in missing),
        undefined=sum(others for _, others in missing),
        nonfinite=int(pc.sum(rows["nonfinite"]).as_py()),
        ways=tuple(_ways(rows)),
    )


def _ways(rows: pa.Table) -> Iterator[Way]:
    for name in rows["stream"].unique().to_pylist():
        if name in ITERATES:
            own = select_rows(rows, stream=name)
            steps, dist = values_of(own["step"]), values_of(own["norm_dist"])
            first, last = int(steps.argmin()), int(steps.argmax())
            yield Way(
                name, int(steps[first]), float(dist[first]), int(steps[last]), float(dist[last])
            )


def _parts(rows: pa.Table, stream: str, reference: str, final: int, start: int) -> Iterator[Part]:
    numbers = numbers_of(rows, stream)
    cosine = numbers["cosine"]
    defined = np.isfinite(cosine)
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
            null=band_of(numbers["null"][here]).median,
            ratio=band_of(numbers["ratio"][here]),
            rate_ratio=band_of(numbers["rate_ratio"][here]),
            negative=float((cosine[here] < 0).mean()) if here.any() else math.nan,
            mean=path_interval(all_of_part, LEVEL),
            below=negative_interval(all_of_part, LEVEL),
        )


def numbers_of(rows: pa.Table, stream: str) -> dict[str, Values]:
    """γ that is positive towards w*, its null, γ/γ⁰ and η*/a_t of the rows of a stream ``[N]``."""
    columns = {name: values_of(rows[name]) for name in SOURCES}
    cosine, rate = cosine_of(stream), rate_of(stream)
    names = {
        "cosine": cosine,
        "null": f"{cosine}_null",
        "ratio": f"{cosine}_ratio",
        "rate_ratio": f"{rate}_ratio",
    }
    return {key: value_of(name, columns) for key, name in names.items()}


def _missing(rows: pa.Table, stream: str) -> tuple[int, int]:
    """How many rows of a stream have no cosine: at w* itself, and others."""
    missing = ~np.isfinite(numbers_of(rows, stream)["cosine"])
    at = values_of(rows["norm_dist"]) == 0
    return int((missing & at).sum()), int((missing & ~at).sum())
