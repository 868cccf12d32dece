"""The row of a run that a checkpoint becomes."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.checkpoints.contents import Contents
from capture.checkpoints.names import stored_names
from capture.store import DamagedError, MismatchError, Staging, Tensor, TensorTable

_STORED_AS = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}


def fill(staging: Staging, contents: Contents, table: TensorTable, where: str) -> None:
    """Copy trainable tensors, widened without loss, and buffers into a staging of `weights`."""
    bounds = zip(table.offsets, table.offsets[1:], strict=False)
    for tensor, (start, stop) in zip(table.parameters, bounds, strict=True):
        staging.parameters[start:stop] = widen(_raw(tensor, contents, where), tensor.dtype)
    for tensor in table.buffers:
        staging.buffers[tensor.name][:] = _raw(tensor, contents, where)


def frozen_bytes(
    contents: Contents, table: TensorTable, where: str
) -> dict[str, NDArray[np.uint8]]:
    """The raw bytes of every frozen tensor, uint8 ``[nbytes]``."""
    return {tensor.name: _raw(tensor, contents, where) for tensor in table.frozen}


def row_digest(staging: Staging) -> str:
    """Sha256 over the trainable values as stored and, after them, the buffers; 64 hex digits."""
    digest = sha256(staging.parameters.data.cast("B"))
    for data in staging.buffers.values():
        digest.update(data.data)
    return digest.hexdigest()


def tensor_checksums(staging: Staging, table: TensorTable) -> list[int]:
    """Crc32c of the values of each trainable tensor, ``[P]``."""
    bounds = zip(table.offsets, table.offsets[1:], strict=False)
    return [crc32c(staging.parameters[start:stop].data.cast("B")) for start, stop in bounds]


def not_finite(staging: Staging, table: TensorTable) -> dict[str, dict[str, int]]:
    """How many weights are ``nan`` and how many ``infinite``, by trainable tensor that has any.

    Buffers do not count: masks hold infinities on purpose.
    """
    found: dict[str, dict[str, int]] = {}
    bounds = zip(table.names, table.offsets, table.offsets[1:], strict=False)
    for name, start, stop in bounds:
        values = staging.parameters[start:stop]
        odd = values[~np.isfinite(values)]
        if odd.size:
            nan = int(np.count_nonzero(np.isnan(odd)))
            found[name] = {"nan": nan, "infinite": odd.size - nan}
    return found


def widen(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.floating]:
    """Turn raw bytes of a trainable dtype into numbers; bfloat16 becomes float32, exactly."""
    if dtype == "BF16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    return raw.view(_STORED_AS[dtype])


def _raw(tensor: Tensor, contents: Contents, where: str) -> NDArray[np.uint8]:
    """The bytes of a tensor; names that are tied must have the same ones."""
    first, *others = stored_names(tensor, contents)
    raw = contents.read(first)
    if raw.size != tensor.nbytes:
        raise DamagedError(f"{first!r} has {raw.size} bytes, not {tensor.nbytes}", where=where)
    for name in others:
        if not np.array_equal(raw, contents.read(name)):
            raise MismatchError(
                f"{first!r} and {name!r} are one tensor in the model or the first checkpoint, and "
                "two here",
                where=where,
                fix="import the checkpoints of one training, or give the --model that it had",
            )
    return raw
