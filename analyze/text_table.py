"""Small tables as plain text: columns side by side, numbers of three digits, medians with bands."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from analyze.quantities import Values
from analyze.spread import Band, band_of

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


def bounds(low: float, high: float, signs: str = "[]") -> str:
    """`[0.2, 0.4]`, or nothing where an end is not known."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{signs[0]}{number(low)}, {number(high)}{signs[1]}"


def span(values: Any, digits: int = 6) -> str | None:
    """The range of what is finite: `0.05`, or `0.0005 to 0.05`; `None` without any."""
    known = np.asarray([] if values is None else values, np.float64)
    known = known[np.isfinite(known)]
    if not known.size:
        return None
    ends = (f"{bound:.{digits}g}" for bound in (known.min(), known.max()))
    return " to ".join(dict.fromkeys(ends))


def minus(text: str) -> str:
    """A minus sign in the place of the terminal's hyphen, and aₜ, for a page."""
    return re.sub(r"(?<![\w-])-(?=\w|⟨)", "\u2212", text).replace("a_t", "aₜ")


def median(values: Values) -> str:
    """The median of what is finite, or a dash."""
    return number(band_of(values).median)


def band(values: Values | Band) -> str:
    """The median of what is finite with its 10 and 90 % quantiles, or a dash."""
    found = values if isinstance(values, Band) else band_of(values)
    text = f"{number(found.median)} {bounds(found.low, found.high)}"
    return text.rstrip()
