"""The every-step scalars: one small array per name, float64, row t for update t."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from capture.store.arrays import SmallArray, read_small
from capture.store.errors import UsageError
from capture.store.layout import METADATA, SCALARS
from capture.store.place import Place, list_folder, remove

_FLOAT64: np.dtype[Any] = np.dtype("<f8")


class ScalarsWriter:
    """The every-step scalars: one small array per name, all of the same length."""

    def __init__(self, root: Place, scratch: Place) -> None:
        self._root = root
        self._scratch = scratch
        self._arrays: dict[str, SmallArray] = {}
        self._steps = 0
        self._flushed = 0

    def append(self, step: int, values: Mapping[str, float | NDArray[Any]]) -> None:
        """Add the values of update `step`; a name without a value at this step gets NaN."""
        if step != self._steps:
            raise ValueError(f"scalars of step {step} where step {self._steps} is next")
        for name, value in values.items():
            if name not in self._arrays:
                self._add(name, np.shape(value))
        for name, array in self._arrays.items():
            array.append(values.get(name, np.nan), self._scratch)
        self._steps += 1

    def flush(self) -> None:
        """Bring every array on disk up to date."""
        for array in self._arrays.values():
            array.flush(self._scratch)
        self._flushed = self._steps

    def truncate(self, step: int) -> None:
        """Keep the first `step` updates."""
        self._steps = min(step, self._steps)
        for array in self._arrays.values():
            array.load(self._steps, self._scratch)
        self._flushed = self._steps

    def recover(self) -> None:
        """Find the stored arrays; they are as long as the shortest of them."""
        lengths = []
        for folder in list_folder(self._root / SCALARS):
            if not folder.is_dir():
                continue
            if not (folder / METADATA).exists():
                # A crash came before its first shape: none of its values was flushed yet.
                remove(folder)
                continue
            stored = read_small(self._root, f"{SCALARS}/{folder.name}")
            self._arrays[folder.name] = self._make(folder.name, stored.shape[1:])
            lengths.append(len(stored))
        self._steps = min(lengths, default=0)
        self.truncate(self._steps)

    def digests(self) -> dict[str, str]:
        """Crc32c of the values of every scalar, by name, as 8 hexadecimal digits."""
        names = sorted(self._arrays)
        stored = {name: read_small(self._root, f"{SCALARS}/{name}") for name in names}
        return {name: f"{crc32c(values.tobytes()):08x}" for name, values in stored.items()}

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        if not name or name.startswith(".") or "/" in name or name == METADATA:
            raise UsageError(f"{name!r} cannot be the name of a scalar", fix="use letters and _")
        array = self._arrays[name] = self._make(name, shape)
        # It is on disk before any other array grows: after a crash the shortest array tells how far
        # the scalars are whole, and one that is not there at all would not be missed.
        for _ in range(self._flushed):
            array.append(np.nan, self._scratch)
        array.flush(self._scratch)
        for _ in range(self._flushed, self._steps):
            array.append(np.nan, self._scratch)

    def _make(self, name: str, shape: tuple[int, ...]) -> SmallArray:
        column = {"grad_norm_by_tensor": "tensor", "update_norm_by_tensor": "tensor"}
        dimensions = ["step", *[column.get(name, "group")] * len(shape)]
        return SmallArray(self._root, f"{SCALARS}/{name}", _FLOAT64, dimensions, shape)
