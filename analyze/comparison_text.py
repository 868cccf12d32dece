"""A comparison as plain text: aligned tables, and what has to be known to read them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analyze.alignment import STEPS
from analyze.cells import SHARE, compared_in
from analyze.comparison import Block, Comparison
from analyze.curves import shorten
from analyze.derived import NULLS
from analyze.interpolation import UNKNOWN, Interpolation
from analyze.quantities import SIGN
from analyze.text_table import NONE, aligned, bounds, number, wrapped
from analyze.verdict import END_SHARE

# More differences than these are for the table, not for the eye.
_MOST_PAIRS = 6

# The quantities of tables that stand one below the other; the first has its bands and differences.
OF_GRADIENTS = (("cosine", "cosine_ratio", "lolr_ratio"), (SHARE, "rsi", "eb", "z"))
OF_UPDATES = (
    ("descent_update", "descent_update_ratio", "lolr_update_ratio"),
    (SHARE, "lolr_update"),
)
_ALWAYS = ("cosine", "descent_update")

# Largest over the batches: the norm at w_T, and its share of that at w_0.
_CALL = ["run", "verdict", "loss w_0", "w_T", "max ‖g_b‖ w_T", "w_T/w_0", "batches", "because"]

Row = Mapping[str, Any]
# How the quantities of a table are written, by name.
Columns = Mapping[str, str]


def comparison_text(comparison: Comparison) -> str:
    """Write a comparison for a terminal; several lines of plain text."""
    paragraphs = [_wrapped([f"warning: {text}" for text in comparison.warnings])]
    for block in comparison.blocks:
        if block.same:
            at = f"at equal epochs, {block.range.describe()}: the same rows"
            paragraphs[-1] = f"{paragraphs[-1]}\n{at}"
        else:
            paragraphs.append(_block(block, comparison))
    paragraphs += [_interpolation(comparison), _reading(comparison)]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _block(block: Block, comparison: Comparison) -> str:
    unit = "steps" if block.range.unit == STEPS else "epochs"
    runs = "1 run" if block.runs == 1 else f"{block.runs} runs"
    head = f"{block.stream}   w* = {block.reference}   at equal {unit}"
    if not block.rows:
        why = "some run does not tell its epochs, or the runs have no rows in common"
        return "\n".join([f"{head}: nothing to compare, {why}", _wrapped(block.notes)])
    tables = OF_UPDATES if block.stream == "updates" else OF_GRADIENTS
    columns = _columns(block, tables[0])
    parts = [f"{head}, {block.range.describe()}   {runs}"]
    parts += ["\n".join(_aligned(numbers_table(block, names, comparison))) for names in tables]
    groups = [row for row in block.rows if row["against"] is None]
    parts.append("\n".join(_aligned(_bands(groups, columns, comparison))))
    pairs = [row for row in block.rows if row["against"] is not None]
    count = len({(row["group"], row["against"]) for row in pairs})
    if count > _MOST_PAIRS:
        parts.append(f"{count} differences between groups: see the table that --out writes")
    elif pairs:
        parts.append("\n".join(_aligned(_differences(pairs, columns, comparison))))
    return "\n".join([*parts, _wrapped(block.notes)]).rstrip()


def numbers_table(block: Block, names: Sequence[str], comparison: Comparison) -> list[list[str]]:
    """Value and interval of the quantities `names`: a head, a row for each part and group."""
    columns = _columns(block, names)
    found = [["part", *comparison.keys, "n", *columns.values()]]
    groups = [row for row in block.rows if row["against"] is None]
    for part, label, own in _lines(groups, "group"):
        count = max(row["runs"] for row in own.values())
        cells = [_number(own, name, count) for name in columns]
        found.append([part, *_values(label, comparison), str(count), *cells])
    return found


def _columns(block: Block, names: Sequence[str]) -> Columns:
    symbols = {quantity.name: quantity.symbol for quantity in compared_in(block.stream)}
    return {name: symbols[name] for name in names}


def _bands(rows: Sequence[Row], columns: Columns, comparison: Comparison) -> list[list[str]]:
    """Quantiles of the rows of all runs, and how much the rows say."""
    names = [name for name in columns if name != SHARE]
    bands = [f"{columns[name]} [10 %, 90 %]" for name in names]
    found = [["part", *comparison.keys, "rows", "steps", "effective", "block", *bands]]
    for part, label, own in _lines(rows, "group"):
        first = own[names[0]]
        block = NONE if first["block"] is None else str(first["block"])
        counts = [str(first["rows"]), str(first["steps"]), number(first["effective_steps"]), block]
        cells = [bounds(own[name]["q10"], own[name]["q90"]) or NONE for name in names]
        found.append([part, *_values(label, comparison), *counts, *cells])
    return found


def _differences(rows: Sequence[Row], columns: Columns, comparison: Comparison) -> list[list[str]]:
    found = [["part", "difference", "n", *columns.values()]]
    for part, labels, own in _lines(rows, "group", "against"):
        names = [", ".join(_values(label, comparison)) for label in labels]
        first = own[next(iter(columns))]
        paired = "pair" in first["method"]
        count = f"{first['runs']} {'pairs' if paired else 'runs'}"
        cells = [_number(own, name, first["runs"]) for name in columns]
        found.append([part, " − ".join(names), count, *cells])
    return found


def _lines(rows: Sequence[Row], *keys: str) -> Iterator[tuple[str, Any, dict[str, Row]]]:
    """The rows of each part and group, or pair of groups, by quantity."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        place = (row["part"], *(row[key] for key in keys))
        found.setdefault(place, {})[row["quantity"]] = row
    for (part, *labels), own in found.items():
        yield part, labels if len(labels) > 1 else labels[0], own


