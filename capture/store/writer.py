"""The writer of a run: create or reopen it, commit shards and scalars, finish it.

A commit is: temporary file, fsync, rename, fsync of the folder, then one line in the stream's log,
fsynced. Array shapes and coordinates follow the log, at most once a second and at the end. On an
object store a shard is put whole, and the log, which has no append there, follows with the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store.attributes import (
    attributes_checksum,
    check_given,
    read_attributes,
    streams_are_sound,
)
from capture.store.errors import MismatchError, UsageError, WriteError
from capture.store.files import writing
from capture.store.frozen import write_frozen
from capture.store.layout import (
    ATTRIBUTES_CHECKSUM,
    ATTRIBUTES_KEY,
    COMPLETE,
    FORMAT_VERSION,
    LOCK,
    METADATA,
    PRIVATE_FOLDER,
    RECORDING,
    WEIGHTS,
    group_document,
    stream_folder,
)
from capture.store.place import (
    Lock,
    Place,
    absolute,
    make_folders,
    remove,
    take_lock,
    target_of,
    write_json,
)
from capture.store.scalars import ScalarsWriter
from capture.store.shard import ShardLayout, Staging
from capture.store.start import clear_start, refuse_taken, write_groups
from capture.store.stream_writer import StreamWriter
from capture.store.tensors import TensorTable

FLUSH_SECONDS = 1.0


class RunWriter:
    """The one writer of a run store; holds the run's lock until `close`.

    Made by `create` or `reopen`. One thread at a time may call it.
    """

    def __init__(
        self,
        path: Place,
        lock: Lock,
        table: TensorTable,
        streams: Mapping[str, int | None],
        attributes: dict[str, Any],
    ) -> None:
        self.path = path
        self.table = table
        self.state_folder = path / WEIGHTS / "value" / PRIVATE_FOLDER
        self._lock = lock
        self._attributes = attributes
        self._streams = {
            name: StreamWriter(path, self.state_folder, ShardLayout(name, table, batches))
            for name, batches in streams.items()
        }
        self._scalars = ScalarsWriter(path, self.state_folder)
        self._flushed = time.monotonic()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        table: TensorTable,
        *,
        streams: Mapping[str, int | None],
        attributes: Mapping[str, Any] | None = None,
        frozen: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> RunWriter:
        """Create a new run.

        `streams` maps the name of each stream to its number of batches, `None` where it has no
        such axis; `weights` is always there. `attributes` are JSON values of the caller's. `frozen`
        gives the raw bytes of the frozen tensors. `UsageError` where the path holds a run or
        anything else, or an attribute cannot be kept; `LockedError` where another process is
        creating it.
        """
        if not streams_are_sound(streams):
            raise UsageError(f"{dict(streams)!r} cannot be streams", fix="use letters, - and _")
        check_given(attributes or {})
        root = absolute(target_of(path))
        private = root / WEIGHTS / "value" / PRIVATE_FOLDER
        with writing(root):
            refuse_taken(root)
            if isinstance(root, Path):
                make_folders(private, Path(root.anchor))
        lock = take_lock(private / LOCK)
        try:
            with writing(root):
                # Again, now that nobody else can be at work here.
                refuse_taken(root)
            clear_start(root, private / LOCK)
            return cls._create(root, lock, table, streams, attributes or {}, frozen or {})
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _create(
        cls,
        root: Place,
        lock: Lock,
        table: TensorTable,
        streams: Mapping[str, int | None],
        attributes: Mapping[str, Any],
        frozen: Mapping[str, NDArray[np.uint8]],
    ) -> RunWriter:
        entries: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "status": RECORDING,
            "final_step": None,
            **attributes,
            "streams": {WEIGHTS: None, **streams},
            "tensors": table.to_json(),
        }
        writer = cls(root, lock, table, entries["streams"], entries)
        if table.frozen:
            entries["frozen_crc32c"] = write_frozen(writer.state_folder, table, frozen)
        write_groups(root, writer._streams, writer.state_folder)
        for stream in writer._streams.values():
            stream.start()
        # The root comes last: before it is there, this is not a run.
        writer._write_attributes()
        return writer

    @classmethod
    def reopen(cls, path: str | os.PathLike[str], table: TensorTable | None = None) -> RunWriter:
        """Open a run to go on with it; what a crash left half-done is put right.

        `MismatchError` where its tensors are not those of `table`.
        """
        root = absolute(target_of(path))
        stored = TensorTable.from_json(read_attributes(root)["tensors"], root / METADATA)
        difference = None if table is None else stored.difference(table)
        if difference is None and table is not None and stored != table:
            difference = "dtypes, buffers, parameter groups or tied names are not the same"
        if difference is not None:
            raise MismatchError(
                f"the run was recorded from another model, {difference}",
                where=root,
                fix="resume with the model, or record into another --out",
            )
        lock = take_lock(root / WEIGHTS / "value" / PRIVATE_FOLDER / LOCK)
        try:
            attributes = read_attributes(root)
            writer = cls(root, lock, stored, attributes["streams"], attributes)
            complete = attributes["status"] == COMPLETE
            rows = attributes["digests"]["rows"] if complete else {}
            # Every log is read before anything is removed: shards outlive a damaged log.
            for name, stream in writer._streams.items():
                stream.read_log(rows.get(name))
            for stream in writer._streams.values():
                stream.restore()
            writer._scalars.recover()
        except BaseException:
            lock.release()
            raise
        return writer

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The run's attributes, read-only."""
        return MappingProxyType(self._attributes)

    @property
    def shard_bytes(self) -> dict[str, int]:
        """Bytes of one shard of each stream."""
        return {name: stream.layout.size for name, stream in self._streams.items()}

    def committed_steps(self, stream: str) -> list[int]:
        """List the steps of a stream's committed shards in order of commit."""
        return [commit.step for commit in self._streams[stream].commits]

    def staging(self, stream: str) -> Staging:
        """Allocate a host buffer in the layout of this stream's shards."""
        return Staging(self._streams[stream].layout)

    def commit(
        self,
        stream: str,
        staging: Staging,
        *,
        step: int,
        epoch: float | None = None,
        batch: int | None = None,
        loss: float | None = None,
    ) -> int:
        """Write one shard and commit it; return its size in bytes.

        `loss` is the mean loss of the batch whose gradient this is; a stream keeps that of all its
        shards or of none.

        `WriteError` where the disk refuses; then nothing was committed.
        """
        self._lock.check()
        size = self._streams[stream].commit(staging, step, epoch, batch, loss)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()
        return size

    def append_scalars(self, step: int, values: Mapping[str, float | NDArray[Any]]) -> None:
        """Add the scalars of update `step`; names not seen before are filled up with NaN.

        A value is a number, or a float64 array ``[columns]`` whose length stays the same.
        """
        self._scalars.append(step, values)

    def flush(self) -> None:
        """Bring scalars, coordinates and shapes on disk up to what was committed."""
        self._lock.check()
        for stream in self._streams.values():
            stream.flush()
        self._scalars.flush()
        self._flushed = time.monotonic()

    def add_stream(self, name: str, batches: int | None) -> None:
        """Add an empty stream to a run that is there; nothing where it has it already.

        In a complete run the new stream counts as unfinished until `finish` is called again.
        `UsageError` for a bad name, `MismatchError` where it has another number of batches.
        """
        if not streams_are_sound({name: batches}):
            raise UsageError(f"{name!r} cannot be a stream", fix="use letters, - and _")
        if name in self._streams:
            if self._streams[name].layout.batches != batches:
                raise MismatchError(
                    f"the stream {name!r} has {self._streams[name].layout.batches} batches, not "
                    f"{batches}",
                    where=self.path,
                    fix="give the number that it has",
                )
            return
        layout = ShardLayout(name, self.table, batches)
        remove(self.path / stream_folder(name))  # what a crash left before the root told of it
        self._streams[name] = StreamWriter(self.path, self.state_folder, layout)
        write_groups(self.path, self._streams, self.state_folder)
        self._streams[name].start()
        self._attributes["streams"] = {**self._attributes["streams"], name: batches}
        self._write_attributes()

    def remove_stream(self, name: str) -> None:
        """Remove a stream of gradients with all its rows; nothing where there is none."""
        if name == WEIGHTS or name not in self._streams:
            return
        del self._streams[name]
        kept = self._attributes["streams"]
        self._attributes["streams"] = {key: kept[key] for key in kept if key != name}
        self._attributes.get("digests", {}).get("rows", {}).pop(name, None)
        # First it is no part of the run, then it goes.
        self._write_attributes()
        remove(self.path / stream_folder(name))

    def truncate(self, step: int) -> None:
        """Drop every row and every scalar with a step of `step` or later, and the final status."""
        self.flush()
        self._attributes.update({"status": RECORDING, "final_step": None})
        self._attributes.pop("digests", None)
        self._write_attributes()
        # Weights last, as they come first in a step: no gradient is ever without them.
        for stream in reversed(self._streams.values()):
            stream.truncate(step)
        self._scalars.truncate(step)

    def update_attributes(self, **values: Any) -> None:
        """Merge values into the run's attributes; `UsageError` for those the store writes."""
        check_given(values)
        self._attributes.update(values)
        self._write_attributes()

    def finish(self, final_step: int) -> None:
        """Mark the run complete; `final_step` is T, the number of updates applied."""
        for name, stream in self._streams.items():
            if len(stream.commits) % (stream.layout.batches or 1):
                raise ValueError(f"the last row of {name!r} lacks some of its batches")
        self.flush()
        self._attributes["status"] = COMPLETE
        self._attributes["final_step"] = final_step
        self._attributes["digests"] = {
            "rows": {name: len(stream.commits) for name, stream in self._streams.items()},
            "scalars": self._scalars.digests(),
        }
        self._write_attributes()

    def close(self) -> None:
        """Give back the lock; closing twice is harmless.

        What was committed since the last `flush` is put into the logs of an object store.
        """
        # Where that fails, those shards do not exist: a resumed run writes them again.
        with suppress(WriteError):
            self._lock.check()
            for stream in self._streams.values():
                stream.flush_log()
        self._lock.release()

    def _write_attributes(self) -> None:
        self._lock.check()
        self._attributes[ATTRIBUTES_CHECKSUM] = attributes_checksum(self._attributes)
        document = group_document({ATTRIBUTES_KEY: self._attributes})
        write_json(self.path / METADATA, document, self.state_folder)
