"""The reader of a run: what was committed, mapped or fetched, verified when it is used."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store import log
from capture.store.arrays import read_document, read_small
from capture.store.attributes import read_attributes
from capture.store.errors import (
    RESTORE,
    DamagedError,
    UnfinishedError,
    UnknownNameError,
)
from capture.store.fetched_shard import FetchedShard, fetch_ahead
from capture.store.layout import (
    COMMIT_LOG,
    COMPLETE,
    METADATA,
    PRIVATE_FOLDER,
    SCALARS,
    WEIGHTS,
    shard_key,
    stream_folder,
    value_document,
)
from capture.store.objects import ObjectPath
from capture.store.open_shard import MappedShard, Shard
from capture.store.place import Place, place_of, read_confined
from capture.store.shard import ShardLayout
from capture.store.tensors import TensorTable


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run for reading.

    `NotARunError` where there is none, `DamagedError` where its metadata do not add up.
    """
    return Run(place_of(path))


class Run:
    """A recorded run. Rows are those that the commit logs list, nothing else."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self.name = path.resolve().name
        self.attributes: dict[str, Any] = read_attributes(path)
        self.table = TensorTable.from_json(self.attributes["tensors"], path / METADATA)
        self.status = str(self.attributes["status"])
        self._open_streams: dict[str, Stream] = {}
        self._batches: dict[str, int | None] = self.attributes["streams"]

    @property
    def complete(self) -> bool:
        """Whether the run came to its end and `w_T` was saved."""
        return self.status == COMPLETE

    @property
    def final_step(self) -> int | None:
        """T, the number of updates applied; `None` while the run is not complete."""
        step: int | None = self.attributes["final_step"]
        return step

    @property
    def streams(self) -> dict[str, Stream]:
        """Every stream of the run by name, `weights` first."""
        names = [WEIGHTS, *sorted(name for name in self._batches if name != WEIGHTS)]
        return {name: self.stream(name) for name in names}

    @property
    def stream_names(self) -> list[str]:
        """Names of the streams, `weights` first; opens none of them."""
        return [WEIGHTS, *sorted(name for name in self._batches if name != WEIGHTS)]

    def stream(self, name: str) -> Stream:
        """Open one stream; `UnknownNameError` names those that there are."""
        if name not in self._batches:
            raise UnknownNameError(
                f"the run has no stream {name!r}",
                where=self.path,
                fix=f"it has {', '.join(self.stream_names)}",
            )
        if name not in self._open_streams:
            self._open_streams[name] = Stream(self, name, self._batches[name])
        return self._open_streams[name]

    def final_row(self) -> int:
        """Row of `w_T` in `weights`; `UnfinishedError` where the run has not come to its end."""
        if not self.complete:
            raise UnfinishedError(
                "the run has not finished, so it has no final iterate",
                where=self.path,
                fix="finish it with --resume (Recorder: resume=True), or use --reference step:N",
            )
        weights = self.stream(WEIGHTS)
        row = len(weights.steps) - 1
        if row < 0 or weights.steps[row] != self.final_step:
            raise DamagedError(
                f"the run is complete at step {self.final_step}, but its last weights are not "
                "of that step",
                where=self.path,
                fix=RESTORE,
            )
        return row

    def scalar_names(self) -> list[str]:
        """Names of the every-step scalars."""
        if self.complete:
            return sorted(self.attributes["digests"]["scalars"])
        return sorted(path.parent.name for path in (self.path / SCALARS).glob(f"*/{METADATA}"))

    def scalar(self, name: str) -> NDArray[np.float64]:
        """Read one every-step scalar, float64 ``[S]`` or ``[S, columns]``; row t is update t.

        `UnknownNameError` where there is none of this name, `DamagedError` where a chunk is
        missing, changed, or not the one that the finished run wrote.
        """
        if name not in self.scalar_names():
            raise UnknownNameError(
                f"the run has no scalar {name!r}",
                where=self.path,
                fix=f"it has {', '.join(self.scalar_names()) or 'none'}",
            )
        values: NDArray[np.float64] = read_small(self.path, f"{SCALARS}/{name}")
        if self.complete:
            expected = self.attributes["digests"]["scalars"][name]
            if f"{crc32c(values.tobytes()):08x}" != expected:
                raise DamagedError(
                    f"the scalar {name!r} is not what the finished run wrote",
                    where=self.path / SCALARS / name,
                    fix=RESTORE,
                )
        return values


class Stream:
    """One stream of a run: `weights`, `updates`, or a stream of gradients.

    `steps` is int64 ``[T]``, `epochs` float64 ``[T]`` (NaN where unknown), `batches` is B or
    `None`. `losses` are the mean losses of the batches whose gradients these are, float64 ``[T]``
    or ``[T, B]``, `None` where they are not kept. `finished` says that no row will follow.
    Row r of step t in `weights` is `w_t`; a gradient of step t was taken at `w_t`; an update of
    step t is `w_{t+1} - w_t`.
    """

    def __init__(self, run: Run, name: str, batches: int | None) -> None:
        self.run = run
        self.name = name
        self.batches = batches
        self.dtype = run.table.value_dtype
        self.layout = ShardLayout(name, run.table, batches)
        self.grid = self.layout.grid
        self._relative = f"{stream_folder(name)}/value"
        private = f"{self._relative}/{PRIVATE_FOLDER}/{COMMIT_LOG}"
        self.log_path = run.path / private
        data = read_confined(run.path, private)
        commits, sound = log.decode(data, self.log_path)
        if isinstance(run.path, ObjectPath) and sound < len(data):
            # Objects are put whole: no append of theirs is ever cut short.
            raise DamagedError("the commit log is cut off", where=self.log_path, fix=RESTORE)
        # A stream that is being added to a complete run is not finished yet.
        finished = run.attributes["digests"]["rows"].get(name) if run.complete else None
        self.finished = finished is not None
        log.check(
            commits,
            self.log_path,
            batches=batches,
            num_chunks=self.grid.num_chunks,
            finished=finished,
        )
        self.commits = commits
        rows = len(commits) // (batches or 1)
        first = np.arange(rows) * (batches or 1)
        self.steps: NDArray[np.int64] = commits.steps[first]
        self.epochs: NDArray[np.float64] = commits.epochs[first]
        self.losses: NDArray[np.float64] | None = None
        if commits.has_losses:
            kept = commits.losses[: rows * (batches or 1)]
            self.losses = kept if batches is None else kept.reshape(rows, batches)
        self._check_metadata()

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def _rows_by_step(self) -> dict[int, int]:
        return {step: row for row, step in enumerate(self.steps.tolist())}

    def row_of(self, step: int) -> int:
        """Row of a step; `UnknownNameError` names the nearest recorded steps."""
        row = self._rows_by_step.get(step)
        if row is None:
            nearest = sorted(self._rows_by_step, key=lambda known: (abs(known - step), known))[:2]
            known = " and ".join(str(step) for step in sorted(nearest))
            raise UnknownNameError(
                f"step {step} is not recorded in {self.name!r}",
                where=self.run.path,
                fix=f"the nearest recorded are {known}" if known else "no step is recorded yet",
            )
        return row

    def open(self, row: int, batch: int | None = None) -> Shard:
        """Open one shard; use it in a `with` statement.

        `DamagedError` where the file is missing, no regular file, or not of its committed size. On
        an object store nothing is asked for yet: there it comes with the first part that is used.
        """
        place = row * (self.batches or 1) + (batch or 0)
        commit = self.commits[place]
        assert (commit.row, commit.batch) == (row, batch), "a shard that the stream has"
        kind = FetchedShard if isinstance(self.run.path, ObjectPath) else MappedShard
        return kind(self, commit, f"{self._relative}/{shard_key(row, batch)}")

    def read(self, row: int, batch: int | None = None) -> NDArray[Any]:
        """Read one row in full, every byte verified: value dtype ``[D]``, a copy."""
        with self.open(row, batch) as shard:
            chunks = range(self.grid.num_chunks)
            fetch_ahead([shard], chunks)
            out = np.empty(self.grid.num_elements, self.dtype)
            for chunk in chunks:
                start, stop = self.grid.bounds(chunk)
                out[start:stop] = shard.chunk(chunk)
                shard.verify_chunk(chunk)
            shard.verify_rest()
            return out

    def _check_metadata(self) -> None:
        """The shape may lag behind the log of a running run; all else must be as we write it."""
        relative = f"{self._relative}/{METADATA}"
        document = read_document(self.run.path, relative)
        shape = document.get("shape")
        rows = shape[0] if isinstance(shape, list) and shape else None
        expected = (
            value_document(rows, self.batches, self.grid, self.dtype)
            if isinstance(rows, int) and (rows == len(self) or not self.finished)
            else None
        )
        if document != expected:
            raise DamagedError(
                "the array's metadata are not those of this run",
                where=self.run.path / relative,
                fix=RESTORE,
            )
