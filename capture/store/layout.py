"""Names, paths and Zarr metadata of a run store. The prose is in README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT_VERSION = 1
ATTRIBUTES_KEY = "straightway"
ATTRIBUTES_CHECKSUM = "crc32c"
METADATA = "zarr.json"
PRIVATE_FOLDER = ".straightway"
COMMIT_LOG = "commits.jsonl"
LOCK = "lock"
FROZEN = "frozen.safetensors"
WEIGHTS = "weights"
UPDATES = "updates"
EMA = "ema"
GRADIENTS = "gradients"
SCALARS = "scalars"

# Streams whose rows are points, as w_t is, and no gradients.
ITERATES = (WEIGHTS, EMA)

# The status of a run.
RECORDING = "recording"
COMPLETE = "complete"

TARGET_CHUNK_BYTES = 4 * 2**20
CHUNK_MULTIPLE = 16

# Small arrays (coordinates, scalars) are cut into chunks of at most this many rows and about this
# many elements. The last chunk is rewritten in full up to once a second, so it stays small.
SMALL_CHUNK_ROWS = 1024
SMALL_CHUNK_ELEMENTS = 32_768


def stream_folder(stream: str) -> str:
    """Where a stream's group lies below the run: points and updates on top, the rest together."""
    return stream if stream in (*ITERATES, UPDATES) else f"{GRADIENTS}/{stream}"


def shard_key(row: int, batch: int | None) -> str:
    """Path of one shard below its `value` array."""
    return f"c/{row}/0" if batch is None else f"c/{row}/{batch}/0"


@dataclass(frozen=True)
class ChunkGrid:
    """How D coordinates are cut into inner chunks: ``n = ceil(D·itemsize / 4 MiB)`` of equal size.

    The size is rounded up to 16 elements, so that the padding of the last chunk stays tiny.
    """

    num_elements: int
    itemsize: int

    @property
    def num_chunks(self) -> int:
        """The number n of inner chunks in a shard."""
        return -(-self.num_elements * self.itemsize // TARGET_CHUNK_BYTES)

    @property
    def chunk_elements(self) -> int:
        """The number C of elements in each inner chunk, padding included."""
        exact = -(-self.num_elements // self.num_chunks)
        return -(-exact // CHUNK_MULTIPLE) * CHUNK_MULTIPLE

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk."""
        return self.chunk_elements * self.itemsize

    @property
    def padding(self) -> int:
        """Elements in the last chunk that lie beyond D."""
        return self.num_chunks * self.chunk_elements - self.num_elements

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First and one-past-last coordinate of an inner chunk, clipped to D."""
        start = chunk * self.chunk_elements
        return min(start, self.num_elements), min(start + self.chunk_elements, self.num_elements)


def group_document(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Build the `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def value_document(
    rows: int, batches: int | None, grid: ChunkGrid, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Build the `zarr.json` of a sharded `value` array ``[step, coordinate]`` or with batches."""
    middle = [] if batches is None else [batches]
    ones = [1] * (1 + len(middle))
    endian: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [*ones, grid.chunk_elements],
        "codecs": [endian],
        "index_codecs": [endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _array_document(
        shape=[rows, *middle, grid.num_elements],
        chunk_shape=[*ones, grid.num_chunks * grid.chunk_elements],
        dtype=dtype,
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        dimensions=["step", *(["batch"] if batches is not None else []), "coordinate"],
    )


def small_document(
    shape: Sequence[int], dtype: np.dtype[Any], dimensions: Sequence[str]
) -> dict[str, Any]:
    """Build the `zarr.json` of a small array; its chunks end with a crc32c that Zarr checks."""
    return _array_document(
        shape=list(shape),
        chunk_shape=[small_chunk_rows(shape[1:]), *(max(1, size) for size in shape[1:])],
        dtype=dtype,
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        dimensions=list(dimensions),
    )


def small_chunk_rows(columns: Sequence[int]) -> int:
    """Rows per chunk of a small array with these trailing sizes: 16 to 1024."""
    width = max(1, int(np.prod(columns)))
    return max(16, min(SMALL_CHUNK_ROWS, SMALL_CHUNK_ELEMENTS // width))


def _array_document(
    *,
    shape: list[int],
    chunk_shape: list[int],
    dtype: np.dtype[Any],
    codecs: list[dict[str, Any]],
    dimensions: list[str],
) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": grid,
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if dtype.kind == "f" else 0,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": dimensions,
    }
