"""`analyze export`: files that other programs read back, number for number, or no file at all."""

import csv
import io
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr
from click.testing import Result

from analyze.dataset import FACTS, to_dataset, to_table
from analyze.export import export_inputs, export_table
from analyze.tables import concatenate, measure_run, read_metadata, write_table
from capture.store import InputError, UsageError
from tests.analyze.recorded import random_run
from tests.analyze.simulation import simulate
from tests.analyze.test_cli import analyze, in_a_process
from tests.analyze.test_dataset import ordered, same
from tests.analyze.test_verdict_tex import table_of_two

SUFFIXES = (".csv", ".parquet", ".nc", ".tex", ".zarr")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("export") / "run.zarr", epoch=lambda step: step / 4)


@pytest.fixture(scope="module")
def table(recorded: Path) -> pa.Table:
    return table_of_two(recorded)


@pytest.fixture
def folder(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, tmp_path / "runs" / "first.zarr")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# What other readers find.


def test_csv_gives_every_number_back_exactly(table: pa.Table, tmp_path: Path) -> None:
    export_table(table, tmp_path / "out.csv")
    text = (tmp_path / "out.csv").read_text(encoding="utf-8")
    assert "nan" not in text.lower().replace("final", "")
    header, *lines = csv.reader(io.StringIO(text))
    assert header == table.column_names
    assert len(lines) == table.num_rows
    for name, texts in zip(header, zip(*lines, strict=True), strict=True):
        column = table[name]
        if pa.types.is_string(column.type):
            assert list(texts) == column.to_pylist()
        elif pa.types.is_integer(column.type):
            assert [int(t) if t else None for t in texts] == column.to_pylist()
        else:
            found = np.array([float(t) if t else np.nan for t in texts])
            np.testing.assert_array_equal(found, column.to_pandas())


def test_pandas_reads_the_csv(table: pa.Table, tmp_path: Path) -> None:
    export_table(table, tmp_path / "out.csv")
    found = pd.read_csv(tmp_path / "out.csv")
    for name in table.column_names:
        if table[name].type == pa.float64():
            # Its quick parser is off by an ulp here and there, by version.
            np.testing.assert_allclose(found[name], table[name].to_numpy(), rtol=4e-16, atol=0)
        else:
            np.testing.assert_array_equal(found[name], table[name].to_pandas())