def _values(label: str, comparison: Comparison) -> list[str]:
    group = next(group for group in comparison.groups if group.label == label)
    return [shorten(value) for value in group.values]


def _number(own: Mapping[str, Row], name: str, count: int) -> str:
    """`0.3 [0.2, 0.4]`; in parentheses within one run; with n where some runs have no number."""
    row = own[name]
    if not math.isfinite(row["value"]):
        # It is 0 for what follows w_N: no such gradient is part of the way.
        null = own[NULLS[name]]["value"] if name in NULLS else math.inf
        return "no null" if math.isnan(null) else "null is 0" if null == 0 else NONE
    share = name == SHARE
    scale, unit = (100.0, " %") if share else (1.0, "")
    within = row["method"].startswith(("block", "Wilson")) and row["runs"] == 1
    words = [f"{number(scale * row['value'])}{unit}"]
    words.append(bounds(scale * row["low"], scale * row["high"], "()" if within else "[]"))
    if row["runs"] != count:
        words.append(f"n={row['runs']}")
    return " ".join(word for word in words if word)


def _interpolation(comparison: Comparison) -> str:
    """The calls with their evidence; runs of which nothing was measured share a line."""
    silent: dict[str, list[str]] = {}
    for call in comparison.interpolation:
        if _is_silent(call):
            silent.setdefault(call.reason, []).append(call.run)
    bound = comparison.interpolation[0].threshold
    rule = (
        "interpolation, from training loss and gradients of single batches as shares of their "
        f"values at w_0: both ≤ {bound:g}, it does not where one ≥ {math.sqrt(bound):.3g}"
    )
    lines = [_wrapped([rule])]
    cells = evidence_table(comparison)
    lines += _aligned(cells) if len(cells) > 1 else []
    said = [f"{', '.join(runs)}: {UNKNOWN}; {why}" for why, runs in silent.items()]
    return "\n".join([*lines, *([_wrapped(said)] if said else [])])


def evidence_table(comparison: Comparison, *, silent: bool = False) -> list[list[str]]:
    """The calls of interpolation: a head, and a row for each run of which anything was measured.

    With `silent`, the others too.
    """
    cells = [_CALL]
    for call in comparison.interpolation:
        numbers = (call.loss_start, call.loss, call.gradient_norm, call.gradient)
        if silent or not _is_silent(call):
            batches = str(call.batches)
            run = shorten(call.run)
            cells.append([run, call.verdict, *map(number, numbers), batches, call.reason])
    return cells


def _is_silent(call: Interpolation) -> bool:
    return not call.batches and call.verdict == UNKNOWN


def _reading(comparison: Comparison) -> str:
    """What the signs mean, as far as they occur."""
    rows = [row for block in comparison.blocks for row in block.rows]
    level = f"{100 * comparison.level:g} %"
    groups = [row for row in rows if row["against"] is None]
    notes = [
        SIGN,
        "Numbers are means over n runs of each run's mean over its rows of the part (of γ/γ⁰ and "
        "η*/a_t, `analyze compute` prints medians).",
    ]
    if not all(block.range.closed for block in comparison.blocks):
        share = f"{100 * END_SHARE:g} %"
        notes.append(f"Left out: the last {share} before w*; there γ tends to γ⁰ anyway.")
    if any(row["runs"] > 1 and math.isfinite(row["low"]) for row in groups):
        notes.append(f"[ ] after a number: {level} interval over runs, Student's t.")
    if any(row["runs"] == 1 for row in groups):
        notes.append(
            f"n = 1: no interval over runs, one run says nothing about another seed. ( ): {level} "
            "interval within that run, by drawing blocks of steps, crossed with batches."
        )
    if any(row["method"] == "Wilson, effective steps" for row in groups):
        notes.append("γ < 0 where no row is, or all are: Wilson's, of the effective steps.")
    if any(row["method"] == "Wilson, independent rows" for row in groups):
        notes.append("γ < 0 where the rows of the one run are nearly independent: Wilson's.")
    methods = {row["method"] for row in rows if row["against"] is not None}
    if methods:
        said = sorted(method for method in methods if not method.startswith("none"))
        how = f": {' or '.join(said)}" if said else ""
        notes.append(f"Differences{how}; not corrected for their number.")
    missing = {row["method"] for row in rows if math.isfinite(row["value"])}
    missing = {text.removeprefix("none: ") for text in missing if text.startswith("none: ")}
    if missing:
        notes.append(f"Without an interval: {'; '.join(sorted(missing))}.")
    left_out = max((row["left_out"] for row in groups if row["quantity"] in _ALWAYS), default=0)
    if left_out:
        notes.append(
            f"Up to {left_out} rows of a group and part are left out: a norm is 0 or a number is "
            "not finite; the table has the counts."
        )
    return _wrapped(notes)


def _wrapped(texts: Sequence[str]) -> str:
    return "\n".join(line for text in texts for line in wrapped(text))


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    return aligned(cells, left=len(cells[0]))
