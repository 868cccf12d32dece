"""States that were kept for good, read tensor by tensor without torch, none of them as a whole.

A state's file has one checksum, of all its bytes, so opening a state passes over them once.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store.errors import DamagedError
from capture.store.files import open_confined, writing
from capture.store.layout import PRIVATE_FOLDER, WEIGHTS
from capture.store.objects import ObjectPath
from capture.store.place import Place
from capture.store.plain import Entry, header_length, parse_header
from capture.store.states import KEPT_FOLDER, StateFile, decode, kept_steps, read_state, state_name

# What one tensor of a state may be read as; the upper half of a float32 widens without loss.
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_PART_BYTES = 2**24


@dataclass(frozen=True)
class StateTensor:
    """What stands in the tree of a state for a tensor or an array: its name in the file."""

    name: str


def list_kept(run: Place) -> list[int]:
    """After which numbers of updates a state of this run was kept, ascending."""
    return kept_steps(_states(run))


def find_kept(run: Place, step: int) -> StateFile:
    """Read what the state kept after `step` updates says of itself, but none of its tensors.

    `DamagedError` where that is not as it was written, or there is none.
    """
    try:
        return read_state(_states(run) / KEPT_FOLDER, step)
    except DamagedError as error:
        raise _damaged(error, step) from error


def tree_of(state: StateFile) -> Any:
    """Put the tree of a state together, with a `StateTensor` in the place of each tensor."""
    return decode(state.tree, StateTensor, StateTensor)


class KeptState:
    """A state of a run that was kept, open for reading, every byte verified.

    Use it in a `with` statement. `tree` is what was saved, with a `StateTensor` in the place of
    each tensor and array. On a disk its file is mapped; from an object store it is fetched into a
    temporary file. Opening it, `DamagedError` names a file that is not as it was written.
    """

    def __init__(self, run: Place, step: int) -> None:
        self.state = find_kept(run, step)
        self.tree = tree_of(self.state)
        self.path = self.state.folder / self.state.file
        try:
            self._map = _open(self.state)
            self._entries = self._read_header()
        except DamagedError as error:
            raise _damaged(error, step) from error

    def __enter__(self) -> KeptState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shape(self, tensor: StateTensor) -> tuple[int, ...]:
        """Shape of a tensor; `DamagedError` where the file has none of this name."""
        return self._entry(tensor).tensor.shape

    def read(self, tensor: StateTensor, start: int, stop: int) -> NDArray[Any]:
        """Copy elements `start` to `stop` of a tensor, flattened, in its own dtype.

        bfloat16 becomes float32. `DamagedError` where it is no tensor of numbers.
        """
        entry = self._entry(tensor)
        if entry.tensor.dtype not in _STORED:
            what = f"{tensor.name} has dtype {entry.tensor.dtype}, no real numbers"
            raise _damaged(DamagedError(what, where=self.path), self.state.step)
        dtype = np.dtype(_STORED[entry.tensor.dtype])
        begin = entry.start + start * dtype.itemsize
        data = self._map[begin : begin + (stop - start) * dtype.itemsize]
        values: NDArray[Any] = np.frombuffer(data, dtype)
        if entry.tensor.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def number(self, value: Any) -> float:
        """Read a number that may have been saved as a tensor of one element."""
        return float(self.read(value, 0, 1)[0]) if isinstance(value, StateTensor) else float(value)

    def close(self) -> None:
        """Let go of the file."""
        with suppress(BufferError):
            self._map.close()

    def _entry(self, tensor: StateTensor) -> Entry:
        if tensor.name not in self._entries:
            what = f"{tensor.name} is missing in it"
            raise _damaged(DamagedError(what, where=self.path), self.state.step)
        return self._entries[tensor.name]

    def _read_header(self) -> dict[str, Entry]:
        size, where = len(self._map), str(self.path)
        length = header_length(self._map[:8], size, where)
        return parse_header(self._map[8 : 8 + length], size, where)


def _states(run: Place) -> Place:
    return run / WEIGHTS / "value" / PRIVATE_FOLDER


def _open(state: StateFile) -> mmap.mmap:
    """Map the file of tensors and compare it with its checksum."""
    path = state.folder / state.file
    if isinstance(path, ObjectPath):
        return _fetched(state, path)
    assert isinstance(state.folder, Path), "a file and its folder are of one kind"
    descriptor = open_confined(state.folder, state.file)
    try:
        return _verified(state, descriptor)
    finally:
        os.close(descriptor)


def _fetched(state: StateFile, path: ObjectPath) -> mmap.mmap:
    """Fetch the object, and once again where its bytes are not those that were written."""
    with writing(tempfile.gettempdir()), tempfile.TemporaryFile(buffering=0) as file:
        path.copy_into(file)
        try:
            return _verified(state, file.fileno())
        except DamagedError:
            file.truncate(0)
            path.copy_into(file)
            return _verified(state, file.fileno())


def _verified(state: StateFile, descriptor: int) -> mmap.mmap:
    size = os.fstat(descriptor).st_size
    if size != state.size:  # an empty file cannot be mapped
        state.require(size, state.checksum)
    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    state.require(size, _checksum(mapped))
    return mapped


def _checksum(mapped: mmap.mmap) -> int:
    checksum = 0
    with memoryview(mapped) as view:
        for start in range(0, len(view), _PART_BYTES):
            with view[start : start + _PART_BYTES] as part:
                checksum = crc32c(part, checksum)
    return checksum


def _damaged(error: DamagedError, step: int) -> DamagedError:
    return DamagedError(
        f"the state kept after {step} updates is damaged, {error.what}",
        where=error.where,
        fix="restore the file from a copy of the run; to do without this state, remove "
        f"{KEPT_FOLDER}/{state_name(step)}",
    )
