"""The table of `analyze coverage`, one row per run, stream and group; and what it prints.

Units and formulas are in the metadata of the fields, the facts of the run in those of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.coverage import Coverage, Integers, measure_coverage
from analyze.groups import Grouping, group_tensors, name_of
from analyze.metadata import printable
from analyze.pair_table import described, with_facts
from analyze.quantities import ratio
from analyze.schedulers import Cluster
from analyze.tables import read_metadata
from analyze.text_table import NONE, aligned, wrapped
from capture.store.layout import ITERATES
from capture.store.reader import Run, open_run

COVERAGE_TABLE_VERSION = 1
# What the metadata of the table call its kind.
COVERAGE = "coverage"

_COLUMNS: tuple[tuple[str, Any, str, str], ...] = (
    ("run", pa.string(), "", "the run, as typed"),
    ("stream", pa.string(), "", "where the vectors come from; of weights, w_t - w_first"),
    ("group", pa.string(), "", "the tensors that were counted"),
    ("num_parameters", pa.int64(), "", "coordinates in the group"),
    ("vectors", pa.int64(), "", "saved rows, times batches where the stream has several"),
    ("never", pa.int64(), "", "coordinates that are 0 in every vector"),
    ("never_share", pa.float64(), "1", "never / num_parameters"),
    ("zero_share", pa.float64(), "1", "mean over vectors of the share of coordinates that are 0"),
)
_MOST_ROWS = 60
COVERAGE_HEAD = ("stream", "vectors", "group", "never", "of", "share", "zeros")
COVERAGE_MEANING = (
    "never: coordinates that are 0 in every vector, a saved row or one of its batches; steps that "
    "were not saved are not seen. zeros: mean share of the coordinates that are 0 in one vector. "
    "Of weights, w_t - w_first is counted: coordinates that never moved; weight decay moves them "
    "without a gradient."
)


def coverage_schema() -> pa.Schema:
    """List the columns of the table, with units and formulas; no file metadata."""
    return described(_COLUMNS)


def measure_coverage_table(
    path: str,
    streams: Sequence[str] = (),
    *,
    by: Grouping = "model",
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Count the coordinates that a run never touched, into a table.

    `by` as in `analyze.groups`; other arguments and errors as `analyze.coverage.measure_coverage`.
    """
    group_tensors(open_run(path).table, by)  # before the long work
    counts = measure_coverage(
        path, streams, scheduler=scheduler, workers=workers, progress=progress
    )
    return build_coverage(open_run(path), counts, by, name=path)


def build_coverage(run: Run, counts: Sequence[Coverage], by: Grouping, *, name: str) -> pa.Table:
    """Make the table of one run from the counts of each stream."""
    name = printable(name)
    labels, groups = group_tensors(run.table, by)

    def add(values: Integers) -> Integers:
        return np.bincount(groups, values, len(labels)).astype(np.int64)

    tables = [coverage_schema().empty_table()]
    for one in counts:
        sizes, never, zeros = add(one.sizes), add(one.never), add(one.zeros)
        columns = {
            "run": [name] * len(labels),
            "stream": [one.stream] * len(labels),
            "group": labels,
            "num_parameters": sizes,
            "vectors": np.full(len(labels), one.vectors),
            "never": never,
            "never_share": ratio(never.astype(float), sizes.astype(float)),
            "zero_share": ratio(zeros.astype(float), one.vectors * sizes.astype(float)),
        }
        tables.append(pa.table(columns, schema=coverage_schema()))
    return with_facts(
        tables, run, name, {"table": COVERAGE_TABLE_VERSION, "kind": COVERAGE, "by": name_of(by)}
    )


def coverage_summary(table: pa.Table) -> str:
    """Summarise a table of `build_coverage`; several lines of plain text."""
    (entry,) = read_metadata(table)["runs"]
    cells = coverage_cells(table)
    lines = [
        f"{entry['run']}   D = {entry['num_parameters']:,}",
        *aligned([COVERAGE_HEAD, *cells[:_MOST_ROWS]]),
    ]
    if len(cells) > _MOST_ROWS:
        lines.append(f"and {len(cells) - _MOST_ROWS} rows more, in the table")
    return "\n".join([*lines, *wrapped(COVERAGE_MEANING)])


def coverage_cells(table: pa.Table) -> list[tuple[str, ...]]:
    """Write the rows of one run under `COVERAGE_HEAD`; a stream is named in its first row."""
    cells, before = [], None
    for row in table.to_pylist():
        stream = row["stream"] + (" - first" if row["stream"] in ITERATES else "")
        head = ("", "") if stream == before else (stream, f"{row['vectors']:,}")
        counts = (f"{row['never']:,}", f"{row['num_parameters']:,}")
        shares = (_percent(row["never_share"]), _percent(row["zero_share"]))
        cells.append((*head, row["group"], *counts, *shares))
        before = stream
    return cells


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if np.isfinite(share) else NONE
