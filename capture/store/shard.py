"""One shard: a file that is a Zarr v3 shard and a safetensors file at the same time.

    8-byte header length │ JSON header, space-padded │ tensors │ padding │ buffers │ Zarr index

The header has the same length for every step, so all shards of a stream have one layout, and the
staging buffer that training copies into is already the image of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store.files import DIRECT_BLOCK
from capture.store.layout import FORMAT_VERSION, WEIGHTS, ChunkGrid
from capture.store.tensors import RESERVED_PREFIX, TensorTable

ALIGNMENT = 64
PADDING_NAME = f"{RESERVED_PREFIX}.padding"
INDEX_NAME = f"{RESERVED_PREFIX}.index"
MAX_INT64 = 2**63 - 1

_DTYPE_NAMES = {"float32": "F32", "float64": "F64"}


class ShardLayout:
    """Where everything lies in the shards of one stream.

    Byte offsets count from the start of the file. Gradient and update shards name the trainable
    tensors; shards of `weights` name the model's persistent buffers as well.
    """

    def __init__(self, stream: str, table: TensorTable, batches: int | None = None) -> None:
        self.stream = stream
        self.table = table
        self.batches = batches
        self.dtype = table.value_dtype
        self.grid = ChunkGrid(table.num_parameters, self.dtype.itemsize)
        self.buffers = table.buffers if stream == WEIGHTS else ()
        self.value_bytes = self.grid.num_chunks * self.grid.chunk_bytes
        self.buffer_bytes = sum(tensor.nbytes for tensor in self.buffers)
        self.index_bytes = 16 * self.grid.num_chunks + 4

    def data_start_in(self, size: int) -> int:
        """Byte at which coordinate 0 stands in a shard of `size` bytes: only headers differ."""
        return size - self.value_bytes - self.buffer_bytes - self.index_bytes

    @cached_property
    def data_start(self) -> int:
        """Byte at which coordinate 0 stands; a multiple of 64."""
        widest = self._json(MAX_INT64, None if self.batches is None else MAX_INT64)
        return -(-(8 + len(widest)) // ALIGNMENT) * ALIGNMENT

    @property
    def value_end(self) -> int:
        """Byte after the last inner chunk, padding included."""
        return self.data_start + self.value_bytes

    @cached_property
    def buffer_bounds(self) -> dict[str, tuple[int, int]]:
        """First and one-past-last byte of every buffer."""
        bounds, position = {}, self.value_end
        for tensor in self.buffers:
            bounds[tensor.name] = (position, position + tensor.nbytes)
            position += tensor.nbytes
        return bounds

    @property
    def index_start(self) -> int:
        """Byte at which the Zarr index stands; it ends the file."""
        return self.value_end + self.buffer_bytes

    @property
    def size(self) -> int:
        """Bytes of every shard of this stream."""
        return self.index_start + self.index_bytes

    def header(self, step: int, batch: int | None = None) -> bytes:
        """Build the first `data_start` bytes of the shard of this step."""
        text = self._json(step, batch).ljust(self.data_start - 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def index(self) -> bytes:
        """The Zarr shard index: (offset, nbytes) of each inner chunk as uint64, then its crc32c."""
        entries = np.empty((self.grid.num_chunks, 2), dtype="<u8")
        entries[:, 0] = self.data_start + self.grid.chunk_bytes * np.arange(self.grid.num_chunks)
        entries[:, 1] = self.grid.chunk_bytes
        body = entries.tobytes()
        return body + crc32c(body).to_bytes(4, "little")

    def _json(self, step: int, batch: int | None) -> bytes:
        metadata = {"format": "pt", "straightway": str(FORMAT_VERSION), "stream": self.stream}
        metadata["step"] = str(step)
        if batch is not None:
            metadata["batch"] = str(batch)
        if self.stream == WEIGHTS and self.table.aliases:
            metadata["aliases"] = json.dumps(self.table.aliases, separators=(",", ":"))
        document: dict[str, Any] = {"__metadata__": metadata, **self._entries()}
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()

    def _entries(self) -> dict[str, dict[str, Any]]:
        """List everything after the header, without holes, as safetensors demands."""
        entries: dict[str, dict[str, Any]] = {}
        position = 0

        def add(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
            nonlocal position
            bounds = [position, position + nbytes]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": bounds}
            position += nbytes

        for tensor in self.table.parameters:
            nbytes = tensor.numel * self.dtype.itemsize
            add(tensor.name, _DTYPE_NAMES[self.dtype.name], list(tensor.shape), nbytes)
        padding = self.grid.padding * self.dtype.itemsize
        if padding:
            add(PADDING_NAME, "U8", [padding], padding)
        for tensor in self.buffers:
            add(tensor.name, tensor.dtype, list(tensor.shape), tensor.nbytes)
        add(INDEX_NAME, "U8", [self.index_bytes], self.index_bytes)
        return entries


class Staging:
    """A reusable host buffer that is the image of one shard file.

    `parameters` is a writeable view, value dtype ``[D]``; `buffers` maps each persistent buffer
    to a writeable view of its raw bytes, uint8 ``[nbytes]`` (empty for all but `weights`).
    """

    def __init__(self, layout: ShardLayout) -> None:
        self.layout = layout
        # Aligned for writing without the page cache, and touched now, so that no page fault holds
        # the training thread.
        block = np.zeros(layout.size + DIRECT_BLOCK, dtype=np.uint8)
        block.fill(0)
        start = -block.ctypes.data % DIRECT_BLOCK
        self.image: NDArray[np.uint8] = block[start : start + layout.size]
        self.image[layout.index_start :] = np.frombuffer(layout.index, dtype=np.uint8)
        values = self.image[layout.data_start : layout.value_end].view(layout.dtype)
        self.parameters: NDArray[Any] = values[: layout.grid.num_elements]
        self.buffers: Mapping[str, NDArray[np.uint8]] = {
            name: self.image[start:stop] for name, (start, stop) in layout.buffer_bounds.items()
        }

    def seal(self, step: int, batch: int | None = None) -> tuple[list[str], str]:
        """Write the header; return the checksums of each inner chunk and of all the rest.

        Each checksum is a crc32c as 8 hexadecimal digits.
        """
        layout = self.layout
        header = layout.header(step, batch)
        self.image[: layout.data_start] = np.frombuffer(header, dtype=np.uint8)
        return checksums(self.image, layout.data_start, layout.grid)


def checksums(image: NDArray[np.uint8], data_start: int, grid: ChunkGrid) -> tuple[list[str], str]:
    """Crc32c of each inner chunk of a shard and of everything else in it, as 8 hex digits each."""
    view = image.data
    chunks = []
    for chunk in range(grid.num_chunks):
        start = data_start + chunk * grid.chunk_bytes
        chunks.append(f"{crc32c(view[start : start + grid.chunk_bytes]):08x}")
    return chunks, rest_checksum(view, data_start, grid)


def rest_checksum(view: memoryview, data_start: int, grid: ChunkGrid) -> str:
    """Crc32c of a shard's header, buffers and index, as 8 hex digits."""
    value_end = data_start + grid.num_chunks * grid.chunk_bytes
    return f"{crc32c(view[value_end:], crc32c(view[:data_start])):08x}"
