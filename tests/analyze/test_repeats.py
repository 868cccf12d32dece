"""The same place given twice counts once, however it is written."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analyze.compare import compare_runs
from analyze.inputs import read_inputs
from analyze.methods import describe_methods
from analyze.repeats import without_repeats
from tests.analyze.recorded import random_run
from tests.analyze.test_cli import analyze


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random_run(tmp_path / "a.zarr")
    random_run(tmp_path / "b.zarr", seed=1)
    (tmp_path / "link.zarr").symlink_to("a.zarr")
    return tmp_path


def test_names_of_one_place(folder: Path) -> None:
    names = ["a.zarr", "./a.zarr", "a.zarr/", str(folder / "a.zarr"), "link.zarr", "x/../a.zarr"]
    assert without_repeats(["b.zarr", *names, "b.zarr"]) == ["b.zarr", "a.zarr"]
    assert without_repeats(reversed(names)) == ["x/../a.zarr"]
    there = [
        "s3://bucket/a.zarr",
        "s3://bucket/a.zarr//",
        "s3://bucket/b.zarr",
        "https://h/a.zarr/",
    ]
    assert without_repeats(there) == [there[0], *there[2:]]
    assert without_repeats(["a\0b", "a\0b", ""]) == ["a\0b", ""]


@pytest.mark.parametrize("command", [("compute",), ("pairs", "--lags", "1")])
def test_a_run_is_measured_once(folder: Path, command: tuple[str, ...]) -> None:
    runs = ["a.zarr", "./a.zarr", "link.zarr", "b.zarr"]
    done = analyze(*command, *runs, "--out", "t.parquet")
    assert done.exit_code == 0, done.stderr
    assert pq.read_table("t.parquet")["run"].unique().to_pylist() == ["a.zarr", "b.zarr"]
    assert analyze(*command, "a.zarr", "b.zarr", "--out", "once.parquet").stdout == done.stdout
    assert Path("once.parquet").read_bytes() == Path("t.parquet").read_bytes()


def test_a_run_and_tables_of_it_are_one(folder: Path) -> None:
    assert analyze("compute", "./a.zarr", "--out", "t.parquet").exit_code == 0
    done = analyze("compute", "link.zarr", "--reference", "step:2", "--out", "other.parquet")
    assert done.exit_code == 0
    alone = read_inputs(["a.zarr"])
    found = read_inputs(["a.zarr", "a.zarr/", "t.parquet", "./t.parquet", "other.parquet"])
    assert list(found.runs) == ["a.zarr"]
    assert set(found.nulls) == {"a.zarr|final", "a.zarr|step:2"}
    assert set(found.table["run"].to_pylist()) == {"a.zarr"}
    whole = read_inputs(["other.parquet"]).table
    assert found.table.num_rows == alone.table.num_rows + whole.num_rows
    # By the table's own name, where that is first.
    assert list(read_inputs(["t.parquet", "a.zarr"]).runs) == ["./a.zarr"]


def test_two_names_of_a_run_are_no_two_seeds(folder: Path) -> None:
    once = compare_runs(["a.zarr", "b.zarr"], ["optimizer"])
    twice = compare_runs(["a.zarr", "link.zarr", "./a.zarr", "b.zarr"], ["optimizer"])
    assert repr(twice) == repr(once)  # NaN equals nothing, itself included
    assert describe_methods(["a.zarr", "./a.zarr"]) == describe_methods(["a.zarr"])


def test_copies_are_other_places(folder: Path) -> None:
    shutil.copytree("a.zarr", "copy.zarr")
    assert without_repeats(["a.zarr", "copy.zarr"]) == ["a.zarr", "copy.zarr"]
