"""The tensor table: which tensors a run records, and where each lies among the coordinates.

Axes, here and everywhere: T saved steps, B batches, D coordinates (trainable scalars), P tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store.errors import RESTORE, DamagedError

# Bytes per element of every dtype that a safetensors header can name.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}

# The dtypes that a trainable tensor may have: each widens to float32 or float64 without loss.
TRAINABLE_DTYPES = ("F32", "F64", "F16", "BF16")

# Names that the shard format keeps for itself.
RESERVED_PREFIX = "__straightway__"


@dataclass(frozen=True)
class Tensor:
    """One entry of the model's `state_dict`.

    `dtype` is the safetensors name of the tensor's true dtype, also where the store widens it.
    `group` is the optimizer's parameter group, `None` for tensors that it does not update.
    `aliases` are the further `state_dict` names of a tied tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int | None = None
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the tensor's true dtype."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorTable:
    """All tensors of a run: trainable ones in `named_parameters()` order, buffers, frozen ones.

    Coordinate i of every `value` array belongs to the trainable tensor p with
    ``offsets[p] <= i < offsets[p + 1]``.
    """

    parameters: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...] = ()
    frozen: tuple[Tensor, ...] = ()

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First coordinate of each trainable tensor and, last, D: int64 ``[P + 1]``."""
        sizes = [tensor.numel for tensor in self.parameters]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def num_parameters(self) -> int:
        """D, the number of trainable scalars."""
        return int(self.offsets[-1])

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """Float64 if any trainable tensor is, else float32; both little endian."""
        wide = any(tensor.dtype == "F64" for tensor in self.parameters)
        return np.dtype("<f8" if wide else "<f4")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the P trainable tensors."""
        return tuple(tensor.name for tensor in self.parameters)

    @property
    def aliases(self) -> dict[str, str]:
        """Every further name of a tied tensor, mapped to the name that is stored."""
        tensors = (*self.parameters, *self.buffers, *self.frozen)
        return {alias: tensor.name for tensor in tensors for alias in tensor.aliases}

    def difference(self, other: TensorTable) -> str | None:
        """Say in words where the trainable tensors of `other` first differ, `None` where nowhere.

        Names, order and shapes count; dtypes, groups, buffers and frozen tensors do not.
        """
        return first_difference(
            [(tensor.name, tensor.shape) for tensor in self.parameters],
            [(tensor.name, tensor.shape) for tensor in other.parameters],
        )

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return the table as it stands in a run's `zarr.json`, offsets and sizes included."""
        parameters = [
            {**_entry(tensor), "offset": int(offset), "numel": tensor.numel}
            for tensor, offset in zip(self.parameters, self.offsets, strict=False)
        ]
        return {
            "parameters": parameters,
            "buffers": [_entry(tensor) for tensor in self.buffers],
            "frozen": [_entry(tensor) for tensor in self.frozen],
        }

    @classmethod
    def from_json(
        cls, document: Mapping[str, Any], where: str | PathLike[str] | None = None
    ) -> TensorTable:
        """Read what `to_json` wrote; `DamagedError` where it does not add up.

        `where` is the file that the error names.
        """
        try:
            table = cls(
                *(
                    tuple(_tensor(entry) for entry in document[kind])
                    for kind in ("parameters", "buffers", "frozen")
                )
            )
            offsets = [int(entry["offset"]) for entry in document["parameters"]]
            sound = offsets == table.offsets[:-1].tolist() and table.num_parameters > 0
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"the tensor table cannot be read ({error!r})"
            raise DamagedError(what, where=where, fix=RESTORE) from error
        if not sound:
            what = "the offsets of the tensor table do not follow from its shapes"
            raise DamagedError(what, where=where, fix=RESTORE)
        names = [tensor.name for tensor in (*table.parameters, *table.buffers, *table.frozen)]
        if len(set(names)) < len(names):
            what = "the tensor table names a tensor twice"
            raise DamagedError(what, where=where, fix=RESTORE)
        return table


def first_difference(
    ours: Sequence[tuple[str, tuple[int, ...]]], theirs: Sequence[tuple[str, tuple[int, ...]]]
) -> str | None:
    """Compare two lists of (name, shape) in order; words for the first difference, or `None`."""
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine[0] != other[0]:
            return f"tensor {index} is {mine[0]!r} here and {other[0]!r} there"
        if mine[1] != other[1]:
            return f"{mine[0]!r} has shape {list(mine[1])} here and {list(other[1])} there"
    if len(ours) > len(theirs):
        return f"{ours[len(theirs)][0]!r} is missing there"
    if len(theirs) > len(ours):
        return f"{theirs[len(ours)][0]!r} is missing here"
    return None


def _entry(tensor: Tensor) -> dict[str, Any]:
    entry = asdict(tensor)
    return {**entry, "shape": list(tensor.shape), "aliases": list(tensor.aliases)}


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    shape = tuple(int(size) for size in entry["shape"])
    if min(shape, default=0) < 0 or entry["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"{entry['name']}: shape {shape}, dtype {entry['dtype']}")
    group = entry["group"]
    return Tensor(
        name=str(entry["name"]),
        shape=shape,
        dtype=str(entry["dtype"]),
        group=None if group is None else int(group),
        aliases=tuple(str(alias) for alias in entry["aliases"]),
    )
