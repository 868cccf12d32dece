"""Measure a run in one call: as a table, as a Dataset of one stream, as a tree of all streams."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa
import xarray as xr

from analyze.cache import Where
from analyze.dataset import to_dataset, to_tree
from analyze.groups import Grouping
from analyze.schedulers import Cluster
from analyze.tables import measure_run
from capture.store.reader import Run
from capture.streams import MINIBATCH

RunLike = str | os.PathLike[str] | Run


def measure_table(
    run: RunLike,
    reference: str | Sequence[str] = "final",
    *,
    stream: str | Sequence[str] | None = None,
    by: Grouping = "model",
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> pa.Table:
    """Measure a run into a table, one row per stream, step, batch, group and reference.

    `run` is a path, an address, or what `open_run` gave. `reference` and `stream` are one or
    several; without `stream`, all that have rows. `by` is one grouping: a name, or regular
    expressions by label. Columns, errors, scheduler, workers and cache are those of `measure_run`;
    ``.to_pandas()`` makes it a DataFrame.
    """
    path = str(run.path) if isinstance(run, Run) else os.fspath(run)
    measured = measure_run(
        path,
        _listed(reference),
        streams=_listed(stream),
        by=[by],
        scheduler=scheduler,
        workers=workers,
        cache=cache,
    )
    (table,) = measured.values()
    return table


def measure_dataset(
    run: RunLike,
    reference: str | Sequence[str] = "final",
    *,
    stream: str = MINIBATCH,
    by: Grouping = "model",
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> xr.Dataset:
    """Measure one stream of a run into a Dataset ``(step[, batch], group, reference)``.

    As `to_dataset` of `measure_table`; `run` is a coordinate without an axis.
    """
    table = measure_table(
        run, reference, stream=stream, by=by, scheduler=scheduler, workers=workers, cache=cache
    )
    return to_dataset(table).squeeze("run")


def measure_tree(
    run: RunLike,
    reference: str | Sequence[str] = "final",
    *,
    stream: str | Sequence[str] | None = None,
    by: Grouping = "model",
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> xr.DataTree:
    """Measure streams of a run into a tree with a Dataset for each, as `measure_dataset` makes it.

    Without `stream`, all that have rows.
    """
    table = measure_table(
        run, reference, stream=stream, by=by, scheduler=scheduler, workers=workers, cache=cache
    )
    tree = to_tree(table)
    for child in tree.children.values():
        child.dataset = child.to_dataset().squeeze("run")
    return tree


def _listed(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or ()
