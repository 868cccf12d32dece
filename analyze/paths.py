"""The rows of a table cut into paths: one stream of one run against one reference.

Axes: N rows, T saved steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analyze.alignment import Clock
from analyze.derived import SOURCES
from analyze.rows import sizes_of, whole_model
from analyze.run_groups import Entry, Group, same_settings
from analyze.tables import read_metadata
from capture.store.errors import InputError
from capture.store.layout import ITERATES

_COLUMNS = (*SOURCES, "rsi", "eb", "z")
_TEXTS = ("reference", "stream", "run")
# Facts that one run cannot have twice.
_IDENTITY = ("config", "seeds", "final_step", "num_parameters", "optimizer")


@dataclass(frozen=True)
class Path:
    """The rows of one stream of a run against one reference; arrays ``[N]``, batch -1 for none."""

    steps: NDArray[np.int64]
    epochs: NDArray[np.float64]
    batches: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.float64]]

    def any_finite(self) -> bool:
        """Whether any number is finite."""
        return any(bool(np.isfinite(values).any()) for values in self.columns.values())


# By (reference, stream), by run.
Paths = dict[tuple[str, str], dict[str, Path]]


def check_names(table: pa.Table) -> None:
    """Refuse two runs of one name, whose rows would be taken for one run's: `InputError`."""
    facts: dict[str, Any] = {}
    for entry in read_metadata(table)["runs"]:
        own = {name: entry.get(name) for name in _IDENTITY}
        if facts.setdefault(entry["run"], own) != own:
            raise InputError(
                "two different runs have this name in the tables",
                where=entry["run"],
                fix="measure one of them again from another path",
            )


def whole_models(table: pa.Table, entries: Mapping[str, Entry]) -> pa.Table:
    """The rows of whole models; a layer may be called `model` too."""
    table = whole_model(table, sizes_of(entries.values()))
    if not table.num_rows:
        raise InputError(
            "the inputs hold no rows of a whole model",
            fix="make the tables with `analyze compute --by model`",
        )
    return table


def read_paths(table: pa.Table) -> Paths:
    """Cut the table by reference, stream and run; iterates have nothing to compare."""
    texts = [table[name].combine_chunks().dictionary_encode() for name in _TEXTS]
    names = [text.dictionary.to_pylist() for text in texts]
    codes = np.stack([text.indices.to_numpy() for text in texts])
    columns = {name: table[name].to_numpy() for name in (*_COLUMNS, "step")}
    epochs = pc.fill_null(table["epoch"], math.nan).to_numpy()
    batches = pc.fill_null(table["batch"], -1).to_numpy()
    paths: Paths = {}
    for code in dict.fromkeys(map(tuple, codes.T.tolist())):
        reference, stream, run = (known[at] for known, at in zip(names, code, strict=True))
        if stream in ITERATES:
            continue
        rows = np.flatnonzero(np.equal(codes.T, code).all(axis=1))
        rows = rows[np.lexsort((batches[rows], columns["step"][rows]))]
        paths.setdefault((reference, stream), {})[run] = Path(
            columns["step"][rows],
            epochs[rows],
            batches[rows],
            {name: columns[name][rows] for name in _COLUMNS},
        )
    if not paths:
        raise InputError(
            "the inputs hold no gradients or updates",
            fix="record some, or measure them with `capture probe`",
        )
    return paths


def read_clocks(paths: Paths, entries: Mapping[str, Entry]) -> dict[str, Clock]:
    """Steps and epochs of each run, of all its streams."""
    clocks = {}
    for run, entry in entries.items():
        own = [found[run] for found in paths.values() if run in found]
        steps, first = np.unique(np.concatenate([path.steps for path in own]), return_index=True)
        epochs = np.concatenate([path.epochs for path in own])[first]
        final = entry.get("final_step")
        clocks[run] = Clock(
            steps.astype(np.float64), epochs, int(steps[-1]) if final is None else final
        )
    return clocks


def find_repeats(
    entries: Mapping[str, Entry], groups: Sequence[Group], paths: Paths
) -> tuple[dict[str, str], list[str]]:
    """Runs of a group that are another one of it once more, and warnings of all such doubts.

    Runs of equal numbers are one run, under two names or trained twice with equal seeds.
    """
    repeats: dict[str, str] = {}
    warnings = []
    group_of = {run: group for group in groups for run in group.runs}
    for first, second in combinations(entries, 2):
        if {first, second} & repeats.keys():
            continue
        if _equal(first, second, paths):
            if group_of[first] == group_of[second]:
                repeats[second] = first
                warnings.append(f"{second} has the numbers of {first}: it is counted once")
            else:
                warnings.append(f"{first} and {second} have the same numbers")
        elif same_settings(entries[first], entries[second]):
            warnings.append(
                f"{first} and {second} have one configuration, seeds included: they are not "
                "independent"
            )
    return repeats, warnings


def _equal(first: str, second: str, paths: Paths) -> bool:
    """Whether two runs have the same finite numbers wherever both have any."""
    both = [
        (found[first], found[second])
        for found in paths.values()
        if first in found and second in found and found[first].any_finite()
    ]
    return bool(both) and all(
        np.array_equal(one.steps, two.steps)
        and all(
            np.array_equal(one.columns[name], two.columns[name], equal_nan=True)
            for name in _COLUMNS
        )
        for one, two in both
    )
