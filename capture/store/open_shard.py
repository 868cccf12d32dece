"""One shard, open for reading: what every shard gives, and the shard that is mapped from a disk."""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store.errors import RESTORE, DamagedError
from capture.store.files import open_confined
from capture.store.log import Commit
from capture.store.shard import rest_checksum

if TYPE_CHECKING:
    from capture.store.reader import Stream


class Shard(ABC):
    """One committed shard: its inner chunks, and the rest, which is header, buffers and index.

    Use it in a `with` statement. Nothing is verified until a `verify_…` method is called, or
    `confirm`, except where a subclass says so. What is not as committed is a `DamagedError` that
    names stream, row, batch and file.
    """

    _WRONG_REST = "header, buffers or index do not match their committed checksum"

    def __init__(self, stream: Stream, commit: Commit, relative: str) -> None:
        self.stream = stream
        self.commit = commit
        self.path = stream.run.path / relative
        # From the committed size, so that it needs no byte of the file.
        self.data_start = stream.layout.data_start_in(commit.size)
        if self.data_start < 8:
            raise self._damaged(f"{commit.size} bytes are committed, too few for this model")

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def chunk(self, chunk: int) -> NDArray[Any]:
        """Give one inner chunk: value dtype ``[C]``, the last one clipped to D."""

    @abstractmethod
    def read_part(self, chunk: int, start: int, stop: int) -> memoryview:
        """Copy bytes `start` to `stop` of an inner chunk. Not verified: see `confirm`."""

    @abstractmethod
    def verify_chunk(self, chunk: int) -> None:
        """Compare one inner chunk with its committed checksum."""

    @abstractmethod
    def confirm(self, chunk: int, checksum: int | None) -> None:
        """Verify a chunk of whose coordinates the crc32c was taken while they were used.

        Padding that follows them in the last chunk is added here; `None` where it was not taken.
        """

    @abstractmethod
    def verify_rest(self) -> None:
        """Compare header, buffers and index with their committed checksum."""

    @abstractmethod
    def read_rest(self) -> tuple[bytes, bytes]:
        """Copy the header, and what follows the chunks (buffers, then index), verified."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; what was given out stays whole as long as it is in use."""

    @property
    def _value_end(self) -> int:
        """Byte after the last inner chunk."""
        return self.data_start + self.stream.layout.value_bytes

    def _bounds(self, chunk: int) -> tuple[int, int]:
        """First and one-past-last byte of an inner chunk, padding included."""
        size = self.stream.grid.chunk_bytes
        start = self.data_start + chunk * size
        return start, start + size

    def _expected(self, chunk: int) -> int:
        return int(self.commit.chunks[chunk], 16)

    def _wrong_size(self, size: int) -> str:
        return f"the file has {size} bytes, {self.commit.size} were committed"

    def _wrong_chunk(self, chunk: int) -> str:
        return f"inner chunk {chunk} does not match its committed checksum"

    def _damaged(self, what: str, fix: str = RESTORE) -> DamagedError:
        batch = "" if self.commit.batch is None else f", batch {self.commit.batch}"
        row = f"row {self.commit.row}{batch} (step {self.commit.step}) of {self.stream.name!r}"
        return DamagedError(f"{row}: {what}", where=self.path, fix=fix)


class MappedShard(Shard):
    """A shard of a local run, mapped read-only: chunks are views, and nothing is copied."""

    def __init__(self, stream: Stream, commit: Commit, relative: str) -> None:
        super().__init__(stream, commit, relative)
        try:
            self._map = self._mapped(open_confined(Path(stream.run.path), relative))
        except DamagedError as error:
            raise self._damaged(error.what) from error

    def _mapped(self, descriptor: int) -> mmap.mmap:
        try:
            size = os.fstat(descriptor).st_size
            if size != self.commit.size:
                raise DamagedError(self._wrong_size(size))
            return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def chunk(self, chunk: int) -> NDArray[Any]:
        """View one inner chunk without copying: value dtype ``[C]``, the last one clipped to D."""
        start, stop = self.stream.grid.bounds(chunk)
        return np.frombuffer(self._map, self.stream.dtype, stop - start, self._bounds(chunk)[0])

    def read_part(self, chunk: int, start: int, stop: int) -> memoryview:
        """Copy bytes `start` to `stop` of an inner chunk. Not verified: see `confirm`."""
        base = self._bounds(chunk)[0]
        return memoryview(self._map[base + start : base + stop])

    def verify_chunk(self, chunk: int) -> None:
        """Compare one inner chunk with its committed checksum."""
        start, stop = self._bounds(chunk)
        with memoryview(self._map) as view, view[start:stop] as part:
            if crc32c(part) != self._expected(chunk):
                raise self._damaged(self._wrong_chunk(chunk))

    def confirm(self, chunk: int, checksum: int | None) -> None:
        """Compare a checksum taken elsewhere; where it differs, this one has the last word."""
        if checksum is not None:
            first, last = self.stream.grid.bounds(chunk)
            start, stop = self._bounds(chunk)
            padding = self._map[start + (last - first) * self.stream.dtype.itemsize : stop]
            if crc32c(padding, checksum) == self._expected(chunk):
                return
        self.verify_chunk(chunk)

    def verify_rest(self) -> None:
        """Compare header, buffers and index with their committed checksum."""
        with memoryview(self._map) as view:
            if rest_checksum(view, self.data_start, self.stream.grid) != self.commit.rest:
                raise self._damaged(self._WRONG_REST)

    def read_rest(self) -> tuple[bytes, bytes]:
        """Copy the header, and what follows the chunks (buffers, then index), verified."""
        self.verify_rest()
        return self._map[: self.data_start], self._map[self._value_end :]

    def close(self) -> None:
        """Unmap the file; views that are still in use keep the pages until they are gone."""
        # While views on it are alive, the mapping stays: it goes with the last of them.
        with suppress(BufferError):
            self._map.close()
