"""Parquet files written piece by piece: the same bytes however they are cut, or no file."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analyze import parquet
from analyze.parquet import writing_parquet
from capture.store import WriteError


def table_of(rows: int) -> pa.Table:
    draw = np.random.default_rng(0)
    fields = [
        pa.field("number", pa.float64(), False, {"unit": "1"}),
        pa.field("name", pa.string(), False),
        pa.field("batch", pa.int64(), True),
    ]
    columns = [
        pa.array(draw.standard_normal(rows)),
        pa.array([f"group {n % 7}" for n in range(rows)]),
        pa.array([None if n % 3 else n for n in range(rows)], pa.int64()),
    ]
    return pa.table(columns, schema=pa.schema(fields, {"straightway": '{"γ": 1}'}))


def write(path: Path, table: pa.Table, pieces: list[int]) -> bytes:
    """Write a table cut into pieces of these numbers of rows."""
    with writing_parquet(path, table.schema) as file:
        start = 0
        for rows in pieces:
            file.write(table.slice(start, rows))
            start += rows
        assert file.num_rows == start == table.num_rows
        file.finish(table.schema.metadata)
    return path.read_bytes()


@pytest.mark.parametrize("rows", [0, 1, 99, 100, 250])
def test_it_is_the_file_that_arrow_writes_in_one_go(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 100)
    table = table_of(rows)
    pq.write_table(table, tmp_path / "arrow", compression="zstd", row_group_size=100)
    written = write(tmp_path / "ours", table, [rows])
    assert written == (tmp_path / "arrow").read_bytes()
    back = pq.read_table(tmp_path / "ours")
    assert back.equals(table)
    assert back.schema.equals(table.schema, check_metadata=True)


@pytest.mark.parametrize("pieces", [[250], [1, 99, 150], [100, 100, 50], [7] * 35 + [5], [0, 250]])
def test_pieces_change_no_byte(
    pieces: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 100)
    table = table_of(250)
    assert write(tmp_path / "cut", table, pieces) == write(tmp_path / "whole", table, [250])
    assert pq.ParquetFile(tmp_path / "cut").num_row_groups == 3


@pytest.mark.parametrize("written", [0, 50, 250])
def test_an_error_on_the_way_leaves_what_was_there(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 100)
    path, table = tmp_path / "table.parquet", table_of(250)
    path.write_text("before")

    def interrupted() -> None:
        with writing_parquet(path, table.schema) as file:
            file.write(table.slice(0, written))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["table.parquet"]


@pytest.mark.parametrize("room", [100, 5000])
def test_a_disk_that_refuses_is_one_line(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may have so many bytes: too few for the first row group, or for the second."""
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 400)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        with pytest.raises(WriteError, match=r"larger than is allowed.*table\.parquet"):
            write(tmp_path / "table.parquet", table_of(1000), [1000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes 10 bytes at a time."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:10]))
    table = table_of(50)
    write(tmp_path / "slow", table, [50])
    assert pq.read_table(tmp_path / "slow").equals(table)
