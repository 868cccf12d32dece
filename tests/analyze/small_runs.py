"""Small runs for the tests of the second stage, written by the store's own writer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze.compute import Moments
from analyze.references import Reference
from capture.store import Run, RunWriter, Tensor, TensorTable

Values = NDArray[Any]

GRADIENTS = ("minibatch", "updates", "fixed")


def table_of(sizes: Sequence[int], dtype: str = "F32") -> TensorTable:
    """Tensors `t0`, `t1`, … of these sizes."""
    return TensorTable(
        tuple(Tensor(f"t{index}", (size,), dtype) for index, size in enumerate(sizes))
    )


def write_run(
    path: Path,
    sizes: Sequence[int],
    streams: Mapping[str, Values],
    *,
    dtype: str = "F32",
    every: int = 10,
    complete: bool = True,
) -> Path:
    """Write rows 0, 1, … of every stream as steps 0, `every`, …; ``[T, D]`` or ``[T, B, D]``."""
    table = table_of(sizes, dtype)
    batches = {name: v.shape[1] if v.ndim == 3 else None for name, v in streams.items()}
    extra = {name: count for name, count in batches.items() if name != "weights"}
    writer = RunWriter.create(path, table, streams=extra, attributes={}, frozen={})
    for name, rows in streams.items():
        staging = writer.staging(name)
        for row, values in enumerate(rows):
            for batch, vector in enumerate(np.atleast_2d(values)):
                staging.parameters[:] = vector
                number = None if batches[name] is None else batch
                writer.commit(name, staging, step=row * every, epoch=None, batch=number)
    if complete:
        writer.finish((len(streams["weights"]) - 1) * every)
    writer.close()
    return path


def random_streams(
    size: int, *, rows: int = 4, batches: int = 2, dtype: str = "f4", seed: int = 0
) -> dict[str, Values]:
    """Rows of `weights` and one row less of every stream of `GRADIENTS`; `fixed` has batches."""
    draw = np.random.default_rng(seed).standard_normal
    return {
        "weights": draw((rows, size)).astype(dtype),
        "minibatch": draw((rows - 1, size)).astype(dtype),
        "updates": draw((rows - 1, size)).astype(dtype),
        "fixed": draw((rows - 1, batches, size)).astype(dtype),
    }


def dense_moments(g: Values, w: Values, reference: Values) -> Values:
    """The seven moments of whole vectors, one line of float64 numpy each: ``[7]``."""
    g, w, e = np.float64(g), np.float64(w), np.float64(w) - np.float64(reference)
    return np.array([g @ e, g @ g, e @ e, (g * e) @ (g * e), g @ w, w @ e, w @ w])


def same_bytes(left: Moments, right: Moments) -> bool:
    pairs = [(left.streams[name], right.streams[name]) for name in left.streams]
    return list(left.streams) == list(right.streams) and all(
        a.array.tobytes() == b.array.tobytes() and a.nonfinite.tobytes() == b.nonfinite.tobytes()
        for a, b in pairs
    )


def flip(path: Path, position: int) -> None:
    """Flip one bit of a file; negative positions count from its end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def coordinates(reference: Reference, run: Run) -> NDArray[Any]:
    """All coordinates of a reference, put together from its chunks."""
    bound = reference.bind(run)
    grid = run.stream("weights").grid
    assert grid.num_chunks > 3
    parts = [bound.chunk(chunk).copy() for chunk in range(grid.num_chunks)]
    bound.close()
    return np.concatenate(parts)
