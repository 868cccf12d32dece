"""The run store: the format, its writer and its reader. numpy, zarr and safetensors; no torch.

The format is written down in README.md beside this file. Public names are resolved when first
used, so that a command's help does not wait for numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capture.store.errors import (
        DamagedError,
        InputError,
        LockedError,
        MismatchError,
        NotARunError,
        StraightwayError,
        UnfinishedError,
        UnknownNameError,
        UnsupportedModelError,
        UsageError,
        WriteError,
    )
    from capture.store.export import export_state_dict
    from capture.store.fetched_shard import FetchedShard, fetch_ahead
    from capture.store.layout import ChunkGrid
    from capture.store.open_shard import MappedShard, Shard
    from capture.store.queue import SnapshotQueue
    from capture.store.reader import Run, Stream, open_run
    from capture.store.shard import ShardLayout, Staging
    from capture.store.tensors import Tensor, TensorTable
    from capture.store.verify import Verification, verify_run
    from capture.store.writer import RunWriter

__all__ = [
    "ChunkGrid",
    "DamagedError",
    "FetchedShard",
    "InputError",
    "LockedError",
    "MappedShard",
    "MismatchError",
    "NotARunError",
    "Run",
    "RunWriter",
    "Shard",
    "ShardLayout",
    "SnapshotQueue",
    "Staging",
    "StraightwayError",
    "Stream",
    "Tensor",
    "TensorTable",
    "UnfinishedError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UsageError",
    "Verification",
    "WriteError",
    "export_state_dict",
    "fetch_ahead",
    "open_run",
    "verify_run",
]

_HOMES = {
    "export_state_dict": "export",
    "FetchedShard": "fetched_shard",
    "fetch_ahead": "fetched_shard",
    "ChunkGrid": "layout",
    "SnapshotQueue": "queue",
    "MappedShard": "open_shard",
    "Shard": "open_shard",
    "Run": "reader",
    "Stream": "reader",
    "open_run": "reader",
    "ShardLayout": "shard",
    "Staging": "shard",
    "Tensor": "tensors",
    "TensorTable": "tensors",
    "Verification": "verify",
    "verify_run": "verify",
    "RunWriter": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
