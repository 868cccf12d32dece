"""Long runs and tight limits: few files open at a time, nothing summed twice, nothing left."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyze import spill
from analyze.blocks import most_open, pieces
from analyze.compute import compute_moments
from analyze.references import parse_reference
from analyze.spill import SpilledChunks
from capture.store import ChunkGrid, RunWriter, WriteError, layout, log, open_run
from tests.analyze.small_runs import random_streams, same_bytes, table_of, write_run

ROOT = Path(__file__).parents[2]


def test_ten_thousand_rows_of_twelve_streams_open_without_a_shard(tmp_path: Path) -> None:
    """Logs as a run of ResNet-18 size has them; how long that takes, `make bench` measures."""
    path, rows, size = tmp_path / "run.zarr", 10_000, 11_173_962
    names = [f"s{index}" for index in range(11)]
    RunWriter.create(
        path, table_of((size,)), streams=dict.fromkeys(names), attributes={}, frozen={}
    ).close()
    chunks = tuple(f"{index:08x}" for index in range(ChunkGrid(size, 4).num_chunks))
    text = b"".join(
        log.encode(log.Commit(row, None, 3 * row, row / 9, 4 * size, "0" * 8, chunks, "0.5"))
        for row in range(rows)
    )
    for log_path in path.rglob(layout.COMMIT_LOG):
        log_path.write_bytes(text)
    streams = open_run(path).streams
    steps = [stream.steps for stream in streams.values()]
    assert len(steps) == 12
    assert all((s == 3 * np.arange(rows)).all() for s in steps)
    assert streams["s3"].commits[77].chunks == chunks


@given(
    first=st.integers(0, 5),
    rows=st.integers(1, 40),
    batches=st.integers(1, 30),
    shards=st.integers(2, 100),
)
def test_pieces_cover_a_block_once_and_open_no_more_than_allowed(
    first: int, rows: int, batches: int, shards: int
) -> None:
    found = list(pieces(range(first, first + rows), batches, shards))
    seen = [(r, b) for parts in found for some, of in parts for r in some for b in of]
    assert sorted(seen) == [(first + r, b) for r in range(rows) for b in range(batches)]
    for parts in found:
        assert len({some for some, _ in parts}) == 1
        assert all(len(some) * (1 + len(of)) <= shards for some, of in parts)


def test_what_a_process_may_open_is_shared_by_its_threads() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
        assert [most_open(threads) for threads in (1, 2, 64, 1000)] == [128, 64, 2, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


COMPUTE = """
import sys
from analyze.compute import compute_moments
from analyze.references import parse_reference
from tests.analyze.watched import open_files, watching
references = [parse_reference(text) for text in ("final", "mean:40")]
with watching(open_files) as most:
    compute_moments(sys.argv[1], ["weights", "fixed"], references, workers=2)
print(most())
"""


def test_a_run_of_many_batches_is_measured_with_few_open_files(tmp_path: Path) -> None:
    streams = random_streams(50, rows=40, batches=40)
    kept = {name: streams[name] for name in ("weights", "fixed")}
    kept["fixed"] = kept["fixed"][:5]
    path = write_run(tmp_path / "run.zarr", (50,), kept)
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 64; exec "$0" -c "$1" "$2"', sys.executable, COMPUTE, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64


def test_limits_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", 256)
    path = write_run(tmp_path / "run.zarr", (90, 1, 200), random_streams(291, rows=6, batches=5))
    references = [parse_reference(text) for text in ("final", "mean:3")]
    streams = ["weights", "minibatch", "fixed"]
    expected = compute_moments(path, streams, references)
    for shards in (2, 3, 7, 12):
        monkeypatch.setattr("analyze.compute.most_open", lambda threads, most=shards: most)
        assert same_bytes(compute_moments(path, streams, references), expected)


# Spilled references ---------------------------------------------------------------------------


def test_each_chunk_is_made_once_and_comes_back_as_it_was() -> None:
    grid, made = ChunkGrid(3_000_000, 4), []

    def make(chunk: int) -> np.ndarray:
        made.append(chunk)
        start, stop = grid.bounds(chunk)
        return np.arange(start, stop, dtype=np.float64) / 3

    for dtype in (np.float64, np.float32):
        chunks = SpilledChunks(grid, np.dtype(dtype), make)
        for number in (2, 0, 1, 2, 0):
            start, stop = grid.bounds(number)
            expected = (np.arange(start, stop) / 3).astype(dtype)
            assert chunks.chunk(number).tobytes() == expected.tobytes()
        view = chunks.chunk(1)
        chunks.close()
        assert view[0] == dtype(grid.bounds(1)[0] / 3)  # the pages outlive the file
    assert made == [2, 0, 1] * 2


def test_a_mean_is_summed_once_however_many_blocks_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path / "run.zarr", (500,), random_streams(500, rows=12))
    verified = []
    original = spill.SpilledChunks._write

    def write(self: SpilledChunks, chunk: int) -> None:
        verified.append(chunk)
        original(self, chunk)

    monkeypatch.setattr(spill.SpilledChunks, "_write", write)
    mean = [parse_reference("mean:5")]
    compute_moments(path, ["minibatch"], mean, rows_per_block=1, workers=8)
    assert verified == [0]


def test_no_room_to_spill_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "run.zarr", (500,), random_streams(500))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(WriteError, match=r"cannot write, .*nowhere"):
        compute_moments(path, ["minibatch"], [parse_reference("mean:2")])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(WriteError, match=r"no room for a reference of 4,096 bytes, 0 are free: .*"):
        compute_moments(path, ["minibatch"], [parse_reference("mean:2")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.zarr"]
