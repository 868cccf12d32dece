"""Folders of `torch.distributed.checkpoint`, read by one process.

Torch reads their `.metadata` with plain pickle, which runs whatever it says; here only the classes
that torch itself writes there are let in.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from capture.checkpoints.contents import Contents, find_state, tensor_of
from capture.checkpoints.torch_files import first_words, raw_bytes
from capture.dtypes import DTYPE_NAMES
from capture.store.errors import DamagedError, InputError

METADATA_FILE = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    _METADATA: {
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
}
_REMEDY = "check that the folder is whole"


def read_distributed(folder: Path, where: str, key: str | None) -> Contents:
    """Read the metadata of a folder of `torch.distributed.checkpoint`.

    The tensors of the `state_dict` are put together from the shards of all ranks when the first of
    them is asked for; optimizer states are left alone.
    """
    metadata = _read_metadata(folder, where)
    names = find_state(_tree(metadata, where), lambda value: isinstance(value, _Leaf), key, where)
    stored: dict[str, Any] = {
        name: metadata.state_dict_metadata[leaf] for name, leaf in names.items()
    }
    tensors = {}
    for name, entry in stored.items():
        dtype = entry.properties.dtype
        tensors[name] = tensor_of(
            name, tuple(entry.size), DTYPE_NAMES.get(dtype), str(dtype), where
        )
    loaded: dict[str, torch.Tensor] = {}

    def read(name: str) -> NDArray[np.uint8]:
        if not loaded:
            for each, entry in stored.items():
                loaded[names[each]] = torch.empty(entry.size, dtype=entry.properties.dtype)
            _load(loaded, folder, metadata, where)
        return raw_bytes(loaded[names[name]])

    return Contents(tensors, {}, read)


class _Leaf(str):
    """The flat name of a tensor in the tree of a checkpoint."""


def _tree(metadata: Metadata, where: str) -> dict[Any, Any]:
    """The nested dictionary that was saved, with the flat name of each tensor in its place."""
    tree: dict[Any, Any] = {}
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    for flat, entry in metadata.state_dict_metadata.items():
        *folders, name = paths.get(flat, (flat,))
        inner = tree
        for part in folders:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise DamagedError("the metadata contradict themselves", where=where, fix=_REMEDY)
        inner[name] = _Leaf(flat) if isinstance(entry, TensorStorageMetadata) else None
    return tree


class _Unpickler(pickle.Unpickler):
    """Lets in the classes that torch writes into `.metadata`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up an allowed class or dtype."""
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePosixPath
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _read_metadata(folder: Path, where: str) -> Metadata:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metadata = _Unpickler(io.BytesIO((folder / METADATA_FILE).read_bytes())).load()
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        words = str(error)
        if words.startswith("GLOBAL "):
            raise InputError(
                f"its .metadata are more than that, loading them would run {words[7:]}",
                where=where,
                fix="take the checkpoint from where it was saved",
            ) from error
        raise DamagedError(
            f"its .metadata cannot be read ({type(error).__name__})", where=where, fix=_REMEDY
        ) from error
    if not _is_sound(metadata):
        raise DamagedError("its .metadata are not those of torch", where=where, fix=_REMEDY)
    for info in metadata.storage_data.values():
        name = str(info.relative_path)
        if Path(name).name != name or not (folder / name).is_file():
            what = f"its .metadata name a file {name!r} that is not in the folder"
            raise DamagedError(what, where=where, fix=_REMEDY)
    sound: Metadata = metadata
    return sound


def _is_sound(metadata: Any) -> bool:
    return (
        isinstance(metadata, Metadata)
        and isinstance(getattr(metadata, "state_dict_metadata", None), dict)
        and isinstance(getattr(metadata, "storage_data", None), dict)
        and all(hasattr(info, "relative_path") for info in metadata.storage_data.values())
    )


class _Reader(FileSystemReader):
    """Torch's reader, given the metadata that were let in."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata without unpickling them again."""
        if getattr(self._metadata, "storage_meta", None) is None:
            self._metadata.storage_meta = StorageMeta()
        return self._metadata


def _load(state: dict[str, Any], folder: Path, metadata: Metadata, where: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(state, storage_reader=_Reader(folder, metadata))
    except (Exception, CheckpointException) as error:  # whatever torch says of damaged shards
        cause = _cause(error)
        if not isinstance(cause, Exception):
            raise cause from error
        raise DamagedError(
            f"torch cannot read this checkpoint ({type(cause).__name__}: {first_words(cause)})",
            where=where,
            fix=_REMEDY,
        ) from error


def _cause(error: BaseException) -> BaseException:
    """What stopped torch, out of the failures of all ranks that it puts it into."""
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            return failure
    return error
