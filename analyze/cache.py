"""Moments that were summed before: kept beside the run, so that a new question reads no weights.

    NAME.moments/STREAM-KEY.safetensors      one file per stream of the run NAME.zarr and reference

A file holds `moments` float64 ``[T, P, 7]`` or ``[T, B, P, 7]`` and `nonfinite` int64 without the
last axis, as in `analyze.moment_table.StreamMoments`; what was summed in Adam's metric lies in
``adam.STREAM-KEY.safetensors``, see `analyze.adam.Entry`. KEY is a digest of what the sums were
made of: the tensor table, the commit logs of the stream and of the weights, which hold a checksum
of every chunk, w* itself, and the optimizer's states where they matter. What belongs to other
contents has another key and is not found; a file that is damaged, or is not what its name says, is
summed again. Only streams are kept to which no row will be added.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from analyze.moment_table import MOMENTS
from capture.store import DamagedError, Run, StraightwayError
from capture.store.layout import WEIGHTS
from capture.store.place import (
    Place,
    absolute_address,
    place_of,
    read_confined,
    relative_to,
    remove,
    write_durably,
)
from capture.store.plain import build, parse
from capture.store.target import require_outside_runs
from capture.store.tensors import Tensor

logger = logging.getLogger("analyze")

# Raised whenever the same bytes would give other sums.
VERSION = 1
SUFFIX = ".moments"

_DTYPES = {"F64": np.dtype("<f8"), "I64": np.dtype("<i8")}

Where = bool | str | os.PathLike[str]


@dataclass(frozen=True)
class Entry:
    """The moments of one stream against one reference: `steps` int64 ``[T]``, else as in a file."""

    steps: NDArray[np.int64]
    moments: NDArray[np.float64]
    nonfinite: NDArray[np.int64]


class MomentsCache:
    """The kept moments of one run. Reading and keeping never fail: at worst nothing is found."""

    def __init__(self, run: Run, folder: Place) -> None:
        self.folder = folder
        self._run = run
        self._refused = False
        table = json.dumps(run.table.to_json(), sort_keys=True)
        self._common = [str(VERSION), table]
        self._logs: dict[str, str] = {}

    def content(self, stream: str, *others: str) -> str:
        """Digest of all that sums of a stream are made of, `others` included, but for w*."""
        common = [*self._common, self._log_digest(WEIGHTS), stream, self._log_digest(stream)]
        return sha256("\n".join([*common, *others]).encode()).hexdigest()

    def load(self, stream: str, reference: str) -> Entry | None:
        """Find what was kept of `stream` against the w* with this identity."""
        found = self._run.stream(stream)
        batches = () if found.batches is None else (found.batches,)
        shape = (len(found.steps), *batches, len(self._run.table.parameters))
        shapes = {"moments": (*shape, len(MOMENTS)), "nonfinite": shape}
        arrays = self.load_arrays(stream, self.content(stream), reference, shapes)
        return None if arrays is None else Entry(found.steps, **arrays)

    def save(self, stream: str, reference: str, entry: Entry) -> None:
        """Keep an entry, and forget what was kept of the stream when its contents were others."""
        arrays: dict[str, NDArray[Any]] = {"moments": entry.moments, "nonfinite": entry.nonfinite}
        self.save_arrays(stream, self.content(stream), reference, arrays)

    def load_arrays(
        self, label: str, content: str, reference: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, NDArray[Any]] | None:
        """Find the arrays that were kept under this label; `None` unless their shapes are these.

        A label is the name of a stream, or that after a word and a dot; `content` is what `content`
        gives, `reference` the identity of w*.
        """
        file = self._file(label, content, reference)
        try:
            arrays = _decode(memoryview(file.read_bytes()), self._facts(label, content, reference))
        except (OSError, StraightwayError):
            return None
        return arrays if {name: a.shape for name, a in arrays.items()} == shapes else None

    def save_arrays(
        self, label: str, content: str, reference: str, arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        """Keep float64 and int64 arrays, and forget those of the label with other contents."""
        if self._refused:
            return
        file = self._file(label, content, reference)
        try:
            if isinstance(self.folder, Path):
                self.folder.mkdir(parents=True, exist_ok=True)
            data = _encode(arrays, self._facts(label, content, reference))
            write_durably(file, data, self.folder)
            for stale in self._stale(label, content):
                remove(stale)
        except (OSError, StraightwayError) as error:
            self._refused = True
            reason = getattr(error, "what", None) or getattr(error, "strerror", None) or error
            logger.warning(
                "the moments are not kept (%s), %s; name another place with --cache DIR, or keep "
                "none with --no-cache",
                reason,
                self.folder,
            )

    def _log_digest(self, stream: str) -> str:
        if stream not in self._logs:
            path = relative_to(self._run.stream(stream).log_path, self._run.path)
            self._logs[stream] = sha256(read_confined(self._run.path, path)).hexdigest()
        return self._logs[stream]

    def _file(self, stream: str, content: str, reference: str) -> Place:
        key = sha256(f"{content}\n{reference}".encode()).hexdigest()
        return self.folder / f"{stream}-{content[:12]}-{key[:12]}.safetensors"

    def _facts(self, stream: str, content: str, reference: str) -> dict[str, str]:
        return {"stream": stream, "content": content, "reference": reference}

    def _stale(self, stream: str, content: str) -> Iterator[Place]:
        kept = f"{stream}-{content[:12]}-"
        for place in self.folder.glob(f"{stream}-*.safetensors"):
            # Names of streams may begin alike: what follows must be the two digests.
            digests = place.name.removeprefix(f"{stream}-").removesuffix(".safetensors")
            if not place.name.startswith(kept) and len(digests) == 25:
                yield place


def cache_of(run: Run, where: Where = True) -> MomentsCache | None:
    """Open the kept moments of a run: beside it, below a folder, or nowhere (`False`).

    Below a folder that was named, each run has its own, told apart by the address of the run.
    `UsageError` for a folder inside a run.
    """
    if where is False:
        return None
    address = absolute_address(run.path)
    name = run.name.removesuffix(".zarr") + SUFFIX
    if where is True:
        return MomentsCache(run, place_of(address.removesuffix(".zarr") + SUFFIX))
    mark = sha256(address.encode()).hexdigest()[:8]
    kept = place_of(where) / f"{name}-{mark}"
    if isinstance(kept, Path):
        require_outside_runs(kept)
    return MomentsCache(run, kept)


def _encode(arrays: Mapping[str, NDArray[Any]], facts: dict[str, str]) -> bytes:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    parts = [
        (Tensor(name, array.shape, names[array.dtype]), _bytes_of(array))
        for name, array in arrays.items()
    ]
    checksum = 0
    for _, data in parts:
        checksum = crc32c(data, checksum)
    return build(parts, {**facts, "crc32c": f"{checksum:08x}"})


def _decode(data: memoryview, facts: dict[str, str]) -> dict[str, NDArray[Any]]:
    """Read what `_encode` wrote, as views; `DamagedError` where it is anything else."""
    entries = parse(data, "moments")
    start = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(bytes(data[8:start]))["__metadata__"]
    if metadata != {**facts, "crc32c": f"{crc32c(data[start:]):08x}"}:
        raise DamagedError("other moments, or damaged ones")
    return {
        name: np.frombuffer(data[entry.start : entry.stop], _DTYPES[entry.tensor.dtype]).reshape(
            entry.tensor.shape
        )
        for name, entry in entries.items()
    }


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
