"""Ordinary safetensors files, read and written as raw bytes.

The `safetensors` library needs torch for bfloat16 and float8; the store has neither numpy dtypes
nor torch for them, and wants only the bytes. The format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from capture.store.errors import DamagedError
from capture.store.shard import ALIGNMENT
from capture.store.tensors import DTYPE_BYTES, Tensor

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; `start` and `stop` are byte offsets in the file."""

    tensor: Tensor
    start: int
    stop: int


def build(
    tensors: Iterable[tuple[Tensor, bytes | memoryview]], metadata: Mapping[str, str]
) -> bytes:
    """Build a whole safetensors file from tensors and their raw little-endian bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes | memoryview] = []
    position = 0
    for tensor, data in tensors:
        if len(data) != tensor.nbytes:
            raise ValueError(f"{tensor.name}: {len(data)} bytes, not {tensor.nbytes}")
        bounds = [position, position + len(data)]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": bounds,
        }
        parts.append(data)
        position += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def parse(data: bytes | memoryview, where: str) -> dict[str, Entry]:
    """Find the tensors of a safetensors file by name; `DamagedError` where it is none.

    Checks what the format demands: a JSON header, known dtypes, and offsets that fit the shapes
    and leave no byte of the file uncovered.
    """
    length = header_length(data[:8], len(data), where)
    return parse_header(bytes(data[8 : 8 + length]), len(data), where)


def header_length(start: bytes | memoryview, size: int, where: str) -> int:
    """Read the length of the header from the first 8 bytes of a file of `size` bytes."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise DamagedError("no safetensors file, its header is cut off", where=where)
    return length


def parse_header(header: bytes, size: int, where: str) -> dict[str, Entry]:
    """Find the tensors by name from the header of a file of `size` bytes, as `parse` does."""
    data_start = 8 + len(header)
    try:
        document = json.loads(header)
        document.pop("__metadata__", None)
        entries = {name: _entry(name, fields, data_start) for name, fields in document.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError("the safetensors header cannot be read", where=where) from error
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        sound = entry.start == position and entry.stop - entry.start == entry.tensor.nbytes
        if not sound:
            raise DamagedError(
                f"the offsets of {entry.tensor.name!r} do not fit its shape or its neighbours",
                where=where,
            )
        position = entry.stop
    if position != size:
        raise DamagedError(f"{size} bytes where the header promises {position}", where=where)
    return entries


def _entry(name: str, fields: Mapping[str, Any], data_start: int) -> Entry:
    shape = tuple(index(size) for size in fields["shape"])
    start, stop = (index(offset) for offset in fields["data_offsets"])
    if fields["dtype"] not in DTYPE_BYTES or min(shape, default=0) < 0:
        raise ValueError(name)
    return Entry(Tensor(name, shape, fields["dtype"]), data_start + start, data_start + stop)
