"""The verdict in words and cells: for the terminal here, and for the page, which lays them out.

A cell is a value and what follows it in brackets, its interval or its quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from os import PathLike

import pyarrow as pa

from analyze.quantities import SIGN
from analyze.text_table import NONE, aligned, bounds, number, wrapped
from analyze.verdict import END_SHARE, PARTS, Part, Verdict, counted, summarise
from analyze.verdict_groups import GroupVerdict, read_groups, summarise_groups

# A number, and the bounds that may follow it.
Cell = tuple[str, str]

HEAD: tuple[Cell, ...] = (
    ("stream", ""),
    ("part", ""),
    ("n (eff.)", ""),
    ("γ", "95 %"),
    ("γ⁰", ""),
    ("γ/γ⁰", "10 %, 90 %"),
    ("η*/a_t", ""),
    ("γ < 0", "95 %"),
)
NOTE = (
    "γ and γ < 0: means of n rows with intervals within this run, by blocks of steps crossed with "
    "batches; (eff.): how many independent steps they are worth. γ⁰, γ/γ⁰, η*/a_t: medians, with "
    "the 10 and 90 % quantiles of the rows. About other seeds this says nothing: see `analyze "
    "compare`."
)
GROUP_NOTE = (
    "by groups: medians of the rows of each part, of the group's own g and e; γ < 0 of all three "
    "parts. How they spread is in the table."
)


def verdict(table: pa.Table) -> str:
    """Summarise a table of `analyze.tables.measure_run`; several lines of plain text.

    First the whole model, as far as its rows are there, then the groups of tensors.
    """
    found, groups = summarise(table), summarise_groups(table)
    blocks = [*map(_text, found), *map(_group_text, groups)]
    told = any(each.streams for each in found)
    closing = [SIGN, *([NOTE] if told else []), *([GROUP_NOTE] if groups else [])]
    if told or groups:
        blocks.append("\n".join(map(_lines, closing)))
    return "\n\n".join(blocks)


def group_verdict(path: str | PathLike[str]) -> str:
    """Summarise the groups of tensors in a file of `analyze compute`; several lines of text."""
    blocks = [*map(_group_text, read_groups(path)), _lines(GROUP_NOTE)]
    return "\n\n".join(blocks)


def heading(found: Verdict) -> list[str]:
    """What was measured: the run, w*, T and D."""
    unfinished = (
        "" if found.entry["final_step"] is not None else " so far, the run has not finished"
    )
    return [
        str(found.entry["run"]),
        f"w* = {found.reference}",
        f"T = {found.final} updates{unfinished}",
        f"D = {found.entry['num_parameters']:,}",
    ]


def cells(part: Part) -> tuple[Cell, ...]:
    """One row of the verdict, below `HEAD`."""
    effective = part.mean.effective
    count = str(part.n) if math.isnan(effective) else f"{part.n} ({effective:.0f})"
    mean, share, ratio = part.mean.interval, part.below.interval, part.ratio
    percent = f"{100 * part.negative:.3g} %" if part.n else NONE
    return (
        (part.stream, ""),
        (part.name, ""),
        (count, ""),
        (number(mean.value), bounds(mean.low, mean.high)),
        (number(part.null), ""),
        (number(ratio.median), bounds(ratio.low, ratio.high)),
        (number(part.rate_ratio.median), ""),
        (percent, bounds(100 * share.low, 100 * share.high) if part.n else ""),
    )


def notes(found: Verdict) -> Iterator[str]:
    """What has to be known to read the rows."""
    for way in found.ways:
        yield (
            f"{way.stream}: ‖w - w*‖ {number(way.first_dist)} at t = {way.first}, "
            f"{number(way.last_dist)} at t = {way.last}"
        )
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
    if any(part.name == "after" for part in found.parts):
        yield (
            f"after: t > {found.end}, beyond w*: these gradients had no part in the way to it, and "
            "orthogonal ones would give γ = 0"
        )
    if found.null is not None:
        yield f"γ⁰: {found.null}"
    others = [name for name in found.streams if name not in ("minibatch", "updates")]
    if others:
        yield f"{', '.join(others)}: no null, only the minibatch gradients made the path"
    if "updates" in found.streams:
        yield "updates: -cos(u, e) in the place of γ, positive where u starts out towards w*"
    yield from _gaps(found)
    if found.nonfinite:
        yield f"non-finite coordinates: {found.nonfinite}"


def _gaps(found: Verdict) -> Iterator[str]:
    """Why numbers and intervals are missing."""
    reasons = [
        part.mean.interval.method.removeprefix("none: ")
        for part in found.parts
        if part.n and not part.mean.interval.known
    ]
    if reasons:
        yield f"γ without an interval: {' or '.join(sorted(set(reasons)))} in that part"
    if found.there:
        where = "w_T" if found.reference == "final" else "w*"
        at = "" if found.end is None else f", t = {found.end}"
        yield (
            f"no γ at {where} itself{at} ({counted(found.there)}): it is the point that e leads "
            "to, e = 0 has no direction"
        )
    if found.undefined:
        why = "where a norm is 0 or a number is not finite"
        yield f"undefined: {counted(found.undefined)}, left out, {why}"


def group_head(found: GroupVerdict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two rows of titles: over each three columns what they are, then the parts."""
    symbols = ("γ", "γ/γ⁰", "η*/a_t") if found.has_null else ("γ",)
    above = [title for name in symbols for title in (name, "", "")]
    return (
        (f"{found.stream}, by {found.grouping}", "", *above, ""),
        (found.grouping, "parameters", *PARTS * len(symbols), "γ < 0"),
    )


def group_cells(found: GroupVerdict) -> Iterator[tuple[str, ...]]:
    """The rows of a verdict by groups, below `group_head`."""
    for row in found.rows:
        numbers = (*row.cosine, *row.ratio, *row.rate_ratio) if found.has_null else row.cosine
        share = NONE if math.isnan(row.negative) else f"{100 * row.negative:.3g} %"
        yield (row.group, f"{row.size:,}", *map(number, numbers), share)


def group_notes(found: GroupVerdict) -> Iterator[str]:
    """What is not in the rows."""
    if not found.has_null:
        yield "no null: no γ/γ⁰ and no η*/a_t"
    if found.more:
        yield f"the {len(found.rows)} largest groups; {found.more} more are in the table"


def _text(found: Verdict) -> str:
    lines = ["   ".join(heading(found))]
    rows = [HEAD, *map(cells, found.parts)]
    lines += (
        aligned([[_joined(cell) for cell in row] for row in rows], left=2)
        if found.streams
        else ["no gradients or updates"]
    )
    lines += map(_lines, notes(found))
    return "\n".join(lines)


def _group_text(found: GroupVerdict) -> str:
    above, below = group_head(found)
    table = aligned([below, *group_cells(found)])
    # The first title is longer than its column, which need not grow for it.
    widths = [max(map(len, column)) for column in zip(below, *group_cells(found), strict=True)]
    titles = "  ".join(t.rjust(w) for t, w in zip(above[2:], widths[2:], strict=True)).rstrip()
    start = sum(widths[:2]) + 4
    title = above[0] if len(above[0]) < start + 2 else f"{above[0][: start - 1]}…"
    head = f"{found.run}   w* = {found.reference}"
    lines = [head, f"{title:{start}}{titles}", *table, *map(_lines, group_notes(found))]
    return "\n".join(lines)


def _joined(cell: Cell) -> str:
    value, band = cell
    if not band:
        return value
    return f"{value} {band}" if band[0] == "[" else f"{value} [{band}]"


def _lines(note: str) -> str:
    return "\n".join(wrapped(note))
