"""What is said before a measurement starts is what it then costs."""

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from analyze import tensor_file
from analyze.amounts import duration, size
from analyze.cli import main
from analyze.compute import compute_moments
from analyze.plans import project_run
from analyze.projection import project
from analyze.references import parse_reference
from capture.store import UnknownNameError, layout, open_run
from capture.store.open_shard import MappedShard
from tests.analyze.small_runs import random_streams, write_run

SIZES = (300, 1, 0, 811, 39)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of several inner chunks, with a stream of batches."""
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", 1024)
    return write_run(tmp_path / "run.zarr", SIZES, random_streams(sum(SIZES), rows=7, batches=3))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that are really taken from shards and reference files, counted where they come from.

    A chunk that is used several times while its shard is open counts once.
    """
    found: Counter[str] = Counter()
    lock = threading.Lock()
    chunk, rest, pread = MappedShard.chunk, MappedShard.verify_rest, os.pread

    def take_chunk(shard: MappedShard, number: int) -> Any:
        with lock:
            used = shard.__dict__.setdefault("used", set())
            found["bytes"] += shard.stream.grid.chunk_bytes * (number not in used)
            used.add(number)
        return chunk(shard, number)

    def take_rest(shard: MappedShard) -> None:
        with lock:
            grid = shard.stream.grid
            found["bytes"] += shard.commit.size - grid.num_chunks * grid.chunk_bytes
        rest(shard)

    def take_part(file: int, nbytes: int, place: int) -> bytes:
        with lock:
            found["bytes"] += nbytes
        return pread(file, nbytes, place)

    monkeypatch.setattr(MappedShard, "chunk", take_chunk)
    monkeypatch.setattr(MappedShard, "verify_rest", take_rest)
    monkeypatch.setattr(tensor_file.TensorFile, "_read_header", lambda self: header(self, found))
    monkeypatch.setattr(tensor_file.os, "pread", take_part)
    return found


_read_header = tensor_file.TensorFile._read_header


def header(file: Any, found: Counter[str]) -> Any:
    """Read the header of a file, which is not counted: a few bytes, once."""
    before = found["bytes"]
    entries = _read_header(file)
    found["bytes"] = before
    return entries


@pytest.mark.parametrize("references", [["final"], ["final", "mean:4", "step:10"], ["file"]])
@pytest.mark.parametrize("streams", [["minibatch"], ["weights", "fixed", "updates"]])
@pytest.mark.parametrize("options", [{}, {"workers": 5}, {"rows_per_block": 2, "workers": 1}])
def test_projected_bytes_are_those_that_are_read(
    run: Path,
    counted: Counter[str],
    references: list[str],
    streams: list[str],
    options: dict[str, Any],
) -> None:
    tensors = {f"t{i}": np.ones(n, np.float16) for i, n in enumerate(SIZES)}
    save_file(tensors, run.parent / "point.safetensors")
    names = [f"file:{run.parent}/point.safetensors" if r == "file" else r for r in references]
    parsed = [parse_reference(text) for text in names]
    projection = project(run, streams, parsed, **options)
    counted.clear()
    compute_moments(run, streams, parsed, **options)
    assert projection.bytes_to_read == counted["bytes"] > 0


def test_few_open_files_cost_the_weights_again(
    run: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of three batches in two pieces: its weights are read twice."""
    parsed = [parse_reference("final")]
    plenty = project(run, ["fixed"], parsed)
    for module in ("compute", "projection"):
        monkeypatch.setattr(f"analyze.{module}.most_open", lambda threads: 3)
    projection = project(run, ["fixed"], parsed)
    counted.clear()
    compute_moments(run, ["fixed"], parsed)
    weights = open_run(run).stream("weights").commits.sizes[:6].sum()
    assert projection.bytes_to_read == counted["bytes"] == plenty.bytes_to_read + weights


def test_rows_shards_and_spill(run: Path) -> None:
    found = project(run, ["minibatch", "fixed"], [parse_reference("mean:3")], workers=2)
    assert (found.rows, found.shards, found.threads) == (12, 6 + 18, 2)
    assert found.spilled == 5 * 4096  # five chunks, each on a page of its own
    assert found.seconds > 0
    assert found.rate > 0
    assert project(run, ["minibatch"], [parse_reference("final")]).spilled == 0


MEASURE = """
import sys
from analyze.compute import compute_moments
from analyze.projection import project
from analyze.references import parse_reference
from tests.analyze.watched import anonymous_bytes, watching
run, *references = sys.argv[1:]
references = [parse_reference(text) for text in references]
with watching(anonymous_bytes) as most:
    projection = project(run, ["minibatch", "fixed"], references, workers=2)
    compute_moments(run, ["minibatch", "fixed"], references, workers=2)
print(projection.memory, most())
"""


def test_projected_memory_is_an_upper_bound(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run.zarr", (2_500_000,), random_streams(2_500_000, rows=4))
    save_file({"t0": np.ones(2_500_000, np.float16)}, tmp_path / "point.safetensors")
    references = ["final", "mean:3", f"file:{tmp_path}/point.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run), *references],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    projected, measured = map(int, done.stdout.split())
    assert 50 * 2**20 < measured <= projected < 512 * 2**20


def test_errors_are_those_of_the_measurement(run: Path) -> None:
    with pytest.raises(UnknownNameError, match="no stream 'heldout'"):
        project(run, ["heldout"], [parse_reference("final")])


def test_what_was_summed_before_costs_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*options: str) -> str:
        with pytest.raises(SystemExit) as leaving:
            main(["compute", str(run), "--stream", "minibatch", "--plan", *options])
        assert leaving.value.code == 0
        return capsys.readouterr().out

    assert "of 6 shards, takes at most" in plan()
    assert not list(tmp_path.glob("*.moments"))  # nothing was measured
    with pytest.raises(SystemExit):
        main(["compute", str(run), "--stream", "minibatch", "--out", str(tmp_path / "t.parquet")])
    capsys.readouterr()
    assert plan() == f"{run}: all was summed before, reads nothing\n"
    assert project_run(str(run), streams=["minibatch"]) == []
    assert "of 6 shards" in plan("--no-cache")
    assert "of 6 shards, spills" in plan("--reference", "mean:2")


def test_sizes_and_times_as_one_says_them() -> None:
    assert [size(n) for n in (0, 999, 1000, 1.5e9, 2.34e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 GB",
        "2,340 TB",
    ]
    assert [duration(s) for s in (0.2, 8, 600, 12_240)] == ["a second", "8 s", "10 min", "3.4 h"]
