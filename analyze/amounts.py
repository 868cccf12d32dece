"""Bytes and times as one would say them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Write a number of bytes with its unit, three digits: ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def duration(seconds: float) -> str:
    """Write a time as one would say it: ``8 s``, ``12 min``, ``3.4 h``."""
    if seconds < 1:
        return "a second"
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 120 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
