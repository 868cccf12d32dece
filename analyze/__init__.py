"""Stage 2: measure a recorded run, as often as one likes. No torch here, ever.

Public names are resolved when first used, so that a command's help does not wait for Dask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analyze.compare import compare_runs
    from analyze.comparison import write_comparison
    from analyze.compute import compute_moments
    from analyze.coverage import measure_coverage
    from analyze.dataset import to_dataset, to_table, to_tree
    from analyze.export import export_inputs, export_table
    from analyze.gram import compute_gram
    from analyze.library import measure_dataset, measure_table, measure_tree
    from analyze.methods import describe_methods, write_methods
    from analyze.pairs_of_run import measure_pairs
    from analyze.path import measure_path
    from analyze.plans import project_pairs, project_path, project_run
    from analyze.projection import Projection
    from analyze.report import write_report
    from analyze.schedule import schedule_run, write_schedule
    from analyze.schedulers import Cluster
    from analyze.tables import (
        measure_into,
        measure_run,
        read_table,
        write_table,
        writing_table,
    )
    from capture.store import open_run

__all__ = [
    "Cluster",
    "Projection",
    "compare_runs",
    "compute_gram",
    "compute_moments",
    "describe_methods",
    "export_inputs",
    "export_table",
    "measure_coverage",
    "measure_dataset",
    "measure_into",
    "measure_pairs",
    "measure_path",
    "measure_run",
    "measure_table",
    "measure_tree",
    "open_run",
    "project_pairs",
    "project_path",
    "project_run",
    "read_table",
    "schedule_run",
    "to_dataset",
    "to_table",
    "to_tree",
    "write_comparison",
    "write_methods",
    "write_report",
    "write_schedule",
    "write_table",
    "writing_table",
]

_HOMES = {
    "Cluster": "schedulers",
    "Projection": "projection",
    "compare_runs": "compare",
    "compute_gram": "gram",
    "compute_moments": "compute",
    "describe_methods": "methods",
    "export_inputs": "export",
    "export_table": "export",
    "measure_coverage": "coverage",
    "measure_dataset": "library",
    "measure_into": "tables",
    "measure_pairs": "pairs_of_run",
    "measure_path": "path",
    "measure_run": "tables",
    "measure_table": "library",
    "measure_tree": "library",
    "open_run": "capture.store",
    "project_pairs": "plans",
    "project_path": "plans",
    "project_run": "plans",
    "read_table": "tables",
    "schedule_run": "schedule",
    "to_dataset": "dataset",
    "to_table": "dataset",
    "to_tree": "dataset",
    "write_comparison": "comparison",
    "write_methods": "methods",
    "write_report": "report",
    "write_schedule": "schedule",
    "write_table": "tables",
    "writing_table": "tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    module = home if home.startswith("capture.") else f"{__name__}.{home}"
    return getattr(import_module(module), name)
