"""Groups of runs beside each other: their cosines with nulls, their differences, with intervals.

For every reference, stream and part of the way to w*, at equal steps and at equal epochs; the end
effect is left out. Nothing is compared without γ/γ⁰ and η*/a_t, or the words that there is no null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analyze.alignment import AFTER, ALL, EPOCHS, STEPS, Clock, Range, common_range, parts_in
from analyze.cache import Where
from analyze.cells import (
    Cell,
    Compared,
    Rows,
    compared_in,
    difference,
    measure,
)
from analyze.comparison import Block, Comparison
from analyze.inputs import read_inputs
from analyze.interpolation import THRESHOLD, call_interpolation
from analyze.paths import (
    Path,
    check_names,
    find_repeats,
    read_clocks,
    read_paths,
    whole_models,
)
from analyze.run_groups import Entry, Group, differences, group_runs, seeds
from analyze.uncertainty import Interval, check_level, check_seed
from analyze.verdict import PARTS
from capture.store.errors import InputError, UsageError

if TYPE_CHECKING:
    from analyze.schedulers import Cluster

ALIGNMENTS: Mapping[str, tuple[str, ...]] = {
    "steps": (STEPS,),
    "epochs": (EPOCHS,),
    "both": (STEPS, EPOCHS),
}
CHOICES = (*PARTS, ALL, AFTER)


def compare_runs(
    inputs: Sequence[str],
    group_by: Sequence[str],
    *,
    align: str = "both",
    parts: Sequence[str] = PARTS,
    level: float = 0.95,
    seed: int = 0,
    threshold: float = THRESHOLD,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> Comparison:
    """Compare runs, or tables of `analyze compute`, in groups of equal settings.

    `group_by` names keys of the configuration (`optimizer`, `lr`, `task_args.depth`, …); `align`
    is `steps`, `epochs` or `both`; `parts` some of early, middle, late, `after` (what follows w_N
    for a reference step:N) and `all` (the three as one). Intervals have this `level`; `seed` is
    that of the bootstrap, `threshold` that of `analyze.interpolation`; scheduler, workers and cache
    are those of `analyze.measure_run`. `UsageError` for an unknown
    key or option, `InputError` where an input is unfit or nothing can be compared.
    """
    check_level(level)
    check_seed(seed)
    units = _units(align)
    chosen = _parts(parts)
    measured = read_inputs(inputs, scheduler=scheduler, workers=workers, cache=cache)
    check_names(measured.table)
    table = whole_models(measured.table, measured.runs)
    paths = read_paths(table)
    there = {run for found in paths.values() for run in found}
    entries = {run: entry for run, entry in measured.runs.items() if run in there}
    keys = list(dict.fromkeys(key.strip() for key in group_by))
    groups = group_runs(entries, keys)
    repeats, warnings = find_repeats(entries, groups, paths)
    clocks = read_clocks(paths, entries)
    blocks = []
    for (reference, stream), found in paths.items():
        own = {run: path for run, path in found.items() if repeats.get(run) not in found}
        study = _Study(reference, stream, own, clocks, groups, entries, level, seed)
        notes = tuple(_notes(reference, stream, found, clocks, entries, groups, measured.nulls))
        blocks += [replace(block, notes=notes) for block in study.blocks(units, chosen)]
    if not any(block.rows for block in blocks):
        raise InputError(
            "the runs have no rows in common",
            where=", ".join(inputs),
            fix="compare runs of closer lengths, or --align steps where epochs are not known",
        )
    calls = call_interpolation(table, threshold)
    return Comparison(
        keys=tuple(keys),
        groups=tuple(groups),
        level=level,
        seed=seed,
        warnings=(
            *warnings,
            *_unfinished(entries),
            *_branches(entries),
            *differences(entries, groups, keys),
        ),
        blocks=tuple(blocks),
        interpolation=tuple(
            call for call in calls if call.run in entries and call.run not in repeats
        ),
    )


@dataclass(frozen=True)
class _Study:
    """One stream of all runs against one reference."""

    reference: str
    stream: str
    paths: Mapping[str, Path]
    clocks: Mapping[str, Clock]
    groups: Sequence[Group]
    entries: Mapping[str, Entry]
    level: float
    seed: int

    def blocks(self, units: Sequence[str], parts: Sequence[str]) -> Iterator[Block]:
        """One block for each axis."""
        clocks = {run: self.clocks[run] for run in self.paths}
        first: Mapping[str, NDArray[np.object_]] | None = None
        for unit in units:
            common = common_range(clocks, self.reference, unit)
            names = {
                run: parts_in(path.steps, path.epochs, self.reference, clocks[run], common)
                for run, path in self.paths.items()
            }
            rows = tuple(self._rows(names, common, parts)) if common.known else ()
            same = (
                bool(rows)
                and first is not None
                and all((names[run] == first[run]).all() for run in names)
            )
            first = names if first is None else first
            yield Block(self.reference, self.stream, common, len(self.paths), rows, same, ())

    def _rows(
        self,
        names: Mapping[str, NDArray[np.object_]],
        common: Range,
        parts: Sequence[str],
    ) -> Iterator[dict[str, Any]]:
        for part in parts:
            here = {
                run: np.isin(own, PARTS) if part == ALL else own == part
                for run, own in names.items()
            }
            if not any(rows.any() for rows in here.values()):
                continue
            start, stop = common.bounds(part)
            for quantity in compared_in(self.stream):
                row = {
                    "align": common.unit,
                    "reference": self.reference,
                    "stream": self.stream,
                    "part": part,
                    "start": start,
                    "stop": stop,
                    "quantity": quantity.name,
                    "level": self.level,
                }
                yield from (row | numbers for numbers in self._numbers(quantity, here))

    def _numbers(
        self, quantity: Compared, here: Mapping[str, NDArray[np.bool_]]
    ) -> Iterator[dict[str, Any]]:
        """Groups, then differences: each group less each of those before it."""
        values = {run: quantity.function(path.columns) for run, path in self.paths.items()}
        found: list[tuple[Group, Cell]] = []
        for group in self.groups:
            rows = {
                run: Rows(path.steps[here[run]], path.batches[here[run]], values[run][here[run]])
                for run, path in self.paths.items()
                if run in group.runs and here[run].any()
            }
            if rows:
                cell = measure(rows, quantity.name, level=self.level, seed=self.seed)
                found.append((group, cell))
                yield _of_group(group, cell)
        for (earlier, two), (later, one) in combinations(found, 2):
            pairs = self._pairs(later, earlier)
            interval = difference(one, two, pairs, self.level)
            yield {"group": later.label, "against": earlier.label, **_of_interval(interval)}

    def _pairs(self, first: Group, second: Group) -> list[tuple[str, str]] | None:
        """Pairs of runs of equal seeds; `None` unless the groups have the same, each once."""
        by_seed = [
            {seeds(self.entries[run]): run for run in group.runs if run in self.paths}
            for group in (first, second)
        ]
        counts = [sum(run in self.paths for run in group.runs) for group in (first, second)]
        one, two = by_seed
        if None in one or one.keys() != two.keys() or counts != [len(one), len(two)]:
            return None
        return [(one[key], two[key]) for key in one] if len(one) > 1 else None


def _of_group(group: Group, cell: Cell) -> dict[str, Any]:
    known = sum(math.isfinite(value) for value in cell.by_run.values())
    return {
        "group": group.label,
        "against": None,
        **_of_interval(cell.interval),
        "runs": known,
        "q10": cell.low_band,
        "q90": cell.high_band,
        "rows": cell.rows,
        "left_out": cell.left_out,
        "steps": cell.steps,
        "effective_steps": cell.effective,
        "batches": cell.batches,
        "block": cell.block,
    }


def _of_interval(interval: Interval) -> dict[str, Any]:
    return {
        "runs": interval.count,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "method": interval.method,
    }


def _unfinished(entries: Mapping[str, Entry]) -> Iterator[str]:
    runs = [run for run, entry in entries.items() if entry.get("final_step") is None]
    if runs:
        yield f"not finished, their last rows are not their ends: {', '.join(runs)}"


def _branches(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Say which runs count their updates from where they left another run."""
    for run, entry in entries.items():
        parent = entry.get("parent")
        if isinstance(parent, dict) and parent.get("position"):
            yield (
                f"{run} is a branch: its step 0 is update {parent['position']} of the training, "
                "and its steps are laid beside the first ones of other runs"
            )


