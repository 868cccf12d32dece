"""Turn one recorded step back into an ordinary safetensors checkpoint."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.store import plain
from capture.store.files import write_durably
from capture.store.frozen import read_frozen
from capture.store.layout import WEIGHTS
from capture.store.reader import Run, open_run
from capture.store.target import check_target

_STORED_AS = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}


def export_state_dict(
    path: str | os.PathLike[str], step: int, out: str | os.PathLike[str]
) -> list[str]:
    """Write the model's whole `state_dict` at `step` as a plain safetensors file.

    Every tensor has its true dtype; frozen tensors are included and no reserved name is. Tied
    tensors stand once, with ``alias: name`` in the file's metadata, as
    `safetensors.torch.save_model` writes them and `load_model` (strict) reads them.
    Returns the names written. `UnknownNameError` where the step is not recorded, `DamagedError`
    where its bytes are not as committed, `UsageError` where `out` cannot be written.
    """
    run, target = open_run(path), check_target(out)
    tensors = read_state(run, step)
    table = run.table
    wanted = (*table.parameters, *table.buffers, *table.frozen)
    data = plain.build(
        [(tensor, tensors[tensor.name]) for tensor in wanted], {"format": "pt", **table.aliases}
    )
    write_durably(target, data, target.parent)
    return [tensor.name for tensor in wanted]


def read_state(run: Run, step: int) -> dict[str, bytes]:
    """Raw little-endian bytes of every tensor at `step` in its true dtype, by stored name.

    `UnknownNameError` where the step is not recorded, `DamagedError` where bytes are not as
    committed.
    """
    weights = run.stream(WEIGHTS)
    row = weights.row_of(step)
    values = weights.read(row)
    offsets = run.table.offsets
    tensors = {
        tensor.name: narrow(values[start:stop], tensor.dtype)
        for tensor, start, stop in zip(run.table.parameters, offsets, offsets[1:], strict=False)
    }
    if run.table.buffers:
        with weights.open(row) as shard:
            _, tail = shard.read_rest()
        for name, (start, stop) in weights.layout.buffer_bounds.items():
            shift = weights.layout.value_end
            tensors[name] = tail[start - shift : stop - shift]
    return {**tensors, **read_frozen(run)}


def narrow(values: NDArray[Any], dtype: str) -> bytes:
    """Turn widened values back into their true dtype, exactly; NaN keeps being NaN."""
    if dtype == "BF16":
        # A widened bfloat16 has zeros in the lower half of each float32.
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(values, dtype=_STORED_AS[dtype]).tobytes()
