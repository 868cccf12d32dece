"""What is no table of ours is refused in one line, whatever its facts and columns hold."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analyze.tables import measure_run, read_metadata, read_table, write_table
from capture.store import InputError
from tests.analyze.recorded import random_run


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    path = random_run(tmp_path_factory.mktemp("metadata") / "run.zarr")
    return measure_run(str(path), streams=["minibatch"])["model"]


@pytest.mark.parametrize("content", [b"", b"PAR1 no table", None])
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "table.parquet"
    if content is None:
        pq.write_table(pa.table({"cosine": [1.0]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"table.*table\.parquet"):
        read_table(path)


def test_a_table_of_another_version_is_refused(table: pa.Table, tmp_path: Path) -> None:
    document = {**read_metadata(table), "table": 99}
    newer = table.replace_schema_metadata({"straightway": json.dumps(document)})
    write_table(newer, tmp_path / "table.parquet")
    with pytest.raises(InputError, match="not a table of this version"):
        read_table(tmp_path / "table.parquet")


def rewritten(table: pa.Table, path: Path, **changes: Any) -> Path:
    """A table's file with other facts; `None` takes one out."""
    document = {k: v for k, v in {**read_metadata(table), **changes}.items() if v is not None}
    write_table(table.replace_schema_metadata({"straightway": json.dumps(document)}), path)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": 3}, "its facts of the runs are damaged"),
        ({"runs": []}, "a run is missing in its facts"),
        ({"runs": [{"run": 1}]}, "its facts of the runs are damaged"),
        ({"null": None}, "its facts 'null' are damaged"),
        ({"null": {"a": None}}, "its facts 'null' are damaged"),
        ({"nan": [1]}, "its facts 'nan' are damaged"),
        ({"version": None}, "its facts are damaged"),
    ],
)
def test_facts_of_a_wrong_form_are_refused_in_one_line(
    table: pa.Table, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = rewritten(table, tmp_path / "table.parquet", **changes)
    with pytest.raises(InputError, match=f"{words}.*; make it again from the run") as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "its facts cannot be read"),
        ("[" * 100_000, "its facts cannot be read"),
        ("[]", "it is of another version"),
        (b"\xff", "its facts cannot be read"),
    ],
)
def test_facts_that_are_no_document_are_refused(
    table: pa.Table, tmp_path: Path, text: str | bytes, words: str
) -> None:
    path = tmp_path / "table.parquet"
    write_table(table.replace_schema_metadata({"straightway": text}), path)
    with pytest.raises(InputError, match=words):
        read_table(path)


def test_columns_of_another_kind_are_refused(table: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    count, place = table.num_rows, table.column_names.index("cosine")
    for values in (pa.array(["x"] * count), pa.nulls(count, pa.float64())):
        write_table(table.set_column(place, "cosine", values), path)
        with pytest.raises(InputError, match="its column 'cosine' is of another kind"):
            read_table(path)
    write_table(table.drop_columns(["z"]), path)
    with pytest.raises(InputError, match="its columns are others"):
        read_table(path)


def test_a_pipe_or_a_folder_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no ordinary file"):
        read_table(tmp_path / "pipe")
    with pytest.raises(InputError, match="a directory"):
        read_table(tmp_path)
