"""Reference points: the five forms, what each gives, and what is refused in which words."""

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from analyze.references import (
    FileReference,
    FinalReference,
    MeanReference,
    RunReference,
    StepReference,
    end_of_path,
    parse_reference,
)
from capture.store import (
    DamagedError,
    MismatchError,
    NotARunError,
    Run,
    UnfinishedError,
    UnknownNameError,
    UsageError,
    layout,
    open_run,
)
from tests.analyze.small_runs import coordinates, random_streams, write_run

SIZES = (60, 1, 0, 200, 39)
SIZE = sum(SIZES)
WEIGHTS = random_streams(SIZE)["weights"]  # rows 0 to 3 as steps 0, 10, 20, 30


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Cut even these small runs into several inner chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", 256)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("references") / "run.zarr"
    return open_run(write_run(path, SIZES, {"weights": WEIGHTS}))


def test_every_form_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    assert parse_reference("final") == FinalReference("final")
    assert parse_reference("step:0") == StepReference("step:0", 0)
    assert parse_reference("mean:5") == MeanReference("mean:5", 5)
    assert parse_reference("run:a.zarr") == RunReference("run:a.zarr", f"{here}/a.zarr", None)
    assert parse_reference("run:a@b.zarr@20") == RunReference(
        "run:a@b.zarr@20", f"{here}/a@b.zarr", 20
    )
    assert parse_reference("run:me@home/a") == RunReference(
        "run:me@home/a", f"{here}/me@home/a", None
    )
    assert parse_reference("file:/x:y") == FileReference("file:/x:y", "/x:y")


@pytest.mark.parametrize(
    "text",
    [
        *("", "last", "final:1", "FINAL", " final", "step", "step:", "step:-1", "step:1.5"),
        *("step:²", "mean:0", "mean:x", "run:", "file:"),
    ],
)
def test_anything_else_is_a_usage_error_that_lists_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no reference; use one of final, step:N, mean:K"):
        parse_reference(text)


@pytest.mark.parametrize("text", ["final", "step:1", "mean:2", "run:a@1", "file:b"])
def test_references_travel_by_pickle(text: str) -> None:
    reference = parse_reference(text)
    assert pickle.loads(pickle.dumps(reference)) == reference


def test_final_and_step_are_rows_of_the_run_not_copied(run: Run) -> None:
    assert (coordinates(parse_reference("final"), run) == WEIGHTS[3]).all()
    assert (coordinates(parse_reference("step:10"), run) == WEIGHTS[1]).all()
    chunk = parse_reference("final").bind(run).chunk(0)
    assert chunk.dtype == np.float32
    assert not chunk.flags.owndata
    assert not chunk.flags.writeable


@pytest.mark.parametrize("count", [1, 2, 4])
def test_mean_is_the_float64_mean_of_the_last_rows(run: Run, count: int) -> None:
    expected = WEIGHTS[-count:].astype(np.float64).mean(axis=0)
    # Two orders of adding at most four numbers of size one.
    np.testing.assert_allclose(
        coordinates(parse_reference(f"mean:{count}"), run), expected, rtol=0, atol=2e-15
    )


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_another_run_may_have_another_dtype_and_so_other_chunks(
    run: Run, tmp_path: Path, dtype: str
) -> None:
    other = random_streams(SIZE, seed=7, dtype="f4" if dtype == "F32" else "f8")["weights"]
    path = write_run(tmp_path / "other@1.zarr", SIZES, {"weights": other}, dtype=dtype)
    assert (coordinates(parse_reference(f"run:{path}"), run) == other[3]).all()
    assert (coordinates(parse_reference(f"run:{path}@20"), run) == other[2]).all()


def test_unknown_steps_and_unfinished_runs_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"step 14 is not recorded.*nearest.* 10 and 20"):
        parse_reference("step:14").bind(run)
    with pytest.raises(
        UnknownNameError, match=r"mean:5 needs 5 weight rows, the run has 4.*mean:4"
    ):
        parse_reference("mean:5").bind(run)
    path = write_run(tmp_path / "open.zarr", SIZES, {"weights": WEIGHTS}, complete=False)
    unfinished = open_run(path)
    for text in ("final", "mean:1"):
        with pytest.raises(UnfinishedError, match="has not finished"):
            parse_reference(text).bind(unfinished)
    with pytest.raises(UnfinishedError, match="has not finished"):
        parse_reference(f"run:{path}").bind(run)
    assert (coordinates(parse_reference(f"run:{path}@20"), run) == WEIGHTS[2]).all()


def test_another_model_is_refused_with_the_first_difference(run: Run, tmp_path: Path) -> None:
    sizes = (60, 1, 0, 201, 38)
    other = write_run(tmp_path / "other.zarr", sizes, {"weights": WEIGHTS})
    with pytest.raises(MismatchError, match=r"'t3' has shape \[200\] here and \[201\] there"):
        parse_reference(f"run:{other}").bind(run)
    with pytest.raises(NotARunError):
        parse_reference(f"run:{tmp_path / 'none.zarr'}").bind(run)


@pytest.mark.parametrize("text", ["final", "mean:2"])
def test_a_damaged_reference_row_gives_no_chunk(run: Run, text: str, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(run.path, tmp_path / "run.zarr"))
    shard = run.path / "weights/value/c/3/0"
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 4 * 100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match=r"inner chunk 1 does not match.*weights/value/c/3/0"):
        coordinates(parse_reference(text), run)
    data[start + 4 * 100] ^= 1
    data[20] ^= 1  # in the header
    shard.write_bytes(data)
    with pytest.raises(DamagedError):
        parse_reference(text).bind(run)


def test_a_reference_on_the_own_path_has_an_end() -> None:
    wanted = {"final": 6, "step:4": 4, "mean:3": 6, "file:w.safetensors": None, "run:b": None}
    assert {text: end_of_path(text, 6) for text in wanted} == wanted
