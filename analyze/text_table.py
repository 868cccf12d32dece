"""Small tables as plain text: columns side by side, medians with their quantiles."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np

from analyze.quantities import Values

WIDTH = 100
NONE = "–"


def aligned(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lay out rows of cells in columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def wrapped(note: str) -> list[str]:
    """Break a note into lines."""
    return textwrap.wrap(
        note, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def number(value: float) -> str:
    """Three digits, or a dash where it is not finite."""
    return f"{value:.3g}" if math.isfinite(value) else NONE


def median(values: Values) -> str:
    """The median of what is finite, or a dash."""
    values = values[np.isfinite(values)]
    return f"{np.median(values):.3g}" if len(values) else NONE


def band(values: Values) -> str:
    """The median of what is finite with its 10 and 90 % quantiles, or a dash."""
    values = values[np.isfinite(values)]
    if not len(values):
        return NONE
    low, high = np.quantile(values, [0.1, 0.9])
    return f"{np.median(values):.3g} [{low:.3g}, {high:.3g}]"
