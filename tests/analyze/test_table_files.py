"""The table as a file: several runs in one, written, read back, and refused where it is another."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analyze.groups import GROUPINGS
from analyze.tables import (
    concatenate,
    measure_run,
    read_metadata,
    read_table,
    write_table,
)
from tests.analyze.recorded import OPTIMIZER, random_run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("tables") / "run.zarr")


@pytest.fixture(scope="module")
def tables(recorded: Path) -> dict[str, pa.Table]:
    return measure_run(str(recorded), ["final", "step:2"], by=GROUPINGS)


def test_several_runs_make_one_table(tmp_path: Path, recorded: Path) -> None:
    adam = {**OPTIMIZER, "kind": "other", "name": "Adam"}
    other = random_run(tmp_path / "other.zarr", seed=1, optimizer=adam)
    parts = [measure_run(str(path), streams=["minibatch"])["model"] for path in (recorded, other)]
    both = concatenate(parts)
    assert both.slice(0, 6).to_pandas().equals(parts[0].to_pandas())
    assert both.slice(6).to_pandas().equals(parts[1].to_pandas())
    metadata = read_metadata(both)
    assert [entry["run"] for entry in metadata["runs"]] == [str(recorded), str(other)]
    assert metadata["null"][f"{recorded}|final"].startswith("exact for SGD with momentum")
    assert metadata["null"][f"{other}|final"].startswith("no null: Adam")


def test_two_groupings_of_one_run_name_it_once(tables: dict[str, pa.Table]) -> None:
    metadata = read_metadata(concatenate([tables["model"], tables["layer"]]))
    assert len(metadata["runs"]) == 1
    assert metadata["by"] == "model+layer"


# The file.


def test_a_file_gives_the_table_back_and_equal_tables_equal_files(
    recorded: Path, tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    write_table(tables["tensor"], first)
    again = measure_run(str(recorded), ["final", "step:2"], by=["tensor"], workers=1)["tensor"]
    write_table(again, second)
    assert first.read_bytes() == second.read_bytes()
    back = read_table(first)
    assert back.schema.equals(tables["tensor"].schema, check_metadata=True)
    assert back.to_pandas().equals(tables["tensor"].to_pandas())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.parquet", "second.parquet"]


def test_units_formulas_and_facts_are_in_the_file(
    recorded: Path, tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    write_table(tables["model"], tmp_path / "table.parquet")
    found = pq.read_schema(tmp_path / "table.parquet")
    assert found.field("angle_deg").metadata[b"unit"] == b"degrees"
    assert found.field("cosine").metadata[b"formula"].decode() == "⟨g, e⟩ / (‖g‖ ‖e‖)"
    assert found.field("rsi").metadata[b"formula"].decode() == (
        "⟨g, e⟩ / ‖e‖²; g unclipped where the clip factor is known, "
        "the store keeps what entered the step"
    )
    document = json.loads(found.metadata[b"straightway"])
    assert document["sign"] == "γ > 0: a step along -g starts out towards w*."
    assert document["runs"][0]["run"] == str(recorded)
    assert document["runs"][0]["num_parameters"] == 25
    assert document["runs"][0]["final_step"] == 6
    assert document["runs"][0]["status"] == "complete"
    assert document["runs"][0]["optimizer"]["name"] == "SGD"


def test_pandas_reads_nullable_batches(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    write_table(tables["model"], tmp_path / "table.parquet")
    frame = pq.read_table(tmp_path / "table.parquet").to_pandas()
    assert frame.groupby("stream")["batch"].nunique().to_dict() == {
        "fixed": 3,
        "minibatch": 0,
        "updates": 0,
    }


def test_a_name_that_is_no_text_is_escaped(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path / "run") + b"\xff.zarr")
    random_run(Path(path))
    table = measure_run(path, ["final", f"run:{path}"], streams=["minibatch"])["model"]
    shown = f"{tmp_path / 'run'}\\xff.zarr"
    write_table(table, tmp_path / "table.parquet")
    back = read_table(tmp_path / "table.parquet")
    assert set(back["run"].to_pylist()) == {shown}
    assert set(back["reference"].to_pylist()) == {"final", f"run:{shown}"}
    assert set(read_metadata(back)["null"]) == {f"{shown}|final", f"{shown}|run:{shown}"}
