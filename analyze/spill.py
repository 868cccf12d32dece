"""Inner chunks that are made once and kept in a temporary file without a name."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store import ChunkGrid, WriteError
from capture.store.files import writing

_ELSEWHERE = "set TMPDIR to a folder with room"


class SpilledChunks:
    """Inner chunks of D coordinates of one dtype, each made when it is first asked for.

    They lie in the folder for temporary files (`TMPDIR`), D · itemsize in all. The file has no
    name from the start, so the system frees it whichever way the process ends. `make` gives one
    chunk ``[C]``, `bytes_to_open` was read to make it ready, and `bytes_once` is that and what it
    reads for all of them; several threads may ask at once. `WriteError` where there is no room.
    """

    def __init__(
        self,
        grid: ChunkGrid,
        dtype: np.dtype[Any],
        make: Callable[[int], NDArray[Any]],
        bytes_to_open: int = 0,
        bytes_once: int = 0,
    ) -> None:
        self._grid = grid
        self._dtype = dtype
        page = mmap.ALLOCATIONGRANULARITY
        self._stride = -(-grid.chunk_elements * dtype.itemsize // page) * page
        self._make = make
        self._made = [False] * grid.num_chunks
        self._locks = [threading.Lock() for _ in self._made]
        self.bytes_to_open, self.bytes_once, self.bytes_per_pass = bytes_to_open, bytes_once, 0
        self.bytes_spilled = self._stride * grid.num_chunks
        self._file = _nameless(self.bytes_spilled)
        self._closing = weakref.finalize(self, os.close, self._file)

    def chunk(self, chunk: int) -> NDArray[Any]:
        """Give one chunk, ``[C]``, mapped: its pages are the system's to drop and read again."""
        with self._locks[chunk]:
            if not self._made[chunk]:
                self._write(chunk)
                self._made[chunk] = True
        start, stop = self._grid.bounds(chunk)
        place, nbytes = chunk * self._stride, (stop - start) * self._dtype.itemsize
        pages = mmap.mmap(self._file, nbytes, access=mmap.ACCESS_READ, offset=place)
        return np.frombuffer(pages, self._dtype)

    def close(self) -> None:
        """Give the space back, when the last view is gone."""
        self._closing()

    def _write(self, chunk: int) -> None:
        values = np.ascontiguousarray(self._make(chunk), self._dtype)
        view, place = values.view(np.uint8).data, chunk * self._stride
        try:
            with writing(tempfile.gettempdir()):
                while view:
                    written = os.pwrite(self._file, view, place)
                    view, place = view[written:], place + written
        except WriteError as error:
            # Others may have filled the disk by now.
            fix = f"free space there, or {_ELSEWHERE}"
            raise WriteError(error.what, where=error.where, fix=fix) from error


def _nameless(nbytes: int) -> int:
    """Open a temporary file that is gone with its last descriptor; `WriteError` without room."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise WriteError("there is no folder for temporary files", fix=_ELSEWHERE) from error
    with writing(folder):
        free = shutil.disk_usage(folder).free
        if free < nbytes:
            raise WriteError(
                f"no room for a reference of {nbytes:,} bytes, {free:,} are free",
                where=folder,
                fix=_ELSEWHERE,
            )
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return os.dup(file.fileno())
