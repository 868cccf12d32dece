"""A table in pieces: as the whole one, whatever a piece is, and never there whole."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from analyze import compute, parquet, run_table, summing
from analyze.columns import numbers, texts, values_of, words
from analyze.tables import (
    concatenate,
    measure_into,
    measure_run,
    read_table,
    write_table,
    writing_table,
)
from analyze.verdict import COLUMNS
from analyze.verdict_text import verdict
from capture.store import DamagedError
from tests.analyze.recorded import random_run, write_run
from tests.analyze.small_runs import flip

REFERENCES = ["final", "step:2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pieces")
    return [str(random_run(folder / f"{seed}.zarr", seed=seed)) for seed in range(2)]


def measure(path: Path, runs: list[str], **options: Any) -> tuple[bytes, pa.Table]:
    """The bytes of the file of several runs, and what is kept of the whole models."""
    with writing_table(path) as file:
        kept = [measure_into(file, run, REFERENCES, **options) for run in runs]
    return path.read_bytes(), concatenate(kept)


@pytest.mark.parametrize("by", ["model", "tensor", {"heads": "head"}])
def test_the_file_is_that_of_the_whole_tables(tmp_path: Path, runs: list[str], by: Any) -> None:
    found, kept = measure(tmp_path / "pieces", runs, by=by)
    tables = [measure_run(run, REFERENCES, by=["model", by]) for run in runs]
    name = by if isinstance(by, str) else "custom"
    write_table(concatenate([each[name] for each in tables]), tmp_path / "whole")
    assert found == (tmp_path / "whole").read_bytes()
    assert read_table(tmp_path / "pieces").num_rows == sum(len(each[name]) for each in tables)
    write_table(kept, tmp_path / "kept")
    write_table(concatenate([each["model"] for each in tables]), tmp_path / "models")
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "models").read_bytes()


@pytest.mark.parametrize("limits", [(1, 10**6), (10**6, 1), (40, 10**6)])
def test_pieces_change_no_byte(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]
) -> None:
    expected, _ = measure(tmp_path / "large", runs, by="layer")
    monkeypatch.setattr(run_table, "_ROWS", limits[0])
    monkeypatch.setattr(run_table, "_MOMENTS", limits[1])
    found, _ = measure(tmp_path / "small", runs, by="layer")
    assert found == expected


def test_a_piece_has_few_rows(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above means something; and a step is never cut."""
    monkeypatch.setattr(run_table, "_ROWS", 40)
    sizes: list[int] = []

    class Noting:
        num_rows = 0

        def write(self, piece: pa.Table) -> None:
            sizes.append(piece.num_rows)

        def describe(self, metadata: Any) -> None:
            pass

    file: Any = Noting()
    measure_into(file, runs[0], REFERENCES, by="layer", streams=["fixed", "minibatch"])
    # Of 7 steps with 3 batches, 3 layers and 2 references, then 6 of one batch.
    assert sizes == [36, 36, 36, 18, 36]


def test_moments_that_fill_the_memory_come_in_several_passes(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[str]] = []
    original = compute.compute_moments

    def noting(run: Any, streams: Any, references: Any, **options: Any) -> Any:
        passes.append(list(streams))
        return original(run, streams, references, **options)

    monkeypatch.setattr(compute, "compute_moments", noting)
    expected, _ = measure(tmp_path / "one", runs[:1], cache=False)
    assert passes == [["fixed", "minibatch", "updates"]]
    passes.clear()
    # Rows, batches, references, tensors, numbers: room for two of the streams, or for one.
    small = 6 * 2 * 4 * 64
    monkeypatch.setattr(summing, "_PASS_BYTES", 2 * small)
    assert measure(tmp_path / "two", runs[:1], cache=False)[0] == expected
    assert passes == [["fixed"], ["minibatch", "updates"]]
    passes.clear()
    monkeypatch.setattr(summing, "_PASS_BYTES", 1)
    kept = tmp_path / "kept"
    assert measure(tmp_path / "three", runs[:1], cache=kept)[0] == expected
    assert passes == [["fixed"], ["minibatch"], ["updates"]]
    passes.clear()
    assert measure(tmp_path / "again", runs[:1], cache=kept)[0] == expected
    assert passes == []


def test_the_verdict_needs_no_more_than_its_columns(tmp_path: Path, runs: list[str]) -> None:
    _, few = measure(tmp_path / "few", runs, keep=COLUMNS)
    _, all_of_them = measure(tmp_path / "all", runs)
    assert few.column_names == list(COLUMNS)
    assert verdict(few) == verdict(all_of_them)
    fewer = few.drop_columns(["nonfinite"])
    with pytest.raises(KeyError):
        verdict(fewer)


def test_a_run_that_cannot_be_measured_leaves_no_file(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the table was on the disk by then."""
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 10)
    bad = random_run(tmp_path / "bad.zarr")
    flip(bad / "gradients/fixed/value/c/3/0/0", -1)
    with pytest.raises(DamagedError):
        measure(tmp_path / "table.parquet", [runs[0], str(bad)], cache=False)
    assert os.listdir(tmp_path) == ["bad.zarr"]


def test_the_table_is_never_there_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what numpy and Python hold; the moments were summed before."""
    monkeypatch.setattr(run_table, "_ROWS", 64)
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 64)
    draw = np.random.default_rng(0).standard_normal
    streams = {"weights": draw((80, 25)).astype("f4"), "fixed": draw((80, 2, 25)).astype("f4")}
    run = str(write_run(tmp_path / "run.zarr", streams))
    references = [f"step:{step}" for step in range(20)]
    whole = measure_run(run, references, by=["tensor"])["tensor"]
    assert whole.num_rows == 80 * 2 * 4 * 20

    def in_pieces() -> None:
        with writing_table(tmp_path / "table") as file:
            measure_into(file, run, references, by="tensor", keep=COLUMNS)

    def held(call: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The texts are with Arrow, and not counted.
    assert held(lambda: measure_run(run, references, by=["tensor"])) > 0.9 * whole.nbytes
    # Beside the moments, an eighth of it, and what is kept of the whole model, a twentieth.
    assert held(in_pieces) < whole.nbytes / 2


# Columns from numbers and back ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_numbers_come_back_as_they_were(dtype: type) -> None:
    values = np.arange(10).astype(dtype)
    column = pa.chunked_array(
        [numbers(values[:3]), numbers(values[::2]).slice(2, 2), numbers(values[:0])]
    )
    expected = np.concatenate([values[:3], values[4:8:2]])
    assert column.to_pylist() == expected.tolist()
    back = values_of(column)
    assert back.dtype == dtype
    assert back.tolist() == expected.tolist()
    empty = values_of(pa.chunked_array([], column.type))
    assert (empty.dtype, len(empty)) == (dtype, 0)


def test_what_is_missing_is_null_and_no_number() -> None:
    missing = np.arange(20) % 3 == 1
    column = numbers(np.arange(20), missing)
    assert column.to_pylist() == [None if gone else n for n, gone in enumerate(missing)]
    with pytest.raises(AssertionError, match="null"):
        values_of(pa.chunked_array([column]))


def test_texts_are_texts_in_any_script() -> None:
    assert words(["", "γ⁰", "a" * 300]).to_pylist() == ["", "γ⁰", "a" * 300]
    found = texts(["body.0", "głowa"], np.array([1, 1, 0]))
    assert (found.type, found.to_pylist()) == (pa.string(), ["głowa", "głowa", "body.0"])
