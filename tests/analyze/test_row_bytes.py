"""Rows within the limits of the system and of the memory: windows give the same bytes."""

import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from analyze import row_bytes
from analyze.gram import compute_gram
from capture.store import DamagedError, layout, open_run
from tests.analyze.grams import GROUPS, SIZES, STREAMS, same_bytes
from tests.analyze.small_runs import flip, random_streams, write_run

ROOT = Path(__file__).parents[2]
ONE = np.zeros(1, np.int64)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of several chunks, each of several windows."""
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", 512)
    monkeypatch.setattr(row_bytes, "WINDOW_BYTES", 1)
    monkeypatch.setattr(row_bytes, "_MULTIPLE", 48)
    path = write_run(tmp_path / "run.zarr", SIZES, STREAMS)
    assert open_run(path).stream("weights").grid.chunk_elements == 112
    return path


def few_files(monkeypatch: pytest.MonkeyPatch, most: int = 2) -> None:
    monkeypatch.setattr("analyze.gram.most_open", lambda threads: most)


@pytest.mark.parametrize("stream", ["weights", "minibatch", "fixed"])
@pytest.mark.parametrize("lags", [None, [10, 30]], ids=["all", "lags"])
@pytest.mark.parametrize("most", [2, 7])
def test_few_files_change_no_byte(
    run: Path, monkeypatch: pytest.MonkeyPatch, stream: str, lags: list[int] | None, most: int
) -> None:
    expected = compute_gram(run, stream, GROUPS, lags=lags)
    few_files(monkeypatch, most)
    assert same_bytes(compute_gram(run, stream, GROUPS, lags=lags), expected)


@pytest.mark.parametrize("position", [12, 900, 1300, -1])
def test_one_flipped_bit_is_found_in_windows_too(
    run: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    few_files(monkeypatch)
    shard = "gradients/fixed/value/c/7/2/0"
    flip(run / shard, position)
    with pytest.raises(DamagedError, match=shard):
        compute_gram(run, "fixed", GROUPS)


def test_a_bit_of_the_padding_is_found_in_windows_too(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_files(monkeypatch)
    stream = open_run(run).stream("weights")
    assert stream.grid.padding > 0
    with stream.open(0) as shard:
        end = shard.data_start + stream.layout.value_bytes
    flip(run / "weights/value/c/0/0", end - 1)
    with pytest.raises(DamagedError, match="inner chunk 2"):
        compute_gram(run, "weights", GROUPS)


GRAM = """
import sys
import numpy as np
from analyze.gram import compute_gram
from tests.analyze.watched import open_files, watching
with watching(open_files) as most:
    for lags in (None, [10]):
        gram = compute_gram(sys.argv[1], "fixed", np.zeros(1, np.int64), lags=lags, workers=2)
        np.save(f"{sys.argv[2]}-{len(gram.pairs)}.npy", gram.sums["gd"])
print(most())
"""


def test_many_rows_and_batches_are_measured_with_few_open_files(tmp_path: Path) -> None:
    streams = random_streams(50, rows=40, batches=40)
    kept = {name: streams[name] for name in ("weights", "fixed")}
    path = write_run(tmp_path / "run.zarr", (50,), kept)
    done = subprocess.run(
        [
            *("bash", "-c", 'ulimit -n 64; exec "$0" -c "$1" "$2" "$3"'),
            *(sys.executable, GRAM, str(path), str(tmp_path / "gd")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64
    for lags in (None, [10]):
        gram = compute_gram(path, "fixed", ONE, lags=lags)
        found = np.load(tmp_path / f"gd-{len(gram.pairs)}.npy")
        assert found.tobytes() == gram.sums["gd"].tobytes()


class Counting(BaseHTTPRequestHandler):
    """Gives parts of files below `folder`, and notes which."""

    protocol_version = "HTTP/1.1"  # connections stay open
    folder: Path
    seen: list[tuple[str, int, int]]

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.seen.append((self.path, start, stop))
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Write no log."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """The address of a server that shows `tmp_path`, and the parts it was asked for."""
    seen: list[tuple[str, int, int]] = []
    handler = type("Handler", (Counting,), {"folder": tmp_path, "seen": seen})
    kind = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 64})
    server = kind(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_object_store_is_read_once_and_little_of_it_is_held(
    tmp_path: Path,
    store: tuple[str, list[tuple[str, int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """80 shards of 256 KiB chunks are 20 MiB, of which windows hold four."""
    address, seen = store
    size = 2 * 2**16 - 40
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", 2**18)
    monkeypatch.setattr(row_bytes, "WINDOW_BYTES", 2**22)
    rows = np.random.default_rng(0).standard_normal((40, size), dtype="f4")
    path = write_run(tmp_path / "run.zarr", (size,), {"weights": rows, "minibatch": rows})
    expected = compute_gram(path, "minibatch", ONE)
    tracemalloc.start()
    try:
        found = compute_gram(f"{address}/run.zarr", "minibatch", ONE, workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert same_bytes(found, expected)
    assert peak < 10 * 2**20
    grid = open_run(path).stream("weights").grid
    per_shard: dict[str, list[tuple[int, int]]] = {}
    for key, start, stop in seen:
        if "/value/c/" in key:
            per_shard.setdefault(key, []).append((start, stop))
    assert len(per_shard) == 80
    for key, parts in per_shard.items():
        # Every byte once: windows, padding, header and index lie side by side.
        ordered = sorted(parts)
        assert [start for start, _ in ordered] == [0, *(stop for _, stop in ordered[:-1])], key
        assert ordered[-1][1] == (tmp_path / key.lstrip("/")).stat().st_size
        assert max(stop - start for start, stop in parts) * 80 <= 2**22
    assert grid.num_chunks == 2


def test_damage_on_an_object_store_is_found_in_windows_too(
    tmp_path: Path,
    store: tuple[str, list[tuple[str, int, int]]],
    run: Path,
) -> None:
    address, _ = store
    shutil.copytree(run, tmp_path / "copy.zarr")
    shard = "gradients/minibatch/value/c/3/0"
    stream = open_run(run).stream("minibatch")
    with stream.open(3) as opened:
        begin, end = opened.data_start, opened.data_start + stream.layout.value_bytes
    for position in (begin + 5, begin + 500, end - 1):
        shutil.copy(run / shard, tmp_path / "copy.zarr" / shard)
        flip(tmp_path / "copy.zarr" / shard, position)
        with pytest.raises(DamagedError, match="inner chunk") as caught:
            compute_gram(f"{address}/copy.zarr", "minibatch", GROUPS)
        assert str(caught.value.where).endswith(shard)
