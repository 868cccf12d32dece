"""The columns of the table of a measurement: their names, types, units and meaning.

And columns of Arrow from numpy's numbers and back, without pandas, which Arrow's own `array` and
`to_numpy` load: a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analyze.quantities import QUANTITIES

# Name, type, unit and meaning of the columns before and after the quantities.
_KEYS: tuple[tuple[str, Any, str, str], ...] = (
    ("run", pa.string(), "", "the run, as typed"),
    ("stream", pa.string(), "", "where the gradient or update comes from"),
    ("step", pa.int64(), "updates", "t, the updates applied before"),
    ("epoch", pa.float64(), "epochs", "passes over the data before this step"),
    ("batch", pa.int64(), "", "which of the stream's batches; null where it has one per step"),
    ("group", pa.string(), "", "the tensors that were summed over"),
    ("reference", pa.string(), "", "w*, as typed"),
    ("num_parameters", pa.int64(), "", "coordinates in the group"),
)
FROM_SCALARS = ("lr", "clip_factor")
_LAST: tuple[tuple[str, Any, str, str], ...] = (
    (
        "loss",
        pa.float64(),
        "loss",
        "mean loss of the row's own batch, else the minibatch of step t",
    ),
    ("lr", pa.float64(), "weight²/loss", "learning rate of step t, first parameter group"),
    ("clip_factor", pa.float64(), "1", "gradient of the step / unclipped one; NaN unknown"),
    ("nonfinite", pa.int64(), "", "NaN or infinite coordinates of w, g or w* in the group"),
)
_NULLABLE = ("epoch", "batch")


def schema() -> pa.Schema:
    """List the columns of the table, with units and formulas; no file metadata."""
    quantities = [(q.name, pa.float64(), q.unit, q.formula) for q in QUANTITIES]
    return pa.schema(
        pa.field(name, kind, name in _NULLABLE, {"unit": unit, "formula": formula})
        for name, kind, unit, formula in (*_KEYS, *quantities, *_LAST)
    )


def numbers(values: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Make a column of float64 or int64 ``[N]``; null where a number is `missing`."""
    data = pa.py_buffer(np.ascontiguousarray(values))
    known = None if missing is None else pa.py_buffer(np.packbits(~missing, bitorder="little"))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [known, data])


def words(texts: Sequence[str]) -> pa.Array:
    """Make a column of texts."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    data = pa.py_buffer(b"".join(encoded))
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), data)


def texts(names: Sequence[str], index: NDArray[Any]) -> pa.Array:
    """Make a column of names by their number; `index` is int ``[N]``."""
    return words(names).take(numbers(index))


def values_of(column: pa.ChunkedArray) -> NDArray[Any]:
    """Give the numbers of a column that has no null, float64 or int64 ``[N]``; read only."""
    assert not column.null_count, "a null is no number"
    kind = np.dtype(column.type.to_pandas_dtype())
    parts = [
        np.frombuffer(chunk.buffers()[1], kind, len(chunk), chunk.offset * kind.itemsize)
        for chunk in column.chunks
        if len(chunk)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, kind), *parts])