def _units(align: str) -> tuple[str, ...]:
    if align not in ALIGNMENTS:
        raise UsageError(f"unknown alignment {align!r}", fix=f"choose from {', '.join(ALIGNMENTS)}")
    return ALIGNMENTS[align]


def _parts(parts: Sequence[str]) -> tuple[str, ...]:
    unknown = [part for part in parts if part not in CHOICES]
    if unknown or not parts:
        what = f"unknown part {unknown[0]!r}" if unknown else "no part of the way is chosen"
        raise UsageError(what, fix=f"choose from {', '.join(CHOICES)}")
    return tuple(part for part in CHOICES if part in parts)


def _notes(
    reference: str,
    stream: str,
    paths: Mapping[str, Path],
    clocks: Mapping[str, Clock],
    entries: Mapping[str, Entry],
    groups: Sequence[Group],
    nulls: Mapping[str, str],
) -> Iterator[str]:
    """What stands beside the numbers of a stream: nulls and why there are none, missing runs."""
    ends = sorted({clocks[run].end for run in paths})
    if len(ends) > 1:
        yield f"T = {ends[0]:,} to {ends[-1]:,} updates: compared is what all of the runs have"
    missing = [run for run in entries if run not in paths]
    if missing:
        yield f"without rows of {stream} against {reference}: {', '.join(missing)}"
    if stream == "updates":
        yield (
            "updates: -cos(u, e) in the place of γ, and η* of the step really taken: η*/η is the "
            "factor by which it should have been longer"
        )
    if stream not in ("minibatch", "updates"):
        yield f"{stream}: no null, only the minibatch gradients made the path"
    else:
        said: dict[str, list[str]] = {}
        for group in groups:
            for run in group.runs:
                if run in paths:
                    text = nulls.get(f"{run}|{reference}", "no null: the table gives no reason")
                    said.setdefault(text, []).append(group.label)
        for text, labels in said.items():
            yield f"γ⁰ of {'; '.join(dict.fromkeys(labels))}: {text}"
