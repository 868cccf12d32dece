"""How the time of a measurement grows: with coordinates, rows, batches, references and workers.

Runs of random numbers in the page cache, all seven moments by tensor, every byte verified. One
thing grows at a time from the same start; `value` is the median in seconds, `ratio` that to the
start in the same turn. With 10 fixed batches, four references stand beside one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bench_compute import Row, timed

from analyze.compute import compute_moments
from analyze.references import parse_reference
from capture.store import RunWriter, Tensor, TensorTable

TURNS, TENSORS = 5, 16
REFERENCES = [parse_reference(text) for text in ("final", "step:0", "step:1", "step:2")]


@dataclass(frozen=True)
class Case:
    """One measurement: D coordinates, T rows, B batches, R references, threads."""

    size: int = 2_000_000
    rows: int = 8
    batches: int = 1
    references: int = 1
    workers: int = 2


START = Case()
GROWTH: dict[str, list[Case]] = {
    "coordinates": [replace(START, size=factor * START.size) for factor in (1, 2, 4, 8)],
    "rows": [replace(START, rows=factor * START.rows) for factor in (1, 2, 4, 8)],
    "batches": [replace(START, batches=count) for count in (1, 2, 5, 10)],
    "references": [replace(START, references=count) for count in (1, 2, 3, 4)],
    "references_of_10_batches": [replace(START, batches=10, references=n) for n in (1, 2, 3, 4)],
    "workers": [replace(START, rows=32, workers=count) for count in (1, 2)],
}


def rows() -> Iterator[Row]:
    """Measure and give one JSON-ready row per case."""
    for what, cases in GROWTH.items():
        with tempfile.TemporaryDirectory(prefix="straightway-bench-") as folder:
            runs = [write_run(Path(folder) / f"{i}.zarr", case) for i, case in enumerate(cases)]
            pairs = list(zip(runs, cases, strict=True))
            for run, case in pairs:
                measure(run, case)
            turns = [
                [timed(lambda pair=pair: measure(*pair)) for pair in pairs] for _ in range(TURNS)
            ]
        for place, case in enumerate(cases):
            yield {
                "name": f"growth_{what}",
                "value": statistics.median(turn[place] for turn in turns),
                "unit": "s",
                "ratio": statistics.median(turn[place] / turn[0] for turn in turns),
                **vars(case),
                "n": TURNS,
            }


def measure(run: Path, case: Case) -> object:
    """All moments of one run."""
    references = REFERENCES[: case.references]
    return compute_moments(run, ["fixed"], references, workers=case.workers)


def write_run(path: Path, case: Case) -> Path:
    """Write weights and a stream with batches by the store's own writer."""
    cuts = np.linspace(0, case.size, TENSORS + 1).astype(int)
    table = TensorTable(
        tuple(Tensor(f"layer{i}", (int(n),), "F32") for i, n in enumerate(np.diff(cuts)))
    )
    base = np.random.default_rng(0).standard_normal(case.size, dtype=np.float32)
    streams: dict[str, int | None] = {"fixed": case.batches}
    writer = RunWriter.create(path, table, streams=streams, attributes={}, frozen={})
    weights, gradient = writer.staging("weights"), writer.staging("fixed")
    for row in range(case.rows):
        np.multiply(base, np.float32(1 + row / case.rows), out=weights.parameters)
        writer.commit("weights", weights, step=row, epoch=None)
        for batch in range(case.batches):
            np.multiply(base, np.float32(2 + row + batch), out=gradient.parameters)
            writer.commit("fixed", gradient, step=row, epoch=None, batch=batch)
    writer.finish(case.rows - 1)
    writer.close()
    return path
