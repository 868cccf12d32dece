"""What follows from the columns of a table, row by row: ratios to the null, signs turned, nulls.

The one home of γ/γ⁰ and η*/a_t. RSI and EB have nulls too: with ⟨g, e⟩₀ and ‖e‖₀ in the place of
⟨g, e⟩ and ‖e‖ they are γ⁰²/a_t and γ⁰/a_t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from analyze.quantities import Values, ratio

Columns = Mapping[str, Values]

# NaN where a null is NaN or 0; the null of a gradient beyond w* on the path is 0.
DERIVED: Mapping[str, Callable[[Columns], Values]] = {
    "cosine_ratio": lambda c: ratio(c["cosine"], c["cosine_null"]),
    "lolr_ratio": lambda c: ratio(c["lolr"], c["lolr_null"]),
    "rsi_null": lambda c: ratio(c["cosine_null"] ** 2, c["lolr_null"]),
    "eb_null": lambda c: ratio(c["cosine_null"], c["lolr_null"]),
    # The table has cos(u, e), negative where an update starts out towards w*.
    "descent_update": lambda c: -c["cosine_update"],
    "descent_update_null": lambda c: -c["cosine_update_null"],
    "descent_update_ratio": lambda c: ratio(c["cosine_update"], c["cosine_update_null"]),
    "lolr_update_ratio": lambda c: ratio(c["lolr_update"], c["lolr_update_null"]),
}
# What a ratio is a ratio to.
NULLS: Mapping[str, str] = {
    "cosine_ratio": "cosine_null",
    "lolr_ratio": "lolr_null",
    "descent_update_ratio": "descent_update_null",
    "lolr_update_ratio": "lolr_update_null",
}
# The columns that these follow from.
SOURCES = (
    *("cosine", "cosine_null", "lolr", "lolr_null"),
    *("cosine_update", "cosine_update_null", "lolr_update", "lolr_update_null"),
)


def value_of(name: str, columns: Columns) -> Values:
    """A column, or what follows from columns, float64 ``[N]``."""
    return DERIVED[name](columns) if name in DERIVED else columns[name]


def cosine_of(stream: str) -> str:
    """Name of the cosine of a stream that is positive towards w*; η* goes by `rate_of`."""
    return "descent_update" if stream == "updates" else "cosine"


def rate_of(stream: str) -> str:
    """Name of η* of a stream; for updates the factor by which they should have been longer."""
    return "lolr_update" if stream == "updates" else "lolr"
