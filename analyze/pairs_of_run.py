"""From a run to its tables of pairs: which streams, which lags, and whether that is too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analyze.cache import Where
from analyze.gram import compute_gram, regroup
from analyze.groups import Grouping, group_tensors, name_of
from analyze.pair_blocks import choose_pairs
from analyze.pair_table import PairTables, build_pairs
from analyze.references import Reference, parse_reference
from analyze.schedulers import Cluster
from analyze.summing import measured_moments
from analyze.work import Work
from capture.store.errors import InputError, UsageError
from capture.store.layout import WEIGHTS
from capture.store.reader import Run, Stream, open_run

Integers = NDArray[np.int64]

# Rows of a stream of which all pairs are measured without being asked to; rows of the table that
# still fit into the memory of a laptop, with all their columns.
MOST_ROWS_BY_DEFAULT = 200
_MOST_TABLE_ROWS = 20_000_000
_SUGGESTED = 6


def measure_pairs(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    lags: Sequence[int] | str | None = None,
    by: Sequence[Grouping] = ("model",),
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Where = True,
) -> dict[str, PairTables]:
    """Measure pairs of saved steps of a run, and the noise of batches: by name of each grouping.

    `lags` are updates between the two steps of a pair, or ``"all"``; `None` means all where no
    stream has more than `MOST_ROWS_BY_DEFAULT` rows. Without `streams`, all of the run that have
    rows but the weights, and the weights where there are no others; `references` as typed.
    `UsageError` where the table would become too large or has to be asked for; `InputError` where
    no two steps are a lag apart; others, and scheduler, workers and progress, are those of
    `analyze.gram.compute_gram`, and `cache`, for the moments of the rows, that of
    `analyze.tables.measure_run`.
    """
    parsed = [parse_reference(text) for text in dict.fromkeys(references)]
    run = open_run(path)
    asked = ask_pairs(run, parsed, streams, lags, by)
    # References that cannot be had are told before the long work: they are bound, and closed again.
    for reference in parsed:
        reference.bind(run).close()
    grams = {
        name: compute_gram(
            path,
            name,
            asked.finest,
            lags=asked.lags,
            scheduler=scheduler,
            workers=workers,
            progress=progress,
        )
        for name in asked.streams
    }
    work = Work(cache, scheduler, workers, progress)
    moments = measured_moments(open_run(path), list(grams), parsed, work)
    run, tables = open_run(path), {}
    for one in by:
        coarser = _coarser(asked.finest, asked.groupings[name_of(one)])
        regrouped = {name: regroup(gram, coarser) for name, gram in grams.items()}
        tables[name_of(one)] = build_pairs(run, regrouped, moments, one, name=path)
    return tables


@dataclass(frozen=True)
class Asked:
    """What pairs of a run are measured.

    `groupings` maps the name of each to the group of each tensor, int64 ``[P]``, and `finest` has
    those that are together in all of them: what these have is added up to each. `lags` is `None`
    for all pairs.
    """

    streams: tuple[str, ...]
    lags: list[int] | None
    groupings: dict[str, Integers]
    finest: Integers

    @property
    def largest(self) -> int:
        """Groups of the grouping that has most."""
        return 1 + max(int(groups.max()) for groups in self.groupings.values())


def ask_pairs(
    run: Run,
    references: Sequence[Reference],
    streams: Sequence[str],
    lags: Sequence[int] | str | None,
    by: Sequence[Grouping],
) -> Asked:
    """Choose streams, lags and groups as `measure_pairs` does, and refuse what it refuses."""
    groupings = {name_of(one): group_tensors(run.table, one)[1] for one in by}
    finest = np.unique(np.stack(list(groupings.values())), axis=1, return_inverse=True)[1]
    chosen = _choose_streams(run, streams)
    asked = Asked(tuple(stream.name for stream in chosen), None, groupings, finest)
    return replace(asked, lags=_check_size(chosen, lags, asked.largest * len(references)))


def _coarser(finest: Integers, groups: Integers) -> Integers:
    """The group in which each of the finest groups lies; both are given by tensor ``[P]``."""
    found = np.zeros(int(finest.max()) + 1, np.int64)
    found[finest] = groups
    return found


def _choose_streams(run: Run, names: Sequence[str]) -> list[Stream]:
    others = [name for name in run.stream_names if name != WEIGHTS and len(run.stream(name))]
    chosen = [run.stream(name) for name in dict.fromkeys(names or others or [WEIGHTS])]
    if not any(len(stream) > 1 for stream in chosen):
        listed = ", ".join(repr(stream.name) for stream in chosen)
        raise InputError(
            f"there are no two rows to compare in {listed}",
            where=run.path,
            fix="choose another --stream, or wait until more is recorded",
        )
    return chosen


def _check_size(
    streams: Sequence[Stream], lags: Sequence[int] | str | None, columns: int
) -> list[int] | None:
    """Return the lags to measure, `None` for all pairs; `columns` are groups times references."""
    largest = max(streams, key=len)
    rows, path = len(largest), largest.run.path
    suggestion = ",".join(map(str, _common_lags(largest.steps)))
    if lags is None and rows > MOST_ROWS_BY_DEFAULT:
        raise UsageError(
            f"{rows:,} rows of {largest.name!r} make {rows * (rows - 1) // 2:,} pairs",
            where=path,
            fix=f"choose some with --lags {suggestion} (updates apart), or take --lags all",
        )
    wanted = None if lags is None or isinstance(lags, str) else sorted(set(lags))
    counts = {stream.name: len(choose_pairs(stream.steps, wanted)) for stream in streams}
    if not any(counts.values()):
        raise InputError(
            f"no two rows of {', '.join(map(repr, counts))} are {_listed(wanted)} updates apart",
            where=path,
            fix=f"{suggestion} updates apart are some",
        )
    total = sum(counts[s.name] * (s.batches or 1) for s in streams) * columns
    if total > _MOST_TABLE_ROWS:
        raise UsageError(
            f"the table would have {total:,} rows, more than {_MOST_TABLE_ROWS:,}",
            where=path,
            fix=f"choose fewer with --lags {suggestion}, --stream, or --by model",
        )
    return wanted


def _listed(lags: Sequence[int] | None) -> str:
    return " or ".join(map(str, lags or []))


def _common_lags(steps: Integers) -> list[int]:
    """Lags in doubling distance that many pairs of rows have; at most `_SUGGESTED`."""
    lags = np.concatenate([steps[k:] - steps[:-k] for k in (1, 2, 4, 8, 16, 32)])
    values, counts = np.unique(lags, return_counts=True)
    often = np.sort(values[np.argsort(-counts, kind="stable")[:_SUGGESTED]])
    return [int(lag) for lag in often]
