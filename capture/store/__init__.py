"""The run store: the format, its writer and its reader. numpy, zarr and safetensors; no torch.

The format is written down in README.md beside this file.
"""

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
from capture.store.layout import ChunkGrid
from capture.store.queue import SnapshotQueue
from capture.store.reader import MappedShard, Run, Stream, open_run
from capture.store.shard import ShardLayout, Staging
from capture.store.tensors import Tensor, TensorTable
from capture.store.writer import RunWriter

__all__ = [
    "ChunkGrid",
    "DamagedError",
    "InputError",
    "LockedError",
    "MappedShard",
    "MismatchError",
    "NotARunError",
    "Run",
    "RunWriter",
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
    "WriteError",
    "export_state_dict",
    "open_run",
]
