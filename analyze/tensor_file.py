"""A safetensors file as a reference point, read without torch, bfloat16 included."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store import DamagedError, InputError, MismatchError, Run, Tensor
from capture.store.layout import WEIGHTS
from capture.store.plain import Entry, header_length, parse_header

_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_PART_BYTES = 2**24
_REMEDY = "check that it is a whole safetensors file"


class TensorFile:
    """The tensors of one file, cut like the rows of `run`.

    The file holds at least the run's trainable tensors, each under its name or an alias of it and
    in its shape, in float64, float32, float16 or bfloat16; all else in it is ignored. Safetensors
    files carry no checksums, so nothing but the header can be verified.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self._path = path
        self._run = run
        self._file = open_regular(path, "reference")
        # Also where the object is dropped before it is closed, or never comes to be.
        self._closing = weakref.finalize(self, os.close, self._file)
        found = self._read_header()
        self._entries = [self._find(tensor, found) for tensor in run.table.parameters]
        wide = any(entry.tensor.dtype == "F64" for entry in self._entries)
        self._dtype = np.dtype(np.float64 if wide else np.float32)
        # Nothing is kept: all tensors are read again whenever all chunks are asked for.
        self.bytes_to_open, self.bytes_once, self.bytes_spilled = 0, 0, 0
        self.bytes_per_pass = sum(
            np.dtype(_STORED[entry.tensor.dtype]).itemsize * tensor.numel
            for entry, tensor in zip(self._entries, run.table.parameters, strict=True)
        )

    def chunk(self, chunk: int) -> NDArray[Any]:
        """Read one inner chunk of the run: ``[C]``, float64 if any tensor is, else float32."""
        start, stop = self._run.stream(WEIGHTS).grid.bounds(chunk)
        offsets = self._run.table.offsets
        values = np.empty(stop - start, self._dtype)
        first = int(np.searchsorted(offsets, start, "right")) - 1
        for tensor in range(first, int(np.searchsorted(offsets, stop, "left"))):
            low, high = max(start, offsets[tensor]), min(stop, offsets[tensor + 1])
            part = range(int(low - offsets[tensor]), int(high - offsets[tensor]))
            values[low - start : high - start] = self._read(self._entries[tensor], part)
        return values

    def identity(self) -> str:
        """Name the file by its size and the crc32c of all its bytes."""
        size = os.fstat(self._file).st_size
        checksum = 0
        for start in range(0, size, _PART_BYTES):
            checksum = crc32c(os.pread(self._file, _PART_BYTES, start), checksum)
        return f"file of {size} bytes, crc32c {checksum:08x}"

    def close(self) -> None:
        """Close the file."""
        self._closing()

    def _read(self, entry: Entry, part: range) -> NDArray[Any]:
        stored = np.dtype(_STORED[entry.tensor.dtype])
        nbytes = len(part) * stored.itemsize
        data = os.pread(self._file, nbytes, entry.start + part.start * stored.itemsize)
        if len(data) != nbytes:
            raise DamagedError("the file shrank while it was read", where=self._path, fix=_REMEDY)
        values: NDArray[Any] = np.frombuffer(data, stored)
        if entry.tensor.dtype == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def _read_header(self) -> dict[str, Entry]:
        size, where = os.fstat(self._file).st_size, str(self._path)
        try:
            length = header_length(os.pread(self._file, 8, 0), size, where)
            return parse_header(os.pread(self._file, length, 8), size, where)
        except DamagedError as error:
            what = f"the reference is damaged, {error.what}"
            raise DamagedError(what, where=where, fix=_REMEDY) from error

    def _find(self, tensor: Tensor, found: dict[str, Entry]) -> Entry:
        """Look a tensor up by its names and compare its shape and dtype."""
        names = [name for name in (tensor.name, *tensor.aliases) if name in found]
        if not names:
            raise self._mismatch(f"{tensor.name!r} is missing")
        entry = found[names[0]]
        if entry.tensor.shape != tensor.shape:
            shapes = f"shape {list(entry.tensor.shape)}, in the run {list(tensor.shape)}"
            raise self._mismatch(f"{names[0]!r} has {shapes}")
        if entry.tensor.dtype not in _STORED:
            raise self._mismatch(
                f"{names[0]!r} has dtype {entry.tensor.dtype}, not a float of 16 to 64 bits"
            )
        return entry

    def _mismatch(self, what: str) -> MismatchError:
        return MismatchError(
            f"the reference does not fit the run, {what}",
            where=self._path,
            fix="choose a file with the tensors of this model",
        )


def open_regular(path: str | os.PathLike[str], what: str) -> int:
    """Open an ordinary file for reading and return its descriptor.

    `InputError` for anything else: a pipe would block, a device may never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(
            f"the {what} cannot be read, {reason}", where=path, fix="check the path"
        ) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "no ordinary file"
        raise InputError(f"the {what} cannot be read, it is {kind}", where=path, fix="name a file")
    return descriptor
