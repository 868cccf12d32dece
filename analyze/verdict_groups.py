"""The verdict by groups of tensors: a row for each, its medians in the three parts of the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analyze.columns import values_of
from analyze.derived import SOURCES
from analyze.groups import GROUPINGS
from analyze.quantities import Values
from analyze.rows import parts_of_models, select_rows, sizes_of
from analyze.spread import band_of
from analyze.tables import read_metadata
from analyze.verdict import PARTS, numbers_of, part_of
from capture.store.layout import ITERATES

# More groups than these are for the table, not for the eye; the largest are shown.
MOST_GROUPS = 24

# What of the rows is read here.
_COLUMNS = ("run", "stream", "step", "group", "reference", "num_parameters", *SOURCES)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class GroupRow:
    """One group of `size` coordinates: medians of γ, γ/γ⁰ and η*/a_t, early, middle and late.

    `negative` is the fraction of γ < 0 over the three parts. NaN where there is no number.
    """

    group: str
    size: int
    cosine: Triple
    ratio: Triple
    rate_ratio: Triple
    negative: float


@dataclass(frozen=True)
class GroupVerdict:
    """One stream of a run against a reference by groups, in the model's order.

    `grouping` is what a group is: a layer, a tensor, a kind. `more` counts groups left out.
    """

    run: str
    reference: str
    stream: str
    grouping: str
    rows: tuple[GroupRow, ...]
    more: int

    @property
    def has_null(self) -> bool:
        """Whether any group has a γ/γ⁰."""
        return any(math.isfinite(value) for row in self.rows for value in row.ratio)


def summarise_groups(table: pa.Table, most: int | None = MOST_GROUPS) -> list[GroupVerdict]:
    """Compute the verdict of the groups of a table; empty where it has whole models alone.

    At most `most` groups of each stream are told, the largest; all for `None`.
    """
    metadata = read_metadata(table)
    entries = {entry["run"]: entry for entry in metadata["runs"]}
    sizes = sizes_of(metadata["runs"])
    rows = parts_of_models(table, sizes)
    grouping = grouping_of(metadata.get("by", ""))
    branched = metadata.get("branched", {})
    found = []
    for run in rows["run"].unique().to_pylist():
        for reference in rows["reference"].unique().to_pylist():
            own = select_rows(rows, run=run, reference=reference)
            start = branched.get(f"{run}|{reference}", 0)
            for stream in own["stream"].unique().to_pylist():
                if stream not in ITERATES:
                    of_stream = select_rows(own, stream=stream)
                    shown, more = _rows(of_stream, stream, entries[run], reference, start, most)
                    found.append(GroupVerdict(run, reference, stream, grouping, shown, more))
    return found


def read_groups(path: str | PathLike[str]) -> list[GroupVerdict]:
    """Compute the verdict of the groups in a file of `analyze compute`, run by run.

    Stream by stream and only the columns that it takes: the whole table may be large.
    """
    with pq.ParquetFile(path) as file:
        streams = file.read(columns=["stream"])["stream"].unique().to_pylist()
        found = [group for name in streams for group in summarise_groups(_stream(file, name))]
    order = list(dict.fromkeys((each.run, each.reference) for each in found))
    return sorted(found, key=lambda each: order.index((each.run, each.reference)))


def _stream(file: pq.ParquetFile, name: str) -> pa.Table:
    """The rows of one stream, with the columns that are read here."""
    batches = file.iter_batches(columns=list(_COLUMNS))
    pieces = [select_rows(pa.Table.from_batches([batch]), stream=name) for batch in batches]
    return pa.concat_tables(pieces).replace_schema_metadata(file.schema_arrow.metadata)


def grouping_of(by: str) -> str:
    """What the groups of a table are, from what its metadata say: `layer`, or `group` if mixed."""
    kinds = [kind for kind in dict.fromkeys(by.split("+")) if kind != "model"]
    return kinds[0] if len(kinds) == 1 and kinds[0] in GROUPINGS else "group"


def _rows(
    rows: pa.Table,
    stream: str,
    entry: Mapping[str, Any],
    reference: str,
    start: int,
    most: int | None,
) -> tuple[tuple[GroupRow, ...], int]:
    groups = np.asarray(rows["group"].to_pylist(), object)
    sizes = dict(zip(groups, rows["num_parameters"].to_pylist(), strict=True))
    largest = sorted(sizes, key=lambda name: -sizes[name])[:most]
    numbers = numbers_of(rows, stream)
    steps = values_of(rows["step"])
    final = entry["final_step"]
    parts = part_of(steps, reference, int(steps.max()) if final is None else final, start)
    shown = tuple(
        _row(name, sizes[name], {key: v[groups == name] for key, v in numbers.items()}, here)
        for name in sizes
        if name in largest
        for here in (parts[groups == name],)
    )
    return shown, len(sizes) - len(shown)


def _row(name: str, size: int, numbers: Mapping[str, Values], parts: Any) -> GroupRow:
    def medians(key: str) -> Iterator[float]:
        return (band_of(numbers[key][parts == part]).median for part in PARTS)

    known = numbers["cosine"][np.isin(parts, PARTS)]
    known = known[np.isfinite(known)]
    cosine, ratio, rate = (tuple(medians(key)) for key in ("cosine", "ratio", "rate_ratio"))
    negative = float((known < 0).mean()) if len(known) else math.nan
    return GroupRow(name, size, _triple(cosine), _triple(ratio), _triple(rate), negative)


def _triple(values: tuple[float, ...]) -> Triple:
    early, middle, late = values
    return early, middle, late
