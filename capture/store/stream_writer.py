"""The writing side of one stream: its shards, its log, its shape and coordinates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from capture.store import log
from capture.store.arrays import SmallArray
from capture.store.files import sync_folder
from capture.store.layout import (
    COMMIT_LOG,
    METADATA,
    PRIVATE_FOLDER,
    shard_key,
    stream_folder,
    value_document,
)
from capture.store.log_file import LogFile
from capture.store.objects import ObjectPath
from capture.store.place import (
    Place,
    make_folders,
    read_confined,
    relative_to,
    remove,
    write_durably,
    write_json,
)
from capture.store.shard import ShardLayout, Staging

_FLOAT64: np.dtype[Any] = np.dtype("<f8")
_INT64: np.dtype[Any] = np.dtype("<i8")


class StreamWriter:
    """Commits the shards of one stream and keeps its log, shape and coordinates."""

    def __init__(self, root: Place, scratch: Place, layout: ShardLayout) -> None:
        self.layout = layout
        self.commits: list[log.Commit] = []
        self._root = root
        self._scratch = scratch
        self._relative = stream_folder(layout.stream)
        self._value = root / self._relative / "value"
        self._private = self._value / PRIVATE_FOLDER
        self._log = LogFile(self._private / COMMIT_LOG, scratch)
        self._shape_rows = -1
        self._steps = SmallArray(root, f"{self._relative}/step", _INT64, ["step"])
        self._epochs = SmallArray(root, f"{self._relative}/epoch", _FLOAT64, ["step"])
        self._losses = self._new_losses()

    def start(self) -> None:
        """Create the empty array with its empty log."""
        make_folders(self._private, self._root)
        self._log.replace(b"")
        self.flush()
        if self.layout.batches is not None:
            batches = SmallArray(self._root, f"{self._relative}/batch", _INT64, ["batch"])
            for batch in range(self.layout.batches):
                batches.append(batch, self._scratch)
            batches.flush(self._scratch)

    def read_log(self, finished: int | None) -> None:
        """Read the log and cut a torn last line off it; `finished` as in `log.check`."""
        relative = f"{self._relative}/value/{PRIVATE_FOLDER}/{COMMIT_LOG}"
        data = read_confined(self._root, relative)
        commits, sound = log.decode(data, self._log.path)
        log.check(
            commits,
            self._log.path,
            batches=self.layout.batches,
            num_chunks=self.layout.grid.num_chunks,
            finished=finished,
        )
        self.commits = list(commits)
        if sound < len(data):
            self._log.replace(data[:sound])
        self._log.load(data[:sound])

    def commit(
        self,
        staging: Staging,
        step: int,
        epoch: float | None,
        batch: int | None,
        loss: float | None = None,
    ) -> int:
        """Write one shard, then its line; return the size of the shard in bytes."""
        row = self._row_for(step, batch)
        chunks, rest = staging.seal(step, batch)
        path = self._value / shard_key(row, batch)
        make_folders(path.parent, self._root)
        write_durably(path, staging.image, self._scratch)
        kept = None if loss is None else repr(float(loss))
        commit = log.Commit(row, batch, step, epoch, self.layout.size, rest, tuple(chunks), kept)
        self._log.append(log.encode(commit))
        self.commits.append(commit)
        self._append_coordinates()
        return self.layout.size

    def flush(self) -> None:
        """Write the log first, then the coordinates, then the shape that makes them count."""
        self.flush_log()
        self._steps.flush(self._scratch)
        self._epochs.flush(self._scratch)
        if self._has_losses:
            self._losses.flush(self._scratch)
        self._write_shape()

    def flush_log(self) -> None:
        """Put the log where it is put whole: what was committed exists from here on."""
        self._log.flush()

    def truncate(self, step: int) -> None:
        """Keep the commits before `step`; all before must have been flushed.

        Shape and coordinates are cut first, then the log, then shards are removed: at any moment
        the log lists all that the arrays show, and every shard that it lists is there.
        """
        kept = [commit for commit in self.commits if commit.step < step]
        if len(kept) == len(self.commits):
            return
        self.commits = kept
        self._write_shape()
        self._steps.load(self._rows, self._scratch)
        self._epochs.load(self._rows, self._scratch)
        if self._losses.folder.exists():
            self._losses.load(self._rows, self._scratch)
        self._log.replace(b"".join(map(log.encode, kept)))
        self._remove_unlisted()

    def _row_for(self, step: int, batch: int | None) -> int:
        """Row of the next shard; `ValueError` where this step and batch cannot be next."""
        row, position = divmod(len(self.commits), self.layout.batches or 1)
        last = self.commits[-1].step if self.commits else -1
        expected = None if self.layout.batches is None else position
        if batch != expected or (step != last if position else step <= last):
            raise ValueError(
                f"{self.layout.stream}: step {step}, batch {batch} after step {last}, "
                f"where batch {expected} is next"
            )
        return row

    @property
    def _rows(self) -> int:
        """Rows of which every batch is committed."""
        return len(self.commits) // (self.layout.batches or 1)

    @property
    def _has_losses(self) -> bool:
        return bool(self.commits) and self.commits[0].loss is not None

    def _new_losses(self) -> SmallArray:
        batches = self.layout.batches
        dimensions = ["step"] if batches is None else ["step", "batch"]
        columns = () if batches is None else (batches,)
        return SmallArray(self._root, f"{self._relative}/loss", _FLOAT64, dimensions, columns)

    def _append_coordinates(self) -> None:
        while len(self._steps) < self._rows:
            start, count = len(self._steps) * (self.layout.batches or 1), self.layout.batches or 1
            first = self.commits[start]
            if first.loss is not None:
                losses = log.losses(self.commits[start : start + count])
                row = losses if self.layout.batches is not None else losses[0]
                self._losses.append(row, self._scratch)
            self._steps.append(first.step, self._scratch)
            epoch = np.nan if first.epoch is None else first.epoch
            self._epochs.append(epoch, self._scratch)

    def restore(self) -> None:
        """Rebuild coordinates and shape from the log, and remove what a crash left."""
        self._steps = SmallArray(self._root, f"{self._relative}/step", _INT64, ["step"])
        self._epochs = SmallArray(self._root, f"{self._relative}/epoch", _FLOAT64, ["step"])
        self._losses = self._new_losses()
        self._append_coordinates()
        self._shape_rows = -1
        self.flush()
        self._steps.trim()
        self._epochs.trim()
        self._losses.trim()
        for leftover in self._private.glob("*.tmp"):
            remove(leftover)
        self._remove_unlisted()

    def _remove_unlisted(self) -> None:
        """Remove shards that the log does not list, and folders that are empty."""
        listed = {shard_key(commit.row, commit.batch) for commit in self.commits}
        if isinstance(self._value, ObjectPath):
            for shard, _ in (self._value / "c").below():
                if relative_to(shard, self._value) not in listed:
                    remove(shard)
            return
        for folder, subfolders, names in os.walk(self._value / "c", topdown=False):
            for path in [Path(folder, name) for name in (*subfolders, *names)]:
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self._value).as_posix() not in listed:
                    remove(path)
            sync_folder(Path(folder))

    def _write_shape(self) -> None:
        if self._shape_rows == self._rows:
            return
        layout = self.layout
        document = value_document(self._rows, layout.batches, layout.grid, layout.dtype)
        write_json(self._value / METADATA, document, self._scratch)
        self._shape_rows = self._rows
