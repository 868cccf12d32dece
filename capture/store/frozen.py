"""Frozen tensors: stored once per run, as an ordinary safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store import plain
from capture.store.errors import RESTORE, DamagedError
from capture.store.layout import FORMAT_VERSION, FROZEN, PRIVATE_FOLDER, WEIGHTS
from capture.store.place import Place, read_confined, write_durably
from capture.store.reader import Run
from capture.store.tensors import TensorTable


def write_frozen(folder: Place, table: TensorTable, frozen: Mapping[str, NDArray[np.uint8]]) -> str:
    """Write the frozen tensors from their raw bytes; return the file's crc32c as 8 hex digits."""
    tensors = [(tensor, frozen[tensor.name].tobytes()) for tensor in table.frozen]
    data = plain.build(tensors, {"format": "pt", "straightway": str(FORMAT_VERSION)})
    write_durably(folder / FROZEN, data, folder)
    return f"{crc32c(data):08x}"


def read_frozen(run: Run) -> dict[str, bytes]:
    """Read the raw bytes of the frozen tensors by name; empty where the model has none.

    `DamagedError` where the file is missing or not as written.
    """
    if not run.table.frozen:
        return {}
    relative = f"{WEIGHTS}/value/{PRIVATE_FOLDER}/{FROZEN}"
    data = read_confined(run.path, relative)
    if f"{crc32c(data):08x}" != run.attributes.get("frozen_crc32c"):
        raise DamagedError(
            "the frozen tensors do not match their checksum",
            where=run.path / relative,
            fix=RESTORE,
        )
    entries = plain.parse(data, str(run.path / relative))
    return {name: data[entry.start : entry.stop] for name, entry in entries.items()}
