"""A safetensors file as a reference point, read without torch, bfloat16 included."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store import DamagedError, InputError, MismatchError, Run
from capture.store.layout import WEIGHTS

_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LONGEST_HEADER = 100_000_000
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
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                entries, self._data_start = self._read_header(file, size)
        except OSError as error:
            raise InputError(
                f"the reference cannot be read, {(error.strerror or str(error)).lower()}",
                where=path,
                fix="check the path",
            ) from error
        self._entries = [self._find(tensor, entries) for tensor in run.table.parameters]
        for entry in self._entries:
            self._check_bounds(entry, size)
        wide = any(entry["dtype"] == "F64" for entry in self._entries)
        self._dtype = np.dtype(np.float64 if wide else np.float32)

    def chunk(self, chunk: int) -> NDArray[Any]:
        """Read one inner chunk of the run: ``[C]``, float64 if any tensor is, else float32."""
        start, stop = self._run.stream(WEIGHTS).grid.bounds(chunk)
        offsets = self._run.table.offsets
        values = np.empty(stop - start, self._dtype)
        first = int(np.searchsorted(offsets, start, "right")) - 1
        with open(self._path, "rb") as file:
            for tensor in range(first, int(np.searchsorted(offsets, stop, "left"))):
                low, high = max(start, offsets[tensor]), min(stop, offsets[tensor + 1])
                part = slice(low - offsets[tensor], high - offsets[tensor])
                values[low - start : high - start] = self._read(file, tensor, part)
        return values

    def close(self) -> None:
        """Nothing stays open between chunks."""

    def _read(self, file: Any, tensor: int, part: slice) -> NDArray[Any]:
        entry = self._entries[tensor]
        stored = np.dtype(_STORED[entry["dtype"]])
        nbytes = (part.stop - part.start) * stored.itemsize
        file.seek(self._data_start + entry["data_offsets"][0] + int(part.start) * stored.itemsize)
        data = file.read(int(nbytes))
        if len(data) != nbytes:
            raise DamagedError("the file shrank while it was read", where=self._path, fix=_REMEDY)
        values: NDArray[Any] = np.frombuffer(data, stored)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def _read_header(self, file: Any, size: int) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise self._damaged("its header does not fit into the file")
        try:
            entries = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise self._damaged("its header is not JSON") from error
        if not isinstance(entries, dict):
            raise self._damaged("its header lists no tensors")
        return entries, 8 + length

    def _find(self, tensor: Any, entries: dict[str, Any]) -> dict[str, Any]:
        """Look a tensor up by its names and compare its shape and dtype."""
        names = [name for name in (tensor.name, *tensor.aliases) if name in entries]
        if not names:
            raise self._mismatch(f"{tensor.name!r} is missing")
        entry = entries[names[0]]
        if not _is_entry(entry):
            raise self._damaged(f"its entry {names[0]!r} cannot be read")
        if tuple(entry["shape"]) != tensor.shape:
            shapes = f"shape {entry['shape']}, in the run {list(tensor.shape)}"
            raise self._mismatch(f"{names[0]!r} has {shapes}")
        if entry["dtype"] not in _STORED:
            raise self._mismatch(
                f"{names[0]!r} has dtype {entry['dtype']}, not a float of 16 to 64 bits"
            )
        return dict(entry)

    def _check_bounds(self, entry: dict[str, Any], size: int) -> None:
        start, stop = entry["data_offsets"]
        nbytes = math.prod(entry["shape"]) * np.dtype(_STORED[entry["dtype"]]).itemsize
        if start < 0 or stop - start != nbytes:
            raise self._damaged("its header does not add up")
        if self._data_start + stop > size:
            raise self._damaged("it is cut short")

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"the reference is damaged, {what}", where=self._path, fix=_REMEDY)

    def _mismatch(self, what: str) -> MismatchError:
        return MismatchError(
            f"the reference does not fit the run, {what}",
            where=self._path,
            fix="choose a file with the tensors of this model",
        )


def _is_entry(entry: Any) -> bool:
    """Whether a header entry has the form that safetensors gives it."""
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    numbers = [shape, offsets] if isinstance(shape, list) and isinstance(offsets, list) else []
    plain = bool(numbers) and all(type(value) is int for part in numbers for value in part)
    return plain and len(offsets or []) == 2 and isinstance(entry.get("dtype"), str)
