"""Make the committed old store of a format version: ``python tests/golden/make.py format-1.zarr``.

Run ONCE per format version, by the code that introduced it, and never again: every later version
must read what this one wrote. It trains nothing; all numbers are written out in the test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from capture.store import RunWriter, Tensor, TensorTable

TABLE = TensorTable(
    parameters=(
        Tensor("layer.weight", (2, 3), "F32", 0, ("tied.weight",)),
        Tensor("layer.bias", (2,), "BF16", 1),
        Tensor("scale", (), "F16", 1),
    ),
    buffers=(Tensor("norm.num_batches_tracked", (), "I64"), Tensor("mask", (3,), "BOOL")),
    frozen=(Tensor("embedding", (2,), "F32"),),
)


def make(path: Path) -> None:
    """Write three rows of weights (steps 0, 5, 10), two of gradients, and six updates."""
    frozen = np.array([0.5, -1.5], "<f4").view(np.uint8)
    writer = RunWriter.create(
        path,
        TABLE,
        streams={"minibatch": None, "fixed": 2},
        attributes={"config": {"lr": 0.1}, "seeds": {"seed": 3}},
        frozen={"embedding": frozen},
    )
    for row, step in enumerate((0, 5, 10)):
        staging = writer.staging("weights")
        staging.parameters[:] = np.arange(9) + 100 * row
        staging.buffers["norm.num_batches_tracked"][:] = np.array([step], "<i8").view(np.uint8)
        staging.buffers["mask"][:] = [1, 0, 1]
        writer.commit("weights", staging, step=step, epoch=step / 2)
        for batch in [None, 0, 1] if row < 2 else []:
            stream = "minibatch" if batch is None else "fixed"
            staging = writer.staging(stream)
            staging.parameters[:] = (np.arange(9) - 4) / (row + (batch or 0) + 1)
            writer.commit(stream, staging, step=step, epoch=step / 2, batch=batch)
    for step in range(10):
        known = {"clip_factor": 0.25} if step == 7 else {}
        norms = np.array([step, 0.5, -0.5])
        writer.append_scalars(step, {"loss": 2.0**-step, "grad_norm_by_tensor": norms, **known})
    writer.finish(10)
    writer.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
