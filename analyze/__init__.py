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
    from analyze.projection import Projection, project_run
    from analyze.report import write_report
    from analyze.schedule import schedule_run, write_schedule
    from analyze.schedulers import Cluster
    from analyze.tables import measure_run, read_table, write_table

__all__ = [
    "Cluster",
    "Projection",
    "compare_runs",
    "compute_moments",
    "measure_run",
    "project_run",
    "read_table",
    "schedule_run",
    "write_comparison",
    "write_report",
    "write_schedule",
    "write_table",
]

_HOMES = {
    "Cluster": "schedulers",
    "Projection": "projection",
    "compare_runs": "compare",
    "compute_moments": "compute",
    "measure_run": "tables",
    "project_run": "projection",
    "read_table": "tables",
    "schedule_run": "schedule",
    "write_comparison": "comparison",
    "write_report": "report",
    "write_schedule": "schedule",
    "write_table": "tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
