"""Stage 2: measure a recorded run, as often as one likes. No torch here, ever.

Public names are resolved when first used, so that a command's help does not wait for Dask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analyze.compute import compute_moments
    from analyze.dataset import to_dataset, to_table, to_tree
    from analyze.export import export_inputs, export_table
    from analyze.library import measure_dataset, measure_table, measure_tree
    from analyze.methods import describe_methods, write_methods
    from analyze.report import write_report
    from analyze.tables import measure_run, read_table, write_table
    from capture.store import open_run

__all__ = [
    "compute_moments",
    "describe_methods",
    "export_inputs",
    "export_table",
    "measure_dataset",
    "measure_run",
    "measure_table",
    "measure_tree",
    "open_run",
    "read_table",
    "to_dataset",
    "to_table",
    "to_tree",
    "write_methods",
    "write_report",
    "write_table",
]

_HOMES = {
    "compute_moments": "analyze.compute",
    "describe_methods": "analyze.methods",
    "export_inputs": "analyze.export",
    "export_table": "analyze.export",
    "measure_dataset": "analyze.library",
    "measure_run": "analyze.tables",
    "measure_table": "analyze.library",
    "measure_tree": "analyze.library",
    "open_run": "capture.store",
    "read_table": "analyze.tables",
    "to_dataset": "analyze.dataset",
    "to_table": "analyze.dataset",
    "to_tree": "analyze.dataset",
    "write_methods": "analyze.methods",
    "write_report": "analyze.report",
    "write_table": "analyze.tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
