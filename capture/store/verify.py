"""Check everything a run holds against what was committed, and find all damage, not the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import zarr

from capture.store.errors import DamagedError, InputError
from capture.store.frozen import read_frozen
from capture.store.layout import WEIGHTS, stream_folder
from capture.store.log import Commit
from capture.store.reader import Run, Stream, open_run
from capture.store.shard import ShardLayout


@dataclass
class Verification:
    """What `verify_run` found: counts of what was checked, and every problem as one error."""

    shards: int = 0
    bytes: int = 0
    scalars: int = 0
    problems: list[InputError] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify_run(
    path: str | os.PathLike[str], progress: Callable[[int], None] | None = None
) -> Verification:
    """Read every committed byte of a run and compare it with its checksum.

    `progress` is called with the number of bytes read after each shard. Raises `NotARunError`
    or `DamagedError` only where the run cannot be opened at all.
    """
    run = open_run(path)
    found = Verification()
    for check in _checks(run, found, progress):
        try:
            check()
        except InputError as error:
            found.problems.append(error)
    return found


def _checks(
    run: Run, found: Verification, progress: Callable[[int], None] | None
) -> Iterator[Callable[[], object]]:
    """Yield everything there is to check, each as a call of its own."""
    weights: Stream | None = None
    for name in run.stream_names:
        try:
            stream = run.stream(name)
        except InputError as error:
            found.problems.append(error)
            continue
        weights = stream if name == WEIGHTS else weights
        for commit in stream.commits:
            yield partial(_check_shard, stream, commit, found, progress)
        yield partial(_check_with_zarr, run, stream)
        if weights is not None:
            yield partial(_check_pairing, weights, stream)
    for name in run.scalar_names():
        yield partial(_check_scalar, run, name, found)
    if run.complete and weights is not None:
        yield run.final_row
    if run.table.frozen:
        yield partial(read_frozen, run)


def _check_shard(
    stream: Stream, commit: Commit, found: Verification, progress: Callable[[int], None] | None
) -> None:
    found.shards += 1
    layout = ShardLayout(stream.name, stream.run.table, stream.batches)
    with stream.open(commit.row, commit.batch) as shard:
        found.bytes += commit.size
        shard.verify_rest()
        for chunk in range(stream.grid.num_chunks):
            shard.verify_chunk(chunk)
        header = shard.raw(0, layout.data_start)
    if header != layout.header(commit.step, commit.batch):
        raise DamagedError(
            f"row {commit.row} of {stream.name!r}: the header is not that of step {commit.step}",
            where=shard.path,
            fix="restore the file from a copy of the run, or record the run again",
        )
    if progress is not None:
        progress(commit.size)


def _check_with_zarr(run: Run, stream: Stream) -> None:
    """Zarr itself must see the rows, steps and epochs that the log lists."""
    folder = run.path / stream_folder(stream.name)
    try:
        group = zarr.open_group(folder, mode="r")
        steps = np.asarray(group["step"])
        rows = int(zarr.open_array(folder / "value", mode="r").shape[0])
    except Exception as error:  # whatever a reader of another make says of damaged metadata
        raise DamagedError(f"zarr cannot read this stream ({error})", where=folder) from error
    seen = min(rows, len(stream))
    lag_is_fine = not run.complete and rows <= len(stream)
    if not (rows == len(stream) or lag_is_fine) or list(steps[:seen]) != list(stream.steps[:seen]):
        raise DamagedError(
            "the coordinate `step` or the shape does not agree with the commit log",
            where=folder,
            fix="the log is right; open the run with --resume to rewrite the coordinates",
        )


def _check_pairing(weights: Stream, stream: Stream) -> None:
    alone = sorted(set(stream.steps.tolist()) - set(weights.steps.tolist()))
    if alone:
        raise DamagedError(
            f"{stream.name!r} has step {alone[0]}, of which there are no weights",
            where=stream.log_path,
            fix="restore both commit logs from the same copy of the run",
        )


def _check_scalar(run: Run, name: str, found: Verification) -> None:
    run.scalar(name)
    found.scalars += 1
