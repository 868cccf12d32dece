"""The table of `analyze pca`: one row per run, group of tensors, component and saved step.

What belongs to a component (its share of the variance, and the nulls) or to a step (the length of
the path) is repeated, so that each row stands for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analyze.columns import texts
from analyze.groups import Grouping, group_tensors, name_of
from analyze.metadata import printable
from analyze.pair_table import described, with_facts
from analyze.path import COMPONENTS, PathShape, measure_path
from analyze.schedulers import Cluster
from capture.store.reader import Run, open_run

PATH_TABLE_VERSION = 1
# What the metadata of the table call its kind.
PCA = "pca"

_COLUMNS: tuple[tuple[str, Any, str, str], ...] = (
    ("run", pa.string(), "", "the run, as typed"),
    ("group", pa.string(), "", "the tensors that were summed over"),
    ("num_parameters", pa.int64(), "", "coordinates in the group"),
    ("component", pa.int64(), "", "k, from 1"),
    ("variance", pa.float64(), "weight²", "mean over rows of the squared coordinate"),
    ("explained", pa.float64(), "1", "variance of the component / that of all"),
    ("null_walk", pa.float64(), "1", "6 / (π² k²): explained by a long random walk"),
    (
        "null_steps",
        pa.float64(),
        "1",
        "explained by orthogonal steps as long as ‖w_{i+1} - w_i‖ of this run's saved rows",
    ),
    ("step", pa.int64(), "updates", "t, the updates applied before"),
    ("coordinate", pa.float64(), "weight", "of w_t - mean(w) along the component"),
    ("walked", pa.float64(), "weight", "Σ‖w_{i+1} - w_i‖ over the saved rows up to t"),
    ("updated", pa.float64(), "weight", "Σ‖u‖ over all updates from the first row up to t"),
    ("displaced", pa.float64(), "weight", "‖w_t - w_first‖"),
)


def path_schema() -> pa.Schema:
    """List the columns of the table, with units and formulas; no file metadata."""
    return described(_COLUMNS)


def measure_path_table(
    path: str,
    *,
    by: Grouping = "model",
    components: int = COMPONENTS,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Measure the path of a run into a table; arguments and errors as `analyze.path.measure_path`.

    `by` as in `analyze.groups`.
    """
    labels, groups = group_tensors(open_run(path).table, by)
    steps, shapes = measure_path(
        path,
        groups,
        components=components,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
    )
    return build_path(open_run(path), steps, shapes, by, labels=labels, groups=groups, name=path)


def build_path(
    run: Run,
    steps: NDArray[np.int64],
    shapes: list[PathShape],
    by: Grouping,
    *,
    labels: list[str],
    groups: NDArray[np.int64],
    name: str,
) -> pa.Table:
    """Make the table of one run from the shape of each group."""
    name = printable(name)
    sizes = np.bincount(groups, np.diff(run.table.offsets), len(labels)).astype(np.int64)
    tables = [path_schema().empty_table()]
    for label, size, shape in zip(labels, sizes, shapes, strict=True):
        component, row = (i.ravel() for i in np.indices((len(shape.variance), len(steps))))
        nothing = np.zeros(len(row), np.int8)
        columns = {
            "run": texts([name], nothing),
            "group": texts([label], nothing),
            "num_parameters": pa.array(np.full(len(row), size)),
            "component": pa.array(component + 1),
            "step": pa.array(steps[row]),
            "coordinate": pa.array(shape.coordinates[row, component]),
        }
        for key in ("variance", "explained", "null_walk", "null_steps"):
            columns[key] = pa.array(getattr(shape, key)[component])
        for key in ("walked", "updated", "displaced"):
            columns[key] = pa.array(getattr(shape, key)[row])
        tables.append(pa.table(columns, schema=path_schema()))
    facts = {"kind": PCA, "table": PATH_TABLE_VERSION, "by": name_of(by)}
    return with_facts(tables, run, name, facts)
