"""Check everything a run holds against what was committed, and find all damage, not the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import zarr

from capture.store.arrays import read_small
from capture.store.errors import RESTORE, DamagedError, InputError
from capture.store.fetched_shard import fetch_ahead
from capture.store.frozen import read_frozen
from capture.store.layout import METADATA, WEIGHTS, stream_folder
from capture.store.log import Commit
from capture.store.objects import ObjectPath
from capture.store.place import Place
from capture.store.reader import Run, Stream, open_run

_REWRITE = "the log is right: `capture.store.RunWriter.reopen(RUN).close()` in Python rewrites this"


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


def verify_run(path: str | os.PathLike[str]) -> Verification:
    """Read every committed byte of a run and compare it with its checksum.

    Raises `NotARunError` or `DamagedError` only where the run cannot be opened at all.
    """
    run = open_run(path)
    found = Verification()
    for check in _checks(run, found):
        try:
            check()
        except InputError as error:
            found.problems.append(error)
    return found


def _checks(run: Run, found: Verification) -> Iterator[Callable[[], object]]:
    """Yield everything there is to check, each as a call of its own."""
    streams: dict[str, Stream] = {}
    # The weights last: in a run that is being recorded, those of every gradient are there by now.
    for name in reversed(run.stream_names):
        try:
            streams[name] = run.stream(name)
        except InputError as error:
            found.problems.append(error)
    weights = streams.get(WEIGHTS)
    for stream in reversed(streams.values()):
        for commit in stream.commits:
            yield partial(_check_shard, stream, commit, found)
        yield partial(_check_coordinates, run, stream)
        yield partial(_check_with_zarr, run, stream)
        if weights is not None:
            yield partial(_check_pairing, weights, stream)
    for name in run.scalar_names():
        yield partial(_check_scalar, run, name, found)
    if run.complete and weights is not None:
        yield run.final_row
    if run.table.frozen:
        yield partial(read_frozen, run)


def _check_shard(stream: Stream, commit: Commit, found: Verification) -> None:
    found.shards += 1
    with stream.open(commit.row, commit.batch) as shard:
        found.bytes += commit.size
        chunks = range(stream.grid.num_chunks)
        fetch_ahead([shard], chunks)
        for chunk in chunks:
            shard.verify_chunk(chunk)
        header, _ = shard.read_rest()
    if header != stream.layout.header(commit.step, commit.batch):
        raise DamagedError(
            f"row {commit.row} of {stream.name!r}: the header is not that of step {commit.step}",
            where=shard.path,
            fix=RESTORE,
        )


def _check_coordinates(run: Run, stream: Stream) -> None:
    """Step, epoch and batch must be those of the log.

    While a run is being recorded, they may lag behind it, or be ahead of what was read of it.
    """
    folder = stream_folder(stream.name)
    expected = {"step": stream.steps, "epoch": stream.epochs}
    if stream.batches is not None:
        expected["batch"] = np.arange(stream.batches)
    # Made when the first row is flushed: it may not be there yet.
    if stream.losses is not None and (
        stream.finished or (run.path / folder / "loss" / METADATA).exists()
    ):
        expected["loss"] = stream.losses
    for name, values in expected.items():
        stored = read_small(run.path, f"{folder}/{name}")
        if not stream.finished and name != "batch":
            common = min(len(stored), len(values))
            stored, values = stored[:common], values[:common]
        if not np.array_equal(stored, values, equal_nan=True):
            raise DamagedError(
                f"the coordinate {name!r} does not agree with the commit log",
                where=run.path / folder / name,
                fix=_REWRITE,
            )


def _check_with_zarr(run: Run, stream: Stream) -> None:
    """Zarr itself must be able to open the stream, and see no more rows than the log lists."""
    folder = run.path / stream_folder(stream.name)
    try:
        node: Any = zarr.open_group(_zarr_store(run.path), mode="r")
        for part in (*stream_folder(stream.name).split("/"), "value"):
            node = node[part]
        rows = int(node.shape[0])
    except Exception as error:  # whatever a reader of another make says of damaged metadata
        what = f"zarr cannot read this stream ({error})"
        raise DamagedError(what, where=folder, fix=RESTORE) from error
    if stream.finished and rows != len(stream):
        raise DamagedError(
            f"the array has {rows} rows, the commit log {len(stream)}",
            where=folder / "value",
            fix=_REWRITE,
        )


def _zarr_store(place: Place) -> Any:
    """What zarr opens: a path as it is, an object store through obstore, as a user would."""
    if isinstance(place, ObjectPath):
        return zarr.storage.ObjectStore(place.store, read_only=True)
    return place


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
