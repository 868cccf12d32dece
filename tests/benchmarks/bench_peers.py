"""Three moments of a recorded run by every way that one would write with well-known libraries.

The run of `bench_compute`, fewer rows. Each way sums ⟨g,e⟩, ‖g‖² and ‖e‖² of every row in float64,
with as many threads as it uses by itself, and none but ours verifies a byte. The ways take turns;
`value` is the median in GB/s of weights and gradients, `ratio` that of ours to it in the same turn:

    ours                    analyze.compute, by tensor, every byte verified
    dask_zarr_python        the dask.array expression over zarr-python
    dask_zarrs              the same over zarr-python with the codec pipeline of zarrs
    tensorstore_numpy       rows read by tensorstore, sums by numpy
    safetensors_numpy       a loop over the shards as safetensors files, sums by numpy, by tensor
    safetensors_torch       the same with torch on the CPU
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_compute
import numpy as np
import safetensors.numpy
import safetensors.torch
import tensorstore
import torch
import zarr
from bench_compute import SIZE, Row, measure, plain_dask, timed, write_run

from analyze.moments import GEOMETRY

ROWS, TURNS = 8, 5


def rows() -> Iterator[Row]:
    """Measure and give one JSON-ready row per way."""
    bench_compute.ROWS = ROWS
    with tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder:
        run = write_run(Path(folder) / "run.zarr")
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: measure(run, GEOMETRY),
            "dask_zarr_python": lambda: plain_dask(run),
            "dask_zarrs": lambda: with_zarrs(run),
            "tensorstore_numpy": lambda: with_tensorstore(run),
            "safetensors_numpy": lambda: with_numpy(run),
            "safetensors_torch": lambda: with_torch(run),
        }
        for way in ways.values():
            way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TURNS):
            for name, way in ways.items():
                seconds[name].append(timed(way))
    payload = 2 * ROWS * SIZE * 4 / 1e9
    for name, times in seconds.items():
        pairs = zip(times, seconds["ours"], strict=True)
        yield {
            "name": f"peers_{name}",
            "value": payload / statistics.median(times),
            "unit": "GB/s",
            "ratio": statistics.median(other / ours for other, ours in pairs),
            "n": TURNS,
        }


def with_zarrs(run: Path) -> object:
    """The dask.array expression, its chunks decoded by zarrs."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return plain_dask(run)


def with_tensorstore(run: Path) -> list[tuple[float, float, float]]:
    """Whole rows read by tensorstore."""

    def array(stream: str) -> Any:
        store = {"driver": "file", "path": str(run / stream / "value")}
        return tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()

    weights, gradients = array("weights"), array("gradients/minibatch")
    final = weights[ROWS - 1].read().result().astype(np.float64)
    found = []
    for row in range(ROWS):
        g = gradients[row].read().result().astype(np.float64)
        e = weights[row].read().result() - final
        found.append((float(g @ e), float(g @ g), float(e @ e)))
    return found


def with_numpy(run: Path) -> list[tuple[float, float, float]]:
    """Tensor by tensor out of each shard, which is a safetensors file."""
    load = safetensors.numpy.load_file
    final = {name: value.astype(np.float64) for name, value in load(shard(run, ROWS - 1)).items()}
    found = []
    for row in range(ROWS):
        weights, gradients = load(shard(run, row)), load(shard(run, row, "gradients/minibatch"))
        sums = np.zeros(3)
        for name, gradient in gradients.items():
            if not name.startswith("__straightway__"):
                g, e = gradient.astype(np.float64), weights[name] - final[name]
                sums += g @ e, g @ g, e @ e
        found.append((float(sums[0]), float(sums[1]), float(sums[2])))
    return found


def with_torch(run: Path) -> list[tuple[float, float, float]]:
    """The same with torch, its threads and its float64."""
    load = safetensors.torch.load_file
    final = {name: value.double() for name, value in load(shard(run, ROWS - 1)).items()}
    found = []
    for row in range(ROWS):
        weights, gradients = load(shard(run, row)), load(shard(run, row, "gradients/minibatch"))
        sums = torch.zeros(3, dtype=torch.float64)
        for name, gradient in gradients.items():
            if not name.startswith("__straightway__"):
                g, e = gradient.double(), weights[name] - final[name]
                sums += torch.stack([g @ e, g @ g, e @ e])
        found.append((float(sums[0]), float(sums[1]), float(sums[2])))
    return found


def shard(run: Path, row: int, stream: str = "weights") -> Path:
    """File of one row."""
    return run / stream / "value" / "c" / str(row) / "0"