def test_csv_keeps_what_double_precision_can_hold(tmp_path: Path) -> None:
    table = simulate()
    awkward = np.array([0.1 + 0.2, 5e-324, -0.0, 1 / 3, 1.7976931348623157e308, np.inf, -np.inf])
    table = table.slice(0, len(awkward))
    place = table.column_names.index("loss")
    table = table.set_column(place, table.schema.field("loss"), pa.array(awkward))
    export_table(table, tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        found = [float(row["loss"]) for row in csv.DictReader(file)]
    assert np.array(found).tobytes() == awkward.tobytes()


def test_parquet_is_the_table_itself(table: pa.Table, tmp_path: Path) -> None:
    export_table(table, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert same(found, table)
    assert read_metadata(found) == read_metadata(table)


def expected(table: pa.Table, stream: str) -> xr.Dataset:
    return to_dataset(table, stream)


def test_netcdf_holds_the_arrays_of_every_stream(table: pa.Table, tmp_path: Path) -> None:
    export_table(table, tmp_path / "out.nc")
    with h5py.File(tmp_path / "out.nc") as file:
        assert set(file) == {"fixed", "minibatch", "updates"}
        for stream, group in file.items():
            wanted = expected(table, stream)
            assert set(group) == set(wanted.variables)
            for name, variable in wanted.variables.items():
                values = group[name].asstr()[()] if variable.dtype == object else group[name][()]
                np.testing.assert_array_equal(values, variable.values)
        assert file["minibatch/eb"].attrs["units"] == "loss/weight²"
        assert "⟨g, e⟩" in file["minibatch/cosine"].attrs["formula"]
    with xr.open_dataset(tmp_path / "out.nc", group="fixed") as data:
        xr.testing.assert_identical(data.load(), expected(table, "fixed"))
    with xr.open_datatree(tmp_path / "out.nc") as tree:
        assert same(ordered(to_table(tree)), ordered(table))


def test_large_variables_of_netcdf_are_packed(tmp_path: Path) -> None:
    table = simulate(total=2000, every=1, by_tensor=True, streams=("fixed",))
    export_table(table, tmp_path / "out.nc")
    with h5py.File(tmp_path / "out.nc") as file:
        values = file["fixed/cosine"]
        assert values.compression == "gzip"
        np.testing.assert_array_equal(values[()], to_dataset(table)["cosine"])
        assert (tmp_path / "out.nc").stat().st_size < table.nbytes / 2


def test_zarr_holds_the_arrays_of_every_stream(table: pa.Table, tmp_path: Path) -> None:
    export_table(table, tmp_path / "out.zarr")
    root: Any = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert root.metadata.zarr_format == 3
    assert set(root.group_keys()) == {"fixed", "minibatch", "updates"}
    for stream, group in root.groups():
        wanted = expected(table, stream)
        assert set(group.array_keys()) == set(wanted.variables)
        for name, variable in wanted.variables.items():
            np.testing.assert_array_equal(group[name][()], variable.values)
    with xr.open_zarr(tmp_path / "out.zarr", group="fixed", consolidated=False) as data:
        xr.testing.assert_identical(data.load(), expected(table, "fixed"))
    with xr.open_datatree(tmp_path / "out.zarr", engine="zarr", consolidated=False) as tree:
        assert same(ordered(to_table(tree)), ordered(table))


def test_zarr_opens_without_a_word(table: pa.Table, tmp_path: Path) -> None:
    """Warnings are errors here; so they are where a user's tests say so."""
    out = export_table(table, tmp_path / "out.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xr.open_zarr(out) as data:
            assert read_metadata(table) == json.loads(data.attrs[FACTS])
        for stream in ("fixed", "minibatch", "updates"):
            with xr.open_zarr(out, group=stream) as data:
                xr.testing.assert_identical(data.load(), expected(table, stream))
        with xr.open_datatree(out, engine="zarr") as tree:
            assert same(ordered(to_table(tree)), ordered(table))
        root: Any = zarr.open_group(out, mode="r")
        assert set(root.group_keys()) == {"fixed", "minibatch", "updates"}
        assert np.isfinite(root["minibatch/cosine"][()]).any()


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_facts_of_hundreds_of_runs_fit(tmp_path: Path, suffix: str) -> None:
    """HDF5 keeps attributes above 64 KiB in another place, which not every writer does."""
    parts = [simulate(f"runs/{seed}.zarr", total=40, every=20) for seed in range(300)]
    table = concatenate(parts)
    export_table(table, tmp_path / f"out{suffix}")
    if suffix == ".nc":
        with h5py.File(tmp_path / "out.nc") as file:
            text = file.attrs[FACTS]
    else:
        text = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs[FACTS]
    assert len(str(text)) > 64 * 2**10
    with xr.open_datatree(
        tmp_path / f"out{suffix}",
        **({"engine": "zarr", "consolidated": False} if suffix == ".zarr" else {}),
    ) as tree:
        assert read_metadata(to_table(tree)) == read_metadata(table)


# Where and what may be written.


def test_a_run_is_measured_and_a_table_is_read(folder: Path) -> None:
    export_inputs(["runs/first.zarr"], "run.parquet")
    found = pq.read_table("run.parquet")
    assert found["group"].unique().to_pylist() == ["model", "body.0", "head", "scale"]
    assert found["reference"].unique().to_pylist() == ["final"]
    write_table(measure_run("runs/first.zarr", ["step:2"])["model"], "table.parquet")
    export_inputs(["table.parquet"], "table.csv")
    assert same(pq.read_table("table.parquet"), measure_run("runs/first.zarr", ["step:2"])["model"])
    assert set(pd.read_csv("table.csv")["reference"]) == {"step:2"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_earlier_export_is_replaced(table: pa.Table, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix.upper()}"
    export_table(simulate(streams=("minibatch", "fixed")), out)
    before = contents(tmp_path)
    assert export_table(table, out) == out
    after = contents(tmp_path)
    assert after != before
    export_table(table, tmp_path / f"fresh{suffix}")
    fresh = {name for name in contents(tmp_path) if name.startswith("fresh")}
    assert {name.replace(out.name, f"fresh{suffix}") for name in after} == fresh


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("out.xlsx", r"'\.xlsx' names no format: out\.xlsx; end it in \.csv, \.parquet, \.nc, "),
        ("out", "a name without a suffix: out; end it in"),
        ("folder.csv", "this is a folder"),
        ("folder.zarr", "there is another folder"),
        ("group.zarr", "there is another folder"),
        ("file.zarr", "a file is in the way"),
        ("link.zarr", "a file is in the way"),
        ("runs/first.zarr", "this is a run"),
        ("runs/first.zarr/out.zarr", "inside a run"),
        ("runs/first.zarr/out.nc", "inside a run"),
        ("nowhere/out.zarr", "there is no such folder"),
        ("nowhere/out.csv", "there is no such folder"),
        ("n" * 300 + ".zarr", "no folder can be made here"),
    ],
)
def test_a_place_that_may_not_be_written_is_refused_first(
    folder: Path, out: str, words: str
) -> None:
    for name in ("folder.csv", "folder.zarr"):
        Path(name).mkdir()
        Path(name, "mine.txt").write_text("mine")
    zarr.create_group("group.zarr")
    Path("file.zarr").write_text("mine")
    Path("link.zarr").symlink_to("folder.zarr")
    before = contents(folder)
    # There is no such run: that would be the complaint if the runs had been looked at.
    done = analyze("export", "runs/none.zarr", "--out", out)
    assert done.exit_code == 2
    assert re.match(f"error: .*({words})", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(folder) == before


def test_an_input_is_not_written_over(folder: Path) -> None:
    export_inputs(["runs/first.zarr"], "t.parquet")
    Path("same.csv").hardlink_to("t.parquet")
    export_inputs(["runs/first.zarr"], "out.zarr")
    shutil.copy("t.parquet", "out.zarr/t.parquet")
    before = contents(folder)
    for arguments, words in (
        (("t.parquet", "--out", "same.csv"), "this file is an input"),
        (("out.zarr/t.parquet", "--out", "out.zarr"), "an input is in there"),
        (("runs/first.zarr", "--out", "runs/first.zarr"), "this is a run"),
    ):
        done = analyze("export", *arguments)
        assert (done.exit_code, words in done.stderr) == (2, True), done.stderr
    assert contents(folder) == before


def test_an_empty_folder_may_become_a_zarr_store(folder: Path) -> None:
    Path("out.zarr").mkdir()
    assert analyze("export", "runs/first.zarr", "--out", "out.zarr").exit_code == 0
    assert "minibatch" in zarr.open_group("out.zarr", mode="r")


def failed(done: Result, code: int, words: str) -> bool:
    return (done.exit_code, done.stderr.count("\n"), words in done.stderr) == (code, 1, True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_table_leaves_nothing_behind(folder: Path, suffix: str) -> None:
    Path("other.parquet").write_text("no table")
    write_table(simulate().slice(0, 0), "empty.parquet")
    before = contents(folder)
    for given, words in (
        ("none.parquet", "no such run or table"),
        ("other.parquet", "no table can be read"),
        ("empty.parquet", "no rows"),
    ):
        assert failed(analyze("export", given, "--out", f"out{suffix}"), 3, words)
    with pytest.raises(InputError, match="no rows"):
        export_table(simulate().slice(0, 0), f"out{suffix}")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("suffix", "earlier"),
    [*((suffix, True) for suffix in SUFFIXES), (".nc", False), (".zarr", False)],
)
def test_a_full_disk_leaves_the_earlier_export_or_nothing(
    folder: Path, suffix: str, earlier: bool
) -> None:
    write_table(simulate(streams=("minibatch", "fixed")), "t.parquet")
    if earlier:
        export_table(simulate(total=40), f"out{suffix}")
    before = contents(folder)
    limit = """
import resource, sys
sys.dont_write_bytecode = True  # Python would write cut ones, and keep them
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
    done = in_a_process("export", "t.parquet", "--out", f"out{suffix}", before=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write, the file would be larger than is allowed")
    assert done.stderr.count("\n") == 1
    assert contents(folder) == before


def test_the_example_runs_and_help_names_the_formats(folder: Path) -> None:
    example = analyze_command("export").split()
    done = analyze(*example[1:])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "runs/first.csv\n")
    assert len(pd.read_csv("runs/first.csv")) == 33 * 4
    page = analyze("export", "--help").stdout
    assert all(suffix in page for suffix in SUFFIXES)


def analyze_command(name: str) -> str:
    from analyze.cli import main

    return str(main.commands[name].example)  # type: ignore[attr-defined]


def test_a_suffix_is_asked_for_in_the_library_too() -> None:
    with pytest.raises(UsageError, match=r"'\.xls' names no format"):
        export_table(simulate(), "out.xls")


def test_the_stream_of_a_group_is_the_tables(table: pa.Table) -> None:
    own = table.filter(pc.equal(table["stream"], "updates"))
    assert same(ordered(to_table(expected(table, "updates"))), ordered(own))
