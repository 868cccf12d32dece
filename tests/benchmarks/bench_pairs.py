"""How fast the rows of a run are multiplied with each other, beside a bare float32 product.

A run in the page cache: D = 11.2 M coordinates in 62 tensors (a ResNet-18), 60 rows of weights and
60 of gradients, 5.4 GB. Ours reads and verifies the rows, and adds up in float64. The ways take
turns, so that a busy machine slows all of them alike; each `value` is the median of the turns:

    bare       `a @ a.T` of float32 blocks that are in memory, cut as the run's chunks: the 60 rows
               of weights alone, or all 120 rows. Two threads take the blocks in turn, with BLAS on
               one each: at least as fast as BLAS with two, which wait for each other
    weights    ‖w_i - w_j‖² of the weights alone: PCA of the path
    stream     every product of gradients with gradients and with the steps between weights
    pairs      that, and all seven moments with a reference: all that `analyze pairs` measures
    lags       the stream at lags 1, 2, 5, 10 and 20 only
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_compute
import numpy as np

from analyze.blas import single_threaded
from analyze.compute import compute_moments
from analyze.gram import compute_gram
from capture.store import RunWriter, Tensor, TensorTable, open_run

SIZE, TENSORS, ROWS = bench_compute.SIZE, bench_compute.TENSORS, 60
THREADS, TURNS = bench_compute.THREADS, 5
LAGS = (1, 2, 5, 10, 20)
MODEL = np.zeros(TENSORS, np.int64)


def rows() -> Iterator[dict[str, Any]]:
    """Measure and give one JSON-ready row per result."""
    with tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder:
        run = write_run(Path(folder) / "run.zarr")
        one, two = blocks(run, 1), blocks(run, 2)
        ways: dict[str, Callable[[], object]] = {
            "bare_weights": lambda: bare(one),
            "weights": lambda: gram(run, "weights"),
            "bare_stream": lambda: bare(two),
            "stream": lambda: gram(run, "minibatch"),
            "pairs": lambda: (gram(run, "minibatch"), moments(run)),
            "lags": lambda: gram(run, "minibatch", LAGS),
        }
        for way in ways.values():
            way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TURNS):
            for name, way in ways.items():
                seconds[name].append(bench_compute.timed(way))
        for name, times in seconds.items():
            yield row(name, times, seconds["bare_weights" if "weights" in name else "bare_stream"])


def row(name: str, times: list[float], bare_times: list[float]) -> dict[str, Any]:
    """The median of the turns, and of the ratios of each turn."""
    ratio = statistics.median(own / bare for own, bare in zip(times, bare_times, strict=True))
    found = {"name": f"pairs_{name}", "value": statistics.median(times), "unit": "s"}
    return {**found, "ratio_to_bare_float32": ratio, "n": len(times)}


def write_run(path: Path) -> Path:
    """Write the run with the store's own writer; it stays in the page cache."""
    cuts = np.linspace(0, SIZE, TENSORS + 1).astype(int)
    table = TensorTable(
        tuple(Tensor(f"layer{i}", (int(n),), "F32") for i, n in enumerate(np.diff(cuts)))
    )
    base = np.random.default_rng(0).standard_normal(SIZE, dtype=np.float32)
    streams: dict[str, int | None] = {"minibatch": None}
    writer = RunWriter.create(path, table, streams=streams, attributes={}, frozen={})
    for stream in ("weights", "minibatch"):
        staging = writer.staging(stream)
        for number in range(ROWS):
            shift = np.float32(1 + number / ROWS)
            np.multiply(np.roll(base, number), shift, out=staging.parameters)
            writer.commit(stream, staging, step=number, epoch=None)
    writer.finish(ROWS - 1)
    writer.close()
    return path


def blocks(run: Path, streams: int) -> list[np.ndarray]:
    """Float32 blocks ``[rows, C]`` as large as those of the run; one stands for all that are equal.

    A block is larger than any cache, so that it does not matter to multiply it again and again.
    """
    grid = open_run(run).stream("weights").grid
    draw = np.random.default_rng(1).standard_normal
    one = draw((streams * ROWS, grid.chunk_elements), dtype=np.float32)
    lengths = [stop - start for start, stop in map(grid.bounds, range(grid.num_chunks))]
    return [one[:, :length] for length in lengths]


def bare(given: list[np.ndarray]) -> object:
    """What any way has to do at least, were float32 enough."""
    with single_threaded(), ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(lambda block: block @ block.T, given))


def gram(run: Path, stream: str, lags: tuple[int, ...] | None = None) -> object:
    """Our own products, in threads of this process."""
    return compute_gram(run, stream, MODEL, lags=lags, workers=THREADS)


def moments(run: Path) -> object:
    """The moments of the same rows with a reference."""
    final = [bench_compute.parse_reference("final")]
    return compute_moments(run, ["minibatch"], final, workers=THREADS)
