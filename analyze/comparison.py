"""The result of a comparison, and its table: one row per number, as Parquet or CSV.

A row is of a group, or, where `against` is filled, of the difference group - against.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

import capture
from analyze.alignment import Range
from analyze.interpolation import Interpolation
from analyze.kinds import METADATA_KEY, facts_in
from analyze.run_groups import Group
from capture.store.errors import InputError, UsageError
from capture.store.files import write_durably

VERSION = 2
FORMATS = (".parquet", ".csv")

# Name, type and meaning; the keys of the groups follow `against`, each as `by_KEY`.
_BEFORE = (
    ("align", pa.string(), "rows stand beside each other at equal steps, or at equal epochs"),
    ("reference", pa.string(), "w*, as typed"),
    ("stream", pa.string(), "where the gradients or updates come from"),
    ("part", pa.string(), "part of the way to w*"),
    ("start", pa.float64(), "where the part begins, in updates or epochs"),
    ("stop", pa.float64(), "where the part ends"),
    ("quantity", pa.string(), "a column of the tables, a ratio to its null, or a share"),
    ("group", pa.string(), "settings of the group's runs"),
    ("against", pa.string(), "settings of the group that is subtracted; null for a group itself"),
)
_AFTER = (
    ("runs", pa.int64(), "runs, or pairs of runs, with a finite number"),
    ("value", pa.float64(), "mean over runs of each run's mean over rows; or the difference"),
    ("low", pa.float64(), "lower end of the interval; null where there is none"),
    ("high", pa.float64(), "upper end of the interval"),
    ("level", pa.float64(), "of the interval"),
    ("method", pa.string(), "how the interval was found, or why there is none"),
    ("q10", pa.float64(), "10 % quantile of the rows of all runs of the group"),
    ("q90", pa.float64(), "90 % quantile"),
    ("rows", pa.int64(), "finite rows"),
    ("left_out", pa.int64(), "rows that are not finite"),
    ("steps", pa.int64(), "steps with a finite row, added over runs"),
    ("effective_steps", pa.float64(), "effective number of steps, added over runs"),
    ("batches", pa.int64(), "batches of a step"),
    ("block", pa.int64(), "length in steps of the drawn blocks, for an interval within a run"),
)


@dataclass(frozen=True)
class Block:
    """What was found for one reference and stream on one axis: `rows` as in the table.

    `runs` is the number of runs that have rows here. `same` says that equal epochs pick the rows
    that equal steps do; `notes` are sentences beside the numbers.
    """

    reference: str
    stream: str
    range: Range
    runs: int
    rows: tuple[Mapping[str, Any], ...]
    same: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All of a comparison; `warnings` say what stands against reading it as one of the keys."""

    keys: tuple[str, ...]
    groups: tuple[Group, ...]
    level: float
    seed: int
    warnings: tuple[str, ...]
    blocks: tuple[Block, ...]
    interpolation: tuple[Interpolation, ...]

    def table(self) -> pa.Table:
        """All rows as a table; what the columns mean, warnings, calls and settings in metadata."""
        fields = [
            *_BEFORE,
            *((f"by_{key}", pa.string(), f"{key} of the group") for key in self.keys),
            *_AFTER,
        ]
        schema = pa.schema(
            pa.field(name, kind, metadata={"meaning": text}) for name, kind, text in fields
        )
        values = {group.label: group.values for group in self.groups}
        rows = [
            {name: _known(value) for name, value in row.items()}
            | dict(zip((f"by_{key}" for key in self.keys), values[row["group"]], strict=True))
            for block in self.blocks
            for row in block.rows
        ]
        document = json.dumps(self._facts(), ensure_ascii=False, sort_keys=True)
        # A lone surrogate, which a run may hold, becomes its escape again, as JSON has it.
        metadata = {METADATA_KEY: document.encode("utf-8", "backslashreplace")}
        return pa.Table.from_pylist(rows, schema).replace_schema_metadata(metadata)

    def _facts(self) -> dict[str, Any]:
        return {
            "comparison": VERSION,
            "version": capture.__version__,
            "group_by": list(self.keys),
            "groups": {group.label: list(group.runs) for group in self.groups},
            "level": self.level,
            "seed": self.seed,
            "warnings": list(self.warnings),
            "notes": list(dict.fromkeys(note for block in self.blocks for note in block.notes)),
            "blocks": [_facts_of(block) for block in self.blocks],
            "interpolation": [_all_known(call) for call in self.interpolation],
        }


