"""Stage 2: measure a recorded run, as often as one likes. No torch here, ever.

Public names are resolved when first used, so that a command's help does not wait for Dask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analyze.compute import compute_moments
    from analyze.gram import compute_gram
    from analyze.pairs_of_run import measure_pairs
    from analyze.path import measure_path
    from analyze.report import write_report
    from analyze.tables import measure_run, read_table, write_table

__all__ = [
    "compute_gram",
    "compute_moments",
    "measure_pairs",
    "measure_path",
    "measure_run",
    "read_table",
    "write_report",
    "write_table",
]

_HOMES = {
    "compute_gram": "gram",
    "compute_moments": "compute",
    "measure_pairs": "pairs_of_run",
    "measure_path": "path",
    "measure_run": "tables",
    "read_table": "tables",
    "write_report": "report",
    "write_table": "tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
