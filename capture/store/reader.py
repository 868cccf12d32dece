"""The reader of a run: what was committed, mapped from disk, verified when it is used."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
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
    StraightwayError,
    UnfinishedError,
    UnknownNameError,
)
from capture.store.files import open_confined
from capture.store.layout import (
    COMMIT_LOG,
    COMPLETE,
    METADATA,
    PRIVATE_FOLDER,
    SCALARS,
    WEIGHTS,
    ChunkGrid,
    shard_key,
    stream_folder,
    value_document,
)
from capture.store.objects import ObjectPath
from capture.store.place import Place, place_of, read_confined
from capture.store.shard import checksums, rest_checksum
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
        self.grid = ChunkGrid(run.table.num_parameters, self.dtype.itemsize)
        self._relative = f"{stream_folder(name)}/value"
        private = f"{self._relative}/{PRIVATE_FOLDER}/{COMMIT_LOG}"
        self.log_path = run.path / private
        commits, _ = log.decode(read_confined(run.path, private), self.log_path)
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

    def open(self, row: int, batch: int | None = None) -> MappedShard:
        """Map one shard; use it in a `with` statement.

        `DamagedError` where the file is missing, no regular file, or not of its committed size.
        """
        place = row * (self.batches or 1) + (batch or 0)
        commit = self.commits[place]
        assert (commit.row, commit.batch) == (row, batch), "a shard that the stream has"
        return MappedShard(self, commit, f"{self._relative}/{shard_key(row, batch)}")

    def read(self, row: int, batch: int | None = None) -> NDArray[Any]:
        """Read one row in full, every byte verified: value dtype ``[D]``, a copy."""
        with self.open(row, batch) as shard:
            shard.verify_rest()
            out = np.empty(self.grid.num_elements, self.dtype)
            for chunk in range(self.grid.num_chunks):
                start, stop = self.grid.bounds(chunk)
                out[start:stop] = shard.chunk(chunk)
                shard.verify_chunk(chunk)
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


class MappedShard:
    """One shard, mapped read-only, or fetched whole from an object store.

    Nothing is verified until a `verify_…` method is called.
    """

    def __init__(self, stream: Stream, commit: log.Commit, relative: str) -> None:
        self.stream = stream
        self.commit = commit
        self.path = stream.run.path / relative
        self._grid = stream.grid
        self._map: mmap.mmap | bytes
        try:
            if isinstance(self.path, ObjectPath):
                self._map = self._fetched(self.path)
            else:
                self._map = self._mapped(open_confined(Path(stream.run.path), relative))
        except DamagedError as error:
            raise self._damaged(error.what) from error
        self.data_start = 8 + int.from_bytes(self._map[:8], "little")
        if self.data_start + self._grid.num_chunks * self._grid.chunk_bytes > commit.size:
            self.close()
            raise self._damaged("the header is damaged")

    def _mapped(self, descriptor: int) -> mmap.mmap:
        try:
            self._require_size(os.fstat(descriptor).st_size)
            return mmap.mmap(descriptor, self.commit.size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def _fetched(self, path: ObjectPath) -> bytes:
        """Fetch the object, and once again where its bytes are not those that were committed."""
        data = path.read_bytes()
        if not self._is_sound(data):
            data = path.read_bytes()
        self._require_size(len(data))
        return data

    def _is_sound(self, data: bytes) -> bool:
        start = 8 + int.from_bytes(data[:8], "little")
        end = start + self._grid.num_chunks * self._grid.chunk_bytes
        if len(data) != self.commit.size or end > len(data):
            return False
        chunks, rest = checksums(np.frombuffer(data, np.uint8), start, self._grid)
        return (tuple(chunks), rest) == (self.commit.chunks, self.commit.rest)

    def _require_size(self, size: int) -> None:
        if size != self.commit.size:
            what = f"the file has {size} bytes, {self.commit.size} were committed"
            raise DamagedError(what)

    def __enter__(self) -> MappedShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chunk(self, chunk: int) -> NDArray[Any]:
        """View one inner chunk without copying: value dtype ``[C]``, the last one clipped to D."""
        start, stop = self._grid.bounds(chunk)
        offset = self.data_start + chunk * self._grid.chunk_bytes
        return np.frombuffer(self._map, self.stream.dtype, stop - start, offset)

    def verify_chunk(self, chunk: int) -> None:
        """Compare one inner chunk with its committed checksum; `DamagedError` where it differs."""
        start = self.data_start + chunk * self._grid.chunk_bytes
        with memoryview(self._map) as view, view[start : start + self._grid.chunk_bytes] as part:
            if crc32c(part) != int(self.commit.chunks[chunk], 16):
                raise self._damaged(f"inner chunk {chunk} does not match its committed checksum")

    def verify_rest(self) -> None:
        """Compare header, buffers and index with their checksum; `DamagedError` on difference."""
        with memoryview(self._map) as view:
            if rest_checksum(view, self.data_start, self._grid) != self.commit.rest:
                raise self._damaged(
                    "header, buffers or index do not match their committed checksum"
                )

    def raw(self, start: int, stop: int) -> bytes:
        """Copy the bytes of the file from `start` to `stop`."""
        return self._map[start:stop]

    def close(self) -> None:
        """Unmap the file; views that are still in use keep the pages until they are gone."""
        # While views on it are alive, the mapping stays: it goes with the last of them.
        if isinstance(self._map, mmap.mmap):
            with suppress(BufferError):
                self._map.close()

    def _damaged(self, what: str) -> StraightwayError:
        batch = "" if self.commit.batch is None else f", batch {self.commit.batch}"
        row = f"row {self.commit.row}{batch} (step {self.commit.step}) of {self.stream.name!r}"
        return DamagedError(f"{row}: {what}", where=self.path, fix=RESTORE)
