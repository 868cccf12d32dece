"""How fast a recorded run is measured, beside the limit of the machine and plain dask.array.

A run of 2.7 GB in the page cache: D = 11.2 M coordinates in 62 tensors (a ResNet-18), 30 rows of
weights and 30 of gradients. The ways to go through it take turns, so that a busy machine slows all
of them alike. Each `value` is the median of the turns, in GB/s of weights and gradients:

    limit      two threads add up all bytes of the mapped files, 8 at a time, nothing else
    ours       moments by tensor, every byte verified; kernels compiled before
    plain      the dask.array expression that one would write, over zarr-python on the same store
"""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr

import analyze.tables
from analyze.compute import compute_moments
from analyze.moments import GEOMETRY, MOMENTS
from analyze.references import parse_reference
from capture.store import RunWriter, Tensor, TensorTable

SIZE, TENSORS, ROWS, THREADS = 11_200_000, 62, 30, 2
TURNS, PLAIN_TURNS = 15, 2
FINAL = [parse_reference("final")]

Row = dict[str, Any]


def rows() -> Iterator[Row]:
    """Measure and give one JSON-ready row per result."""
    with tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder:
        run = write_run(Path(folder) / "run.zarr")
        yield memory(run)
        yield from throughput(run)
        yield from whole_process(run, Path(folder) / "table.parquet")


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
        for row in range(ROWS):
            np.multiply(np.roll(base, row), np.float32(1 + row / ROWS), out=staging.parameters)
            writer.commit(stream, staging, step=row, epoch=None)
    writer.finish(ROWS - 1)
    writer.close()
    return path


def throughput(run: Path) -> Iterator[Row]:
    """Three moments and all seven beside the limit and the plain expression."""
    ways: dict[str, Callable[[], object]] = {
        "limit": lambda: sum_all_bytes(run),
        "three": lambda: measure(run, GEOMETRY),
        "seven": lambda: measure(run, MOMENTS),
    }
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "plain")}
    for turn in range(TURNS):
        for name, way in ways.items():
            seconds[name].append(timed(way))
        if turn < PLAIN_TURNS:
            seconds["plain"].append(timed(lambda: plain_dask(run)))
    payload = 2 * ROWS * SIZE * 4 / 1e9
    speed = {name: payload / statistics.median(times) for name, times in seconds.items()}
    for name, count in (("limit", TURNS), ("plain", PLAIN_TURNS)):
        yield {"name": f"compute_{name}", "value": speed[name], "unit": "GB/s", "n": count}
    for name in ("three", "seven"):
        yield {
            "name": f"compute_{name}_moments_by_tensor",
            "value": speed[name],
            "unit": "GB/s",
            "ratio_to_plain_dask": speed[name] / speed["plain"],
            "ratio_to_limit": statistics.median(
                limit / ours for limit, ours in zip(seconds["limit"], seconds[name], strict=True)
            ),
            "n": TURNS,
        }


def measure(run: Path, moments: tuple[str, ...]) -> object:
    """Our own way, in threads of this process."""
    return compute_moments(run, ["minibatch"], FINAL, moments=moments, workers=THREADS)


def sum_all_bytes(run: Path) -> int:
    """The limit: add up every byte of the same files, freshly mapped."""

    def one(path: Path) -> int:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return int(np.frombuffer(view, np.uint64, len(view) // 8).sum())

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(one, sorted(run.glob("**/c/*/0"))))


def plain_dask(run: Path) -> object:
    """Three moments of whole rows as one would write them with dask.array."""
    group: Any = zarr.open_group(run, mode="r")
    w = da.from_zarr(group["weights/value"]).astype("float64")
    g = da.from_zarr(group["gradients/minibatch/value"]).astype("float64")
    e = w - w[-1]
    sums = [(g * e).sum(axis=1), (g * g).sum(axis=1), (e * e).sum(axis=1)]
    return dask.compute(*sums, scheduler="threads", num_workers=THREADS)


def memory(run: Path) -> Row:
    """The peak of memory above the mapped pages while all moments are computed."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    before = anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        measure(run, MOMENTS)
    finally:
        done.set()
        watcher.join()
    return {
        "name": "compute_memory_above_mapped_pages",
        "value": peak / 1e6,
        "unit": "MB",
        "growth": (peak - before) / 1e6,
        "n": 1,
    }


def anonymous_bytes() -> int:
    """Resident memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def whole_process(run: Path, out: Path) -> Iterator[Row]:
    """`analyze compute` from the shell: with neither kernels nor pages in a cache, then with both.

    Both sum every byte; `asked_again` finds the moments of the time before beside the run.
    """
    command = [sys.executable, "-c", "from analyze.cli import main; main()", "compute", str(run)]
    with tempfile.TemporaryDirectory(prefix="straightway-kernels-") as kernels:
        environment = {**os.environ, "NUMBA_CACHE_DIR": kernels}
        evict(run)
        for name, count in (("cold", 1), ("warm", 5), ("asked_again", 5)):
            options = [] if name == "asked_again" else ["--no-cache"]
            if not options:
                analyze.tables.measure_run(str(run))
            times = [
                timed(
                    lambda options=options: subprocess.run(
                        [*command, *options, "--out", str(out)],
                        env=environment,
                        check=True,
                        capture_output=True,
                    )
                )
                for _ in range(count)
            ]
            row = {"name": f"compute_whole_process_{name}", "value": statistics.median(times)}
            if name == "warm":
                reading = statistics.median(timed(lambda: sum_all_bytes(run)) for _ in range(TURNS))
                row["beyond_reading"] = row["value"] - reading
            yield {**row, "unit": "s", "n": count}


def evict(run: Path) -> None:
    """Ask the system to drop the run from its page cache."""
    for path in run.glob("**/c/*/0"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
