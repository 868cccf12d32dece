"""The rows of a table as curves over steps, ready to be drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from analyze.axes import Values
from analyze.derived import DERIVED, value_of

KEYS = ("run", "stream", "step", "epoch", "batch", "group", "reference", "num_parameters")
MEASURED = (
    "norm_dist",
    "norm_grad",
    "rsi",
    "eb",
    "cosine",
    "lolr",
    "cosine_null",
    "lolr_null",
    "cosine_update",
    "cosine_update_null",
    "lolr_update",
    "lolr_update_null",
    "loss",
    "lr",
    "nonfinite",
)
MAX_POINTS = 1500

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Curve:
    """One stream of one run: `steps`, `epochs` and each of `values`, float64 [T].

    With several batches a step, `values` are their medians and `low`, `high` their 10 % and 90 %
    quantiles; `batches` is their number. `kept` says that one row in so many is here.
    """

    run: str
    label: str
    stream: str
    batches: int
    steps: Values
    epochs: Values
    values: Mapping[str, Values]
    low: Mapping[str, Values]
    high: Mapping[str, Values]
    kept: int = 1


def read_columns(table: Any, sizes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """Copy what figures need out of a pyarrow table; a missing epoch or batch becomes NaN.

    `sizes` is D by run. The column `whole`, bool, marks rows of the whole model: a layer may be
    called `model` too.
    """
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in (*KEYS, *MEASURED):
        values = table.column(name).to_numpy(zero_copy_only=False)
        columns[name] = values if values.dtype == object else values.astype(np.float64)
    columns |= {name: value_of(name, columns) for name in DERIVED}
    known = np.array([sizes.get(run, np.nan) for run in columns["run"]])
    columns["whole"] = (columns["group"] == "model") & ~(columns["num_parameters"] < known)
    return columns


def select(columns: Columns, **wanted: str | bool) -> Columns:
    """The rows in which every named column has the wanted value."""
    good = np.ones(columns["step"].size, bool)
    for name, value in wanted.items():
        good &= columns[name] == value
    return {name: values[good] for name, values in columns.items()}


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order of appearance."""
    return list(dict.fromkeys(values))


def run_labels(runs: Iterable[str]) -> dict[str, str]:
    """Short names for runs: `runs/demo.zarr` is `demo`, unless two runs would share a name."""
    names = list(runs)
    short = {run: PurePath(run).stem or run for run in names}
    clash = {name for name in short.values() if list(short.values()).count(name) > 1}
    return {run: shorten(run if name in clash else name) for run, name in short.items()}


def shorten(name: str, limit: int = 28) -> str:
    """Cut out the middle of a name that is longer than `limit`."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-(limit // 2 - 1) :]}"


def read_curves(columns: Columns, run: str, reference: str, label: str) -> list[Curve]:
    """One curve of the whole model for each stream of a run, against one reference."""
    rows = select(columns, run=run, reference=reference, whole=True)
    return [
        _curve(select(rows, stream=stream), run, label, stream)
        for stream in distinct(rows["stream"])
    ]


def _curve(rows: Columns, run: str, label: str, stream: str) -> Curve:
    order = np.argsort(rows["step"], kind="stable")
    steps, first, counts = np.unique(rows["step"][order], return_index=True, return_counts=True)
    bounds = np.append(first, order.size)
    kept = -(-steps.size // MAX_POINTS)
    numbers = {name: v[order] for name, v in rows.items() if v.dtype == np.float64}

    def quantile(q: float) -> dict[str, Values]:
        return {name: _quantile(v, bounds, q)[::kept] for name, v in numbers.items()}

    batches = int(counts.max())
    return Curve(
        run=run,
        label=label,
        stream=stream,
        batches=batches,
        steps=steps[::kept],
        epochs=numbers["epoch"][first][::kept],
        values=quantile(0.5),
        low={} if batches == 1 else quantile(0.1),
        high={} if batches == 1 else quantile(0.9),
        kept=kept,
    )


def _quantile(values: Values, bounds: npt.NDArray[np.intp], q: float) -> Values:
    """A quantile over the batches of each step; undefined batches do not count."""
    if values.size == bounds.size - 1:
        return values
    result = np.full(bounds.size - 1, np.nan)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        good = values[start:stop][np.isfinite(values[start:stop])]
        if good.size:
            result[i] = np.quantile(good, q)
    return result
