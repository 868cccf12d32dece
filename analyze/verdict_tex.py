r"""The verdict as LaTeX: a table for each run and reference, to be \input into a paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite, isnan

import pyarrow as pa

import capture
from analyze.latex import code, decimal, escape, math
from analyze.spread import Band
from analyze.verdict import END_SHARE, PARTS, Part, Verdict, counted, summarise
from analyze.verdict_groups import GroupRow, GroupVerdict, summarise_groups
from capture.store.errors import InputError

_HEAD = ("stream", "part", "$n$", "γ", "γ⁰", "γ/γ⁰", "η*/a_t", "γ < 0")
# Rows that fit on a page.
_MOST_ROWS = 45


def verdict_tex(table: pa.Table) -> str:
    r"""Write the numbers of the verdict as LaTeX: one `table*` for each run and reference.

    Where the table has rows by layer, tensor, kind or other groups, one for each of their streams
    too, and more where they do not fit on a page. Needs the package booktabs. `InputError` where
    no gradient or update was measured.
    """
    found = [each for each in summarise(table) if each.streams]
    groups = summarise_groups(table, most=None)
    if not (found or groups):
        raise InputError(
            "the table has no gradients or updates",
            fix="record some, or measure them with `capture probe`",
        )
    head = f"% Made by straightway {capture.__version__}. Needs \\usepackage{{booktabs}}."
    tables = [_table(each, place) for place, each in enumerate(found, 1)]
    pages = [(each, rows) for each in groups for rows in _pages(each)]
    tables += [
        _group_table(each, rows, place) for place, (each, rows) in enumerate(pages, len(found) + 1)
    ]
    return "\n".join([head, *tables])


def _table(found: Verdict, place: int) -> str:
    lines = [
        r"\begin{table*}",
        r"  \centering",
        r"  \footnotesize",
        r"  \setlength{\tabcolsep}{3pt}",
        rf"  \caption{{{' '.join(_caption(found))}}}",
        rf"  \label{{{_label(found.entry['run'], found.reference, place)}}}",
        r"  \smallskip",
        r"  \begin{tabular}{llrlllll}",
        r"    \toprule",
        f"    {_row(tuple(_head(title) for title in _HEAD))}",
        *_body(found),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table*}",
        "",
    ]
    return "\n".join(lines)


def _label(run: object, reference: str, place: int) -> str:
    short = str(run).rpartition("/")[2].removesuffix(".zarr")
    name = re.sub("[^0-9A-Za-z]+", "-", f"{short}-{reference}").strip("-")
    return f"tab:{name}" if place == 1 else f"tab:{name}-{place}"


def _head(title: str) -> str:
    return title if title.isascii() and "_" not in title else f"${math(title)}$"


def _body(found: Verdict) -> Iterator[str]:
    for stream in found.streams:
        yield r"    \midrule"
        named = code(stream)
        for part in found.parts:
            if part.stream == stream:
                yield f"    {_row((named, *_cells(part)))}"
                named = ""  # once for all parts


def _cells(part: Part) -> tuple[str, ...]:
    mean, share, effective = part.mean.interval, part.below.interval, part.mean.effective
    count = str(part.n) if isnan(effective) else f"{part.n} ({effective:.0f})"
    bands = [_value(part.null), _band(part.ratio), _band(part.rate_ratio)]
    below = _bounds(100 * share.low, 100 * share.high)
    negative = rf"{_value(100 * part.negative)}\,\%{below}" if part.n else "--"
    return (
        part.name,
        count,
        f"{_value(mean.value)}{_bounds(mean.low, mean.high)}",
        *bands,
        negative,
    )


def _row(cells: tuple[str, ...]) -> str:
    return rf"{' & '.join(cells)} \\"


def _value(value: float) -> str:
    text = decimal(value)
    return text if text == "--" else f"${text}$"


def _band(band: Band) -> str:
    middle = _value(band.median)
    spread = rf"{{\scriptsize$[{decimal(band.low)}, {decimal(band.high)}]$}}"
    return middle if middle == "--" else f"{middle} {spread}"


def _bounds(low: float, high: float) -> str:
    """A confidence interval in brackets; empty where there is none."""
    known = isfinite(low) and isfinite(high)
    return rf" {{\scriptsize$[{decimal(low)}, {decimal(high)}]$}}" if known else ""


def _caption(found: Verdict) -> Iterator[str]:
    run, D = code(str(found.entry["run"])), f"{found.entry['num_parameters']:,}"
    unfinished = "" if found.entry["final_step"] is not None else " so far, the run is not finished"
    yield (
        rf"Run {run}: {escape('cosine γ between sampled gradient and')} $e_t = w_t - w^*$, with "
        f"$w^*$ = {_reference(found.reference)}, $T = {found.final}$ updates{unfinished}, "
        f"$D = {D.replace(',', '{,}')}$ parameters."
    )
    yield (
        r"$\gamma$ and $\gamma < 0$: means over $n$ rows, which are worth as many independent ones "
        r"as stand in parentheses, with 95\,\% intervals within this run. Others: medians, in "
        r"brackets the 10\,\% and 90\,\% quantiles of the rows (no confidence interval). Early, "
        r"middle and late are thirds of the updates before the end."
    )
    if found.left_out is not None:
        first, last, rows = found.left_out
        yield (
            rf"Left out: the last {100 * END_SHARE:g}\,\% before $w^*$, $t = {first}$ to ${last}$ "
            rf"({counted(rows)}), where $\gamma$ tends to $\gamma^0$ anyway."
        )
    yield from _notes(found)


def _reference(reference: str) -> str:
    return r"the last iterate $w_T$" if reference == "final" else code(reference)


def _notes(found: Verdict) -> Iterator[str]:
    if found.null is not None:
        yield rf"$\gamma^0$ and $a_t$: {escape(found.null)}."
    if set(found.streams) - {"minibatch", "updates"}:
        yield "Only minibatch gradients made the path: other streams have no null."
    if "updates" in found.streams:
        yield r"For updates, $-\cos(u_t, e_t)$ stands in the place of $\gamma$."
    if found.start:
        yield (
            rf"Rows named before lie at $t < {found.start}$, where the branch that ends in $w^*$ "
            "had not left this run yet."
        )
    if any(part.name == "after" for part in found.parts):
        yield rf"Rows named after lie at $t > {found.end}$, beyond $w^*$."
    if found.there:
        yield (
            rf"{counted(found.there)} at $w^*$ itself, where $e = 0$ has no direction, left out."
        ).capitalize()
    if found.undefined:
        why = "where a norm is 0 or a number is not finite"
        yield f"{counted(found.undefined)} without a cosine left out, {why}.".capitalize()
    if found.nonfinite:
        yield f"Coordinates that are NaN or infinite: {found.nonfinite}."


def _pages(found: GroupVerdict) -> Iterator[tuple[GroupRow, ...]]:
    for start in range(0, len(found.rows), _MOST_ROWS):
        yield found.rows[start : start + _MOST_ROWS]


def _group_table(found: GroupVerdict, rows: tuple[GroupRow, ...], place: int) -> str:
    symbols = ("γ", "γ/γ⁰", "η*/a_t") if found.has_null else ("γ",)
    titles = " & ".join(rf"\multicolumn{{3}}{{c}}{{{_head(title)}}}" for title in symbols)
    places = range(3, 3 + 3 * len(symbols), 3)
    lines = [
        r"\begin{table*}",
        r"  \centering",
        r"  \footnotesize",
        r"  \setlength{\tabcolsep}{3pt}",
        rf"  \caption{{{' '.join(_group_caption(found, rows))}}}",
        rf"  \label{{{_label(found.run, found.reference, place)}}}",
        r"  \smallskip",
        rf"  \begin{{tabular}}{{lr*{{{3 * len(symbols) + 1}}}{{r}}}}",
        r"    \toprule",
        rf"    & & {titles} & \\",
        "    " + " ".join(rf"\cmidrule(lr){{{place}-{place + 2}}}" for place in places),
        f"    {_row((found.grouping, 'parameters', *PARTS * len(symbols), _head('γ < 0')))}",
        r"    \midrule",
        *(f"    {_row(_group_cells(row, found.has_null))}" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table*}",
        "",
    ]
    return "\n".join(lines)


def _group_cells(row: GroupRow, has_null: bool) -> tuple[str, ...]:
    size = f"{row.size:,}".replace(",", "{,}")
    numbers = (*row.cosine, *row.ratio, *row.rate_ratio) if has_null else row.cosine
    share = _value(100 * row.negative)
    share = share if share == "--" else rf"{share}\,\%"
    return (code(row.group), f"${size}$", *map(_value, numbers), share)


def _group_caption(found: GroupVerdict, rows: tuple[GroupRow, ...]) -> Iterator[str]:
    yield (
        rf"Run {code(found.run)}, stream {code(found.stream)}, by {escape(found.grouping)}, with "
        f"$w^*$ = {_reference(found.reference)}: medians over the rows of the early, middle and "
        r"late third of the updates before the end, of each group's own gradient and distance; "
        rf"{_head('γ < 0')} over all three."
    )
    if not found.has_null:
        yield "There is no null here."
    if len(rows) < len(found.rows):
        first = found.rows.index(rows[0]) + 1
        yield f"Rows {first} to {first + len(rows) - 1} of {len(found.rows)}."
    if found.stream == "updates":
        yield r"For updates, $-\cos(u_t, e_t)$ stands in the place of $\gamma$."
