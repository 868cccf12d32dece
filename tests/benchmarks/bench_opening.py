"""What comes before the first number: opening a run of many rows, and a help page from the shell.

The logs are those of 12 streams of 10,000 rows of a ResNet-18; no shard is looked at. A help page
stands beside the bare interpreter in the same turn.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench_compute import Row, timed

from capture.store import ChunkGrid, RunWriter, Tensor, TensorTable, layout, log, open_run

TURNS, ROWS, STREAMS, SIZE = 7, 10_000, 12, 11_173_962


def rows() -> Iterator[Row]:
    """Measure and give JSON-ready rows."""
    with tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder:
        run = write_logs(Path(folder) / "run.zarr")
        taken = [timed(lambda: steps_of(run)) for _ in range(TURNS)]
        yield {
            "name": "open_long_run",
            "value": statistics.median(taken),
            "unit": "s",
            "streams": STREAMS,
            "rows": ROWS,
            "n": TURNS,
        }
    for program in ("capture", "analyze"):
        page = [sys.executable, "-c", f"from {program}.cli import main; main()", "--help"]
        bare = [sys.executable, "-c", "pass"]
        turns = [(timed(partial(call, page)), timed(partial(call, bare))) for _ in range(TURNS)]
        yield {
            "name": f"help_{program}",
            "value": statistics.median(page for page, _ in turns),
            "unit": "s",
            "over_bare_python": statistics.median(page / bare for page, bare in turns),
            "n": TURNS,
        }


def write_logs(path: Path) -> Path:
    """Write a run of which only the commit logs are there."""
    table = TensorTable((Tensor("layer", (SIZE,), "F32"),))
    streams: dict[str, int | None] = {f"s{index}": None for index in range(STREAMS - 1)}
    RunWriter.create(path, table, streams=streams, attributes={}, frozen={}).close()
    chunks = tuple(f"{index:08x}" for index in range(ChunkGrid(SIZE, 4).num_chunks))
    text = b"".join(
        log.encode(log.Commit(row, None, 3 * row, row / 9, 4 * SIZE, "0" * 8, chunks, "0.5"))
        for row in range(ROWS)
    )
    for place in path.rglob(layout.COMMIT_LOG):
        place.write_bytes(text)
    return path


def steps_of(run: Path) -> int:
    """Open a run and read the steps of every stream."""
    return sum(len(stream.steps) for stream in open_run(run).streams.values())


def call(command: list[str]) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, capture_output=True, check=True)
