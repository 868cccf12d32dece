"""The verdict: the few rows that a researcher wants first, as plain text.

For each run, reference and stream, of the whole model: the cosine, its null, their ratio and the
fraction below 0, early, middle and late on the way to w*, with the end effect left out.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analyze.quantities import SIGN, Values, ratio
from analyze.references import end_of_path
from analyze.tables import read_metadata
from capture.store.layout import ITERATES

# The last part of the way to w*, where γ tends to its null whatever the landscape.
END_SHARE = 0.1
PARTS = ("early", "middle", "late")

_HEAD = ("stream", "part", "n", "γ [10 %, 90 %]", "γ⁰", "γ/γ⁰ [10 %, 90 %]", "γ < 0")
_LEFT = {0, 1}
_NONE = "–"
_WIDTH = 100


def verdict(table: pa.Table) -> str:
    """Summarise a table of `analyze.tables.build`; several lines of plain text.

    Only rows of the whole model are read.
    """
    metadata = read_metadata(table)
    entries = {entry["run"]: entry for entry in metadata["runs"]}
    table = table.filter(pc.equal(table["group"], "model"))
    blocks = [
        _block(_select(table, run=run, reference=reference), entries[run], reference, metadata)
        for run in table["run"].unique().to_pylist()
        for reference in table["reference"].unique().to_pylist()
    ]
    note = "Numbers are medians of n rows, [10 %, 90 %] their quantiles: no confidence interval."
    measured = set(table["stream"].unique().to_pylist()) - set(ITERATES)
    closing = [f"{SIGN}\n{note}"] if measured else []
    return "\n\n".join([*(block for block in blocks if block), *closing])


def part_of(steps: NDArray[np.int64], reference: str, final_step: int) -> NDArray[np.object_]:
    """Name the part of the way to w* in which each step lies.

    The thirds of the updates before the end effect, `end` for it, `after` for what follows w_N.
    """
    end = end_of_path(reference, final_step)
    last = final_step if end is None else end
    before = last if end is None else (1 - END_SHARE) * last
    conditions = [steps > last, steps >= before, steps >= before * 2 / 3, steps >= before / 3]
    if end is None:
        conditions[:2] = []
        return np.select(conditions, ["late", "middle"], "early").astype(object)
    return np.select(conditions, ["after", "end", "late", "middle"], "early").astype(object)


def _block(rows: pa.Table, entry: dict[str, Any], reference: str, metadata: Any) -> str:
    if not rows.num_rows:
        return ""
    final = entry["final_step"]
    unfinished = "" if final is not None else " so far, the run has not finished"
    final = int(pc.max(rows["step"]).as_py()) if final is None else final
    lines = [
        f"{entry['run']}   w* = {reference}   T = {final} updates{unfinished}   "
        f"D = {entry['num_parameters']:,}"
    ]
    cells: list[tuple[str, ...]] = [_HEAD]
    streams = [name for name in rows["stream"].unique().to_pylist() if name not in ITERATES]
    undefined = 0
    for stream in streams:
        own = _select(rows, stream=stream)
        undefined += own.num_rows - _cosine(own)[1].sum()
        cells += _stream(own, stream, reference, final)
    lines += _aligned(cells) if streams else ["no gradients or updates: see norm_dist in the table"]
    for note in _notes(rows, streams, reference, final, undefined, metadata):
        lines += textwrap.wrap(
            note, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
    return "\n".join(lines)


def counted(rows: int) -> str:
    """Say how many rows."""
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def _stream(rows: pa.Table, stream: str, reference: str, final: int) -> Iterator[tuple[str, ...]]:
    cosine, defined = _cosine(rows)
    null = rows["cosine_null"].to_numpy()
    parts = part_of(rows["step"].to_numpy(), reference, final)
    for part in (*PARTS, "after"):
        here = (parts == part) & defined
        if not here.any():
            if part in PARTS and reference != "step:0":  # nothing lies before w_0
                yield (stream, part, "0", *[_NONE] * 4)
            continue
        yield (
            stream,
            part,
            str(here.sum()),
            _band(cosine[here]),
            _median(null[here]),
            _band(ratio(cosine[here], null[here])),
            f"{100 * (cosine[here] < 0).mean():.3g} %",
        )


def _cosine(rows: pa.Table) -> tuple[Values, NDArray[np.bool_]]:
    """Give the cosine that is positive towards w* and where it is defined."""
    updates = rows["stream"][0].as_py() == "updates"
    cosine = -rows["cosine_update"].to_numpy() if updates else rows["cosine"].to_numpy()
    return cosine, np.isfinite(cosine)


def _notes(
    rows: pa.Table, streams: list[str], reference: str, final: int, undefined: int, metadata: Any
) -> Iterator[str]:
    end = end_of_path(reference, final)
    if end and streams:
        tail = part_of(rows["step"].to_numpy(), reference, final) == "end"
        first, share = math.ceil((1 - END_SHARE) * end), f"{100 * END_SHARE:g} %"
        yield (
            f"left out: the last {share} before w*, t = {first} to {end} ({counted(tail.sum())}); "
            "there γ tends to γ⁰ anyway"
        )
    run = rows["run"][0].as_py()
    null = metadata["null"].get(f"{run}|{reference}")
    if null is not None and streams:
        yield f"γ⁰: {null}"
    others = [name for name in streams if name not in ("minibatch", "updates")]
    if others:
        yield f"{', '.join(others)}: no null, only the minibatch gradients made the path"
    if "updates" in streams:
        yield "updates: -cos(u, e) in the place of γ, positive where u starts out towards w*"
    if undefined:
        why = "where a norm is 0 or a number is not finite"
        yield f"undefined: {counted(undefined)}, left out, {why}"
    bad = int(pc.sum(rows["nonfinite"]).as_py())
    if bad:
        yield f"non-finite coordinates: {bad}"


def _select(table: pa.Table, **wanted: str) -> pa.Table:
    for name, value in wanted.items():
        table = table.filter(pc.equal(table[name], value))
    return table


def _median(values: Values) -> str:
    values = values[np.isfinite(values)]
    return f"{np.median(values):.3g}" if len(values) else _NONE


def _band(values: Values) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return _NONE
    low, high = np.quantile(values, [0.1, 0.9])
    return f"{np.median(values):.3g} [{low:.3g}, {high:.3g}]"


def _aligned(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in _LEFT else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