def read_comparison(table: pa.Table) -> Comparison:
    """Make the comparison of its table again; `InputError` where it is of another version."""
    facts = facts_in(table.schema) or {}
    if facts.get("comparison") != VERSION:
        raise InputError(
            "not a table of this version of `analyze compare`", fix="make it again from the runs"
        )
    try:
        return _read(table, facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "the facts in the table of a comparison are damaged", fix="make it again from the runs"
        ) from error


def _read(table: pa.Table, facts: Mapping[str, Any]) -> Comparison:
    keys = tuple(facts["group_by"])
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    rows = [
        row | {name: math.nan if row[name] is None else row[name] for name in floats}
        for row in table.to_pylist()
    ]
    values = {row["group"]: tuple(row[f"by_{key}"] for key in keys) for row in rows}
    return Comparison(
        keys=keys,
        groups=tuple(
            Group(label, values.get(label, (label,) * len(keys)), tuple(runs))
            # In the order of the rows: that of the metadata is the alphabet's.
            for label in dict.fromkeys([*values, *facts["groups"]])
            for runs in (facts["groups"][label],)
        ),
        level=float(facts["level"]),
        seed=int(facts["seed"]),
        warnings=tuple(facts["warnings"]),
        blocks=tuple(_block(own, rows) for own in facts["blocks"]),
        interpolation=tuple(Interpolation(**_floats(call)) for call in facts["interpolation"]),
    )


def _block(facts: Mapping[str, Any], rows: list[dict[str, Any]]) -> Block:
    reach = Range(**_floats(facts["range"]))
    key = (reach.unit, facts["reference"], facts["stream"])
    own = (row for row in rows if (row["align"], row["reference"], row["stream"]) == key)
    others = {name: facts[name] for name in ("reference", "stream", "runs", "same")}
    return Block(range=reach, rows=tuple(own), notes=tuple(facts["notes"]), **others)


def _facts_of(block: Block) -> dict[str, Any]:
    own = {name: getattr(block, name) for name in ("reference", "stream", "runs", "same")}
    return own | {"range": _all_known(block.range), "notes": list(block.notes)}


def _all_known(value: Range | Interpolation) -> dict[str, Any]:
    return {name: _known(each) for name, each in vars(value).items()}


def _floats(facts: Mapping[str, Any]) -> dict[str, Any]:
    """NaN again where a number was not known."""
    return {name: math.nan if value is None else value for name, value in facts.items()}


def check_format(path: str | os.PathLike[str]) -> None:
    """Refuse a name that ends in neither .parquet nor .csv with a `UsageError`."""
    if Path(path).suffix not in FORMATS:
        raise UsageError(
            "the name does not say which kind of table",
            where=path,
            fix=f"let it end in {' or '.join(FORMATS)}",
        )


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the table as Parquet or, without its metadata, as CSV; in full or not at all.

    Equal comparisons give equal bytes. `UsageError` for another ending, `WriteError` where the disk
    refuses.
    """
    check_format(path)
    buffer = io.BytesIO()
    if Path(path).suffix == ".csv":
        pyarrow.csv.write_csv(comparison.table(), buffer)
    else:
        pq.write_table(comparison.table(), buffer, compression="zstd")
    write_durably(Path(path), buffer.getvalue(), Path(path).parent)


def _known(value: Any) -> Any:
    """A number that is not known is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
