"""The figures and tables of a comparison of groups of runs, for a page.

Each figure has γ, γ/γ⁰ and η*/a_t, at equal steps and at equal epochs: none is drawn without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analyze.alignment import STEPS
from analyze.cells import compared_in
from analyze.comparison import Block, Comparison
from analyze.comparison_text import OF_GRADIENTS, OF_UPDATES, evidence_table, numbers_table
from analyze.curves import distinct
from analyze.derived import NULLS
from analyze.drawing import Picture
from analyze.figures import palette
from analyze.intervals import Estimates, Intervals, Measured
from analyze.sections import PageTable
from analyze.text_table import minus

Row = Mapping[str, Any]


def comparison_pictures(comparison: Comparison) -> Iterator[Picture]:
    """Make a figure for each reference and stream."""
    for key in distinct((block.reference, block.stream) for block in comparison.blocks):
        blocks = [b for b in comparison.blocks if (b.reference, b.stream) == key and b.rows]
        picture = _picture(comparison, blocks, *key)
        if picture.quantities:
            yield picture


def comparison_tables(comparison: Comparison) -> Iterator[PageTable]:
    """Lay out the numbers of each block, and the calls of interpolation with their evidence."""
    for block in comparison.blocks:
        if not block.rows:
            continue
        where = f"{block.stream} against {block.reference}, at equal {_unit(block)}"
        said = f"{where}, {block.range.describe()}"
        if block.same:
            yield PageTable(f"{said}: the same rows", (), ())
            continue
        for names in OF_UPDATES if block.stream == "updates" else OF_GRADIENTS:
            head, *rows = numbers_table(block, names, comparison)
            yield PageTable(said, [*map(minus, head)], rows, left=1 + len(comparison.keys))
            said = f"{where}, more"
    head, *rows = evidence_table(comparison, silent=True)
    yield PageTable("Interpolation, with its evidence", head, rows, left=2)


def _unit(block: Block) -> str:
    return "steps" if block.range.unit == STEPS else "epochs"


def _picture(
    comparison: Comparison, blocks: Sequence[Block], reference: str, stream: str
) -> Intervals:
    names = (OF_UPDATES if stream == "updates" else OF_GRADIENTS)[0]
    symbols = {each.name: minus(each.symbol) for each in compared_in(stream)}
    parts = tuple(distinct(row["part"] for block in blocks for row in block.rows))
    shown = {f"at equal {_unit(block)}": block for block in blocks}
    drawn = [
        Measured(
            symbols[name],
            1.0 if name in NULLS else None,
            {at: _estimates(block, name, comparison, parts) for at, block in shown.items()},
        )
        for name in names
    ]
    known = [each for each in drawn if _is_known(each)]
    missing = [each.symbol for each in drawn if not _is_known(each)]
    words = [
        "Dots: means over runs of each run's mean over its rows of the part. Lines: "
        f"{100 * comparison.level:g} % intervals over runs, of a group of one run within that run. "
        "Pale: 10 % to 90 % of the rows of all runs."
    ]
    if len(known) > 1:
        words.append("Dotted: what orthogonal gradients alone would give.")
    if missing:
        words.append(f"No {' and '.join(missing)}: there is no null here, see above.")
    if any(block.same for block in blocks):
        words.append("Equal epochs pick the rows that equal steps do.")
    if len(blocks) == 1:
        words.append(f"Compared {next(iter(shown))} only.")
    return Intervals(
        name=f"comparison-{stream}",
        title=f"{symbols[names[0]]} by group, beside its null: {stream} against {reference}",
        caption=" ".join(words),
        parts=parts,
        alignments=tuple(shown),
        quantities=tuple(known),
    )


def _is_known(quantity: Measured) -> bool:
    return any(
        bool(np.isfinite(each.value).any())
        for found in quantity.estimates.values()
        for each in found
    )


def _estimates(
    block: Block, quantity: str, comparison: Comparison, parts: Sequence[str]
) -> tuple[Estimates, ...]:
    rows = {
        (row["group"], row["part"]): row
        for row in block.rows
        if row["quantity"] == quantity and row["against"] is None
    }
    found = []
    colors = palette(len(comparison.groups))
    for group, color in zip(comparison.groups, colors, strict=True):
        own = [rows.get((group.label, part), {}) for part in parts]
        numbers = {
            name: np.array([row.get(name, math.nan) for row in own], np.float64)
            for name in ("value", "low", "high", "q10", "q90")
        }
        found.append(Estimates(group.label, color, **numbers))
    return tuple(found)
