"""Safetensors files, read without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.checkpoints.contents import Contents, tensor_of
from capture.store.errors import DamagedError
from capture.store.plain import header_length, parse_header
from capture.store.tensors import DTYPE_BYTES

_REMEDY = "check that it is a whole safetensors file"


def read_safetensors(path: Path, where: str) -> Contents:
    """Read the header of a safetensors file; the tensors are read when asked for.

    Tied names that `safetensors.torch.save_model` or `capture export` wrote into its metadata come
    back as aliases.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            length = header_length(file.read(8), size, where)
            header = file.read(length)
            document = _refuse_dtypes(header, where)
            entries = parse_header(header, size, where)
        except DamagedError as error:
            raise DamagedError(error.what, where=where, fix=_REMEDY) from error
    tensors = {
        name: tensor_of(name, entry.tensor.shape, entry.tensor.dtype, entry.tensor.dtype, where)
        for name, entry in entries.items()
    }

    def read(name: str) -> NDArray[np.uint8]:
        entry = entries[name]
        data = np.fromfile(path, np.uint8, entry.stop - entry.start, offset=entry.start)
        if len(data) != entry.stop - entry.start:
            raise DamagedError("the file shrank while it was read", where=where, fix=_REMEDY)
        return data

    return Contents(tensors, _aliases(document, tensors), read)


def _refuse_dtypes(header: bytes, where: str) -> dict[str, Any]:
    """Parse the header so far that a dtype of a newer kind is refused by name."""
    try:
        document = json.loads(header)
    except (ValueError, RecursionError):
        return {}  # `parse_header` says what is wrong
    if not isinstance(document, dict):
        return {}
    for name, fields in document.items():
        dtype = fields.get("dtype") if isinstance(fields, dict) else None
        if name != "__metadata__" and isinstance(dtype, str) and dtype not in DTYPE_BYTES:
            tensor_of(name, (), None, dtype, where)
    return document


def _aliases(document: dict[str, Any], tensors: dict[str, Any]) -> dict[str, str]:
    metadata = document.get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {
        alias: name
        for alias, name in metadata.items()
        if isinstance(name, str) and name in tensors and alias not in tensors
    }
