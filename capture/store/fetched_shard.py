"""The shard on an object store: fetched part by part, with requests in flight, verified on arrival.

A part is one inner chunk, or the rest. Where its bytes are not those that were committed, it is
fetched once more, and is damaged if they still are not. Chunks are asked for when they are used, or
before that with `fetch_ahead`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store.errors import DamagedError
from capture.store.log import Commit
from capture.store.objects import ObjectPath
from capture.store.open_shard import Shard

if TYPE_CHECKING:
    from capture.store.reader import Stream

# Requests of this process that wait for an answer at the same time.
IN_FLIGHT = 16

# What one `fetch_ahead` holds of chunks that were asked for and not yet used.
AHEAD_BYTES = 64 * 2**20

# A shard of one chunk comes with one request, if no more than this comes with the chunk.
COMPACT_REST_BYTES = 2**20

_NETWORK = "check the network, then try again"

# What is wrong with the parts that arrived; `None` where nothing is.
_Check = Callable[[Sequence[memoryview]], str | None]


class FetchedShard(Shard):
    """A shard on an object store. Opening it asks for nothing.

    What `chunk` gives was verified when it arrived, and is the caller's alone: asked again, it is
    fetched again. Held here are only chunks that were asked for ahead, until they are used, and
    the rest where it came along, until it is verified. Several threads may call `chunk`.
    """

    def __init__(self, stream: Stream, commit: Commit, relative: str) -> None:
        super().__init__(stream, commit, relative)
        assert isinstance(self.path, ObjectPath), "only objects are fetched"
        self._object = self.path
        self._asked: dict[int, Future[NDArray[Any]]] = {}
        self._asked_rest: Future[tuple[bytes, bytes]] | None = None
        self._window: _Window | None = None
        self._sound: set[int] = set()
        self._rest_is_sound = False
        self._rest: tuple[bytes, bytes] | None = None
        beside = commit.size - stream.layout.value_bytes
        self._is_compact = stream.grid.num_chunks == 1 and beside <= COMPACT_REST_BYTES

    def chunk(self, chunk: int) -> NDArray[Any]:
        """Give one inner chunk, verified: value dtype ``[C]``, the last one clipped to D."""
        asked = self._asked.pop(chunk, None)
        values = self._fetch_chunk(chunk) if asked is None else asked.result()
        if asked is not None and self._window is not None:
            self._window.move_on()
        self._sound.add(chunk)
        start, stop = self.stream.grid.bounds(chunk)
        return values[: stop - start]

    def read_part(self, chunk: int, start: int, stop: int) -> memoryview:
        """Fetch bytes `start` to `stop` of an inner chunk. Not verified: see `confirm`."""
        base = self._bounds(chunk)[0]
        name = f"a part of inner chunk {chunk}"
        (part,) = self._fetch(name, [(base + start, base + stop)], lambda parts: None)
        return part

    def verify_chunk(self, chunk: int) -> None:
        """Fetch one inner chunk, unless it came before: then it was verified."""
        if chunk not in self._sound:
            self.chunk(chunk)

    def confirm(self, chunk: int, checksum: int | None) -> None:
        """Compare the checksum of parts; what `chunk` gave was verified, padding included."""
        if checksum is None or chunk in self._sound:
            self.verify_chunk(chunk)
            return
        first, last = self.stream.grid.bounds(chunk)
        used, size = (last - first) * self.stream.dtype.itemsize, self.stream.grid.chunk_bytes
        padding = self.read_part(chunk, used, size) if used < size else b""
        if crc32c(padding, checksum) != self._expected(chunk):
            raise self._damaged(self._wrong_chunk(chunk))

    def verify_rest(self) -> None:
        """Fetch header, buffers and index, unless they came before: then they were verified."""
        if not self._rest_is_sound:
            self.read_rest()
        self._rest = None

    def read_rest(self) -> tuple[bytes, bytes]:
        """Give the header, and what follows the chunks (buffers, then index), verified."""
        asked, self._asked_rest = self._asked_rest, None
        found = self._rest or (self._fetch_rest() if asked is None else asked.result())
        self._rest_is_sound = True
        return found

    def ask(self, chunk: int, window: _Window) -> None:
        """Send for a chunk that is going to be used; with the first one for the rest as well.

        When it is used, `window` moves on.
        """
        self._window = window
        self._asked[chunk] = _pool().submit(self._fetch_chunk, chunk)
        if chunk == 0 and not (self._is_compact or self._rest_is_sound):
            self._asked_rest = _pool().submit(self._fetch_rest)

    def close(self) -> None:
        """Drop what was asked for and not used."""
        for asked in self._asked.values():
            asked.cancel()
        if self._asked_rest is not None:
            self._asked_rest.cancel()
        self._asked, self._asked_rest, self._window = {}, None, None

    def _fetch_chunk(self, chunk: int) -> NDArray[Any]:
        """Fetch a chunk, padding included: value dtype, aligned, in memory of its own."""
        name = f"inner chunk {chunk}"
        if self._is_compact:
            header, values, tail = self._split(*self._fetch(name, self._whole, self._whole_flaw))
            self._rest = bytes(header), bytes(tail)
        else:
            (values,) = self._fetch(name, [self._bounds(chunk)], partial(self._chunk_flaw, chunk))
        return np.frombuffer(values, self.stream.dtype).copy()

    def _fetch_rest(self) -> tuple[bytes, bytes]:
        name = "header, buffers and index"
        if self._is_compact:
            header, _, tail = self._split(*self._fetch(name, self._whole, self._whole_flaw))
        else:
            spans = [(0, self.data_start), (self._value_end, self.commit.size)]
            header, tail = self._fetch(name, spans, self._rest_flaw)
        return bytes(header), bytes(tail)

    @property
    def _whole(self) -> list[tuple[int, int]]:
        return [(0, self.commit.size)]

    def _split(self, whole: memoryview) -> tuple[memoryview, memoryview, memoryview]:
        start, end = self.data_start, self._value_end
        return whole[:start], whole[start:end], whole[end:]

    def _chunk_flaw(self, chunk: int, parts: Sequence[memoryview]) -> str | None:
        return None if crc32c(parts[0]) == self._expected(chunk) else self._wrong_chunk(chunk)

    def _rest_flaw(self, parts: Sequence[memoryview]) -> str | None:
        header, tail = parts
        is_right = crc32c(tail, crc32c(header)) == int(self.commit.rest, 16)
        return None if is_right else self._WRONG_REST

    def _whole_flaw(self, parts: Sequence[memoryview]) -> str | None:
        header, values, tail = self._split(*parts)
        return self._chunk_flaw(0, [values]) or self._rest_flaw([header, tail])

    def _fetch(
        self, name: str, spans: Sequence[tuple[int, int]], check: _Check
    ) -> list[memoryview]:
        """Fetch bytes from and to these places, and once more where they are not as committed."""
        error = None
        for _ in range(2):
            try:
                answers = [self._object.read_range(*span) for span in spans]
            except DamagedError as missing:
                raise self._damaged(f"{missing.what} (asked for {name})") from missing
            error = self._flaw(name, spans, answers, check)
            if error is None:
                return [data for data, _ in answers]
        assert error is not None
        raise error

    def _flaw(
        self,
        name: str,
        spans: Sequence[tuple[int, int]],
        answers: Sequence[tuple[memoryview, int]],
        check: _Check,
    ) -> DamagedError | None:
        for (start, stop), (data, size) in zip(spans, answers, strict=True):
            if size != self.commit.size:
                return self._damaged(f"{self._wrong_size(size)} (asked for {name})")
            if len(data) != stop - start:
                short = f"{len(data)} bytes arrived of {stop - start}, twice (asked for {name})"
                return self._damaged(short, _NETWORK)
        what = check([data for data, _ in answers])
        return None if what is None else self._damaged(what)


def fetch_ahead(shards: Sequence[Shard], chunks: range) -> None:
    """Send for chunks before they are used: chunk after chunk, each of all `shards` in turn.

    The caller then uses each of them once, in this order. At most `AHEAD_BYTES` are in flight or
    held at a time, whatever the number of shards. Nothing to do for shards that are mapped.
    """
    fetched = [shard for shard in shards if isinstance(shard, FetchedShard)]
    if not fetched:
        return
    window = _Window((shard, chunk) for chunk in chunks for shard in fetched)
    held = AHEAD_BYTES // fetched[0].stream.grid.chunk_bytes
    for _ in range(max(2, min(2 * IN_FLIGHT, held))):
        window.move_on()


def read_parts(shards: Sequence[Shard], chunk: int, start: int, stop: int) -> Iterator[memoryview]:
    """Read bytes `start` to `stop` of an inner chunk of each shard, as `Shard.read_part` does.

    From an object store with several requests in flight; the parts of all are held.
    """

    def read(shard: Shard) -> memoryview:
        return shard.read_part(chunk, start, stop)

    fetched = any(isinstance(shard, FetchedShard) for shard in shards)
    return _pool().map(read, shards) if fetched else map(read, shards)


class _Window:
    """What is to be used next, in order: for each chunk that is used, one more is asked for."""

    def __init__(self, pieces: Iterator[tuple[FetchedShard, int]]) -> None:
        self._pieces = pieces

    def move_on(self) -> None:
        piece = next(self._pieces, None)
        if piece is not None:
            shard, chunk = piece
            shard.ask(chunk, self)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """The threads that wait for answers; they hold no lock of Python while they do."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="straightway-fetch")
