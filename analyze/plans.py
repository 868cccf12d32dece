"""What the whole of a command will cost, pass after pass; nothing is measured.

What brings Dask along is imported where something is left to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from analyze.adam import states_to_read
from analyze.amounts import size
from analyze.cache import Where
from analyze.groups import Grouping, group_tensors
from analyze.references import parse_reference
from analyze.summing import lacking_moments
from analyze.tables import choose_streams
from capture.store import Run, open_run
from capture.store.layout import WEIGHTS

if TYPE_CHECKING:
    from analyze.projection import Projection
    from analyze.schedulers import Cluster

# Of a table of pairs, while it is made and written: its columns, compressed ones, and a part of
# them once more.
_TABLE_COPIES = 3


def project_run(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> list[Projection]:
    """Say what `analyze.measure_run` with the same arguments will cost, one pass after another.

    Empty where all its moments were kept, so that nothing is read; what Adam's metric reads beside
    them says `project_metric`. The file of a reference is read once more, to know it again.
    """
    return _passes(open_run(path), references, streams, scheduler, workers, cache)


def _passes(
    run: Run,
    references: Sequence[str],
    streams: Sequence[str],
    scheduler: str | Cluster,
    workers: int | None,
    cache: Where,
) -> list[Projection]:
    parsed = [parse_reference(text) for text in dict.fromkeys(references)]
    wanted = lacking_moments(run, choose_streams(run, streams), parsed, where=cache)
    if not wanted:
        return []
    from analyze.projection import project

    return [
        project(run, names, lacking, scheduler=scheduler, workers=workers)
        for names, lacking in wanted
    ]


def project_metric(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    cache: Where = True,
) -> list[str]:
    """Say in words what Adam's metric reads beside the passes of `project_run`, if anything."""
    return _metric(open_run(path), references, streams, cache)


def _metric(run: Run, references: Sequence[str], streams: Sequence[str], cache: Where) -> list[str]:
    parsed = [parse_reference(text) for text in dict.fromkeys(references)]
    count, nbytes = states_to_read(run, choose_streams(run, streams), parsed, where=cache)
    if not count:
        return []
    states = "1 kept state" if count == 1 else f"{count} kept states"
    return [f"for Adam's metric reads {states} of {size(nbytes)}, and the rows of their steps"]


def project_pairs(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    lags: Sequence[int] | str | None = None,
    by: Sequence[Grouping] = ("model",),
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> list[Projection]:
    """Say what `analyze.measure_pairs` with the same arguments will cost, one pass after another.

    The products of each stream, then the moments that were not kept. Memory is that of the pass
    and of the tables that are made at the end.
    """
    from analyze.gram_projection import project_gram
    from analyze.pairs_of_run import ask_pairs

    run = open_run(path)
    parsed = [parse_reference(text) for text in dict.fromkeys(references)]
    asked = ask_pairs(run, parsed, streams, lags, by)
    table = _table_bytes(run, asked.streams, asked.lags, asked.largest * len(parsed))
    opened = 0
    for reference in parsed:
        bound = reference.bind(run)
        opened += bound.bytes_to_open
        bound.close()
    passes = [
        project_gram(
            path, name, asked.finest, lags=asked.lags, scheduler=scheduler, workers=workers
        )
        for name in asked.streams
    ]
    passes[0] = replace(passes[0], bytes_to_read=passes[0].bytes_to_read + opened)
    passes = [replace(one, memory=one.memory + table) for one in passes]
    return [
        *passes,
        *_passes(run, references, asked.streams, scheduler, workers, cache),
    ]


def project_path(
    path: str,
    *,
    by: Grouping = "model",
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
) -> Projection:
    """Say what `analyze.path_table.measure_path_table` with the same arguments will cost."""
    from analyze.gram_projection import project_gram

    groups = group_tensors(open_run(path).table, by)[1]
    return project_gram(path, WEIGHTS, groups, scheduler=scheduler, workers=workers)


def plan_run(
    path: str,
    references: Sequence[str] = ("final",),
    *,
    streams: Sequence[str] = (),
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> str:
    """Say in one line what `analyze.measure_run` with the same arguments will take."""
    run = open_run(path)
    passes = _passes(run, references, streams, scheduler, workers, cache)
    return told(path, [*passes, *_metric(run, references, streams, cache)])


def plan_schedule(
    path: str,
    reference: str = "final",
    *,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> str:
    """Say in one line what `analyze.schedule_run` with the same arguments will take."""
    from analyze.directions import rated_streams

    streams = rated_streams(open_run(path))
    return plan_run(
        path, [reference], streams=streams, scheduler=scheduler, workers=workers, cache=cache
    )


def plan_inputs(
    inputs: Sequence[str],
    *,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> str:
    """Say in a line for each run among inputs what measuring it will take; tables are only read."""
    from analyze.inputs import REFERENCE, runs_among

    lines = [
        plan_run(path, [REFERENCE], scheduler=scheduler, workers=workers, cache=cache)
        for path in runs_among(inputs)
    ]
    return "\n".join(lines) or "no run among them: tables are read, and nothing is measured"


def told(path: str, passes: Sequence[Projection | str]) -> str:
    """Write passes in one line."""
    text = "; then ".join(map(str, passes))
    return f"{path}: {text or 'all was summed before, reads nothing'}"


def _table_bytes(run: Run, streams: Sequence[str], lags: Sequence[int] | None, columns: int) -> int:
    """Bytes of the tables of pairs while they are made; `columns` are groups times references."""
    from analyze.pair_blocks import choose_pairs
    from analyze.pair_table import pair_schema

    rows = 0
    for name in streams:
        stream = run.stream(name)
        rows += len(choose_pairs(stream.steps, lags)) * (stream.batches or 1) * columns
    return _TABLE_COPIES * rows * 8 * len(pair_schema())
