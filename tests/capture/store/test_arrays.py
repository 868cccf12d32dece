"""Small arrays: append, flush, cut, and what a reader insists on."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.store import DamagedError
from capture.store.arrays import SmallArray, read_small
from capture.store.layout import small_chunk_rows

WIDE = 4000  # columns for which a chunk has 16 rows
FLOAT64 = np.dtype("<f8")


def make(root, columns=(WIDE,)):
    return SmallArray(root, "a", FLOAT64, ["step", "tensor"][: 1 + len(columns)], columns)


def row(number):
    return np.arange(WIDE) + 0.1 * number


@settings(max_examples=30)
@given(st.lists(st.integers(0, 20), max_size=5))
def test_rows_come_back_whatever_the_flushes(tmp_path_factory, portions):
    root = tmp_path_factory.mktemp("array")
    array = make(root)
    array.flush(root)
    for portion in portions:
        for _ in range(portion):
            array.append(row(len(array)), root)
        array.flush(root)
        expected = np.array([row(number) for number in range(len(array))]).reshape(-1, WIDE)
        np.testing.assert_array_equal(read_small(root, "a"), expected)
        np.testing.assert_array_equal(zarr.open_array(root / "a", mode="r")[:], expected)


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 17, 32, 40])
def test_a_cut_array_equals_one_that_never_went_further(tmp_path, sample, kept):
    assert small_chunk_rows((WIDE,)) == 16
    for name, count in (("long", 40), ("short", kept)):
        (tmp_path / name).mkdir()
        array = make(tmp_path / name)
        for number in range(count):
            array.append(row(number), tmp_path)
        array.flush(tmp_path)
    again = make(tmp_path / "long")
    again.load(kept, tmp_path)
    left = tmp_path / "long/a/c"
    if left.is_dir() and not any(path.is_file() for path in left.rglob("*")):
        left.rmdir()
    for path in list(left.glob("*")):
        if not any(path.iterdir()):
            path.rmdir()
    assert sample.differences(tmp_path / "long", tmp_path / "short") == []


def test_flushing_twice_writes_once(tmp_path):
    array = make(tmp_path, ())
    array.append(1.0, tmp_path)
    array.flush(tmp_path)
    before = (tmp_path / "a/zarr.json").stat().st_mtime_ns, (tmp_path / "a/c/0").stat().st_ino
    array.flush(tmp_path)
    after = (tmp_path / "a/zarr.json").stat().st_mtime_ns, (tmp_path / "a/c/0").stat().st_ino
    assert before == after


def test_zarr_fills_a_missing_chunk_silently_and_this_reader_does_not(tmp_path):
    array = make(tmp_path)
    for number in range(20):
        array.append(row(number), tmp_path)
    array.flush(tmp_path)
    (tmp_path / "a/c/0/0").unlink()
    assert np.isnan(zarr.open_array(tmp_path / "a", mode="r")[:16]).all()
    with pytest.raises(DamagedError, match="missing"):
        read_small(tmp_path, "a")
