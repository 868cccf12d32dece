"""Reference points: the five forms, what each gives, and what is refused in which words."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from analyze.references import (
    FileReference,
    FinalReference,
    MeanReference,
    Reference,
    RunReference,
    StepReference,
    parse_reference,
)
from capture.store import (
    DamagedError,
    InputError,
    MismatchError,
    NotARunError,
    Run,
    RunWriter,
    StraightwayError,
    Tensor,
    TensorTable,
    UnfinishedError,
    UnknownNameError,
    UsageError,
    layout,
    open_run,
)
from tests.analyze.small_runs import random_streams, write_run

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


def coordinates(reference: Reference, run: Run) -> NDArray[Any]:
    """All coordinates of a reference, put together from its chunks."""
    bound = reference.bind(run)
    grid = run.stream("weights").grid
    assert grid.num_chunks > 3
    parts = [bound.chunk(chunk).copy() for chunk in range(grid.num_chunks)]
    bound.close()
    return np.concatenate(parts)


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


# Files ----------------------------------------------------------------------------------------


def tensors_of(vector: NDArray[Any]) -> dict[str, NDArray[Any]]:
    parts = np.split(vector, np.cumsum(SIZES)[:-1])
    return {f"t{index}": np.ascontiguousarray(part) for index, part in enumerate(parts)}


def write_tensors(path: Path, entries: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """Write a safetensors file by hand: name → (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in entries.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_files_of_every_width_are_widened_exactly(run: Run, tmp_path: Path, dtype: str) -> None:
    vector = np.random.default_rng(5).standard_normal(SIZE).astype(dtype)
    extra = {"running_mean": np.ones(3), "num_batches_tracked": np.array(7)}
    save_file({**tensors_of(vector), **extra}, tmp_path / "w.safetensors")
    found = coordinates(parse_reference(f"file:{tmp_path / 'w.safetensors'}"), run)
    assert found.dtype == (np.float64 if dtype == "f8" else np.float32)
    assert (found == vector).all()


def test_bfloat16_files_are_widened_exactly_and_may_be_links(run: Run, tmp_path: Path) -> None:
    exact = WEIGHTS[0].view(np.uint32) & np.uint32(0xFFFF0000)
    halves = tensors_of((exact >> 16).astype("<u2"))
    entries = {k: ("BF16", [v.size], v.tobytes()) for k, v in reversed(halves.items())}
    write_tensors(tmp_path / "real", entries)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = coordinates(parse_reference(f"file:{tmp_path / 'link'}"), run)
    assert (found == exact.view(np.float32)).all()


def test_a_tied_tensor_may_be_under_its_other_name(tmp_path: Path) -> None:
    table = TensorTable((Tensor("embed", (2, 3), "F32", aliases=("head",)),))
    writer = RunWriter.create(tmp_path / "r.zarr", table, streams={}, attributes={}, frozen={})
    writer.commit("weights", writer.staging("weights"), step=0, epoch=None)
    writer.finish(0)
    writer.close()
    tied = np.arange(6, dtype="f4").reshape(2, 3)
    save_file({"head": tied}, tmp_path / "w.safetensors")
    bound = parse_reference(f"file:{tmp_path / 'w.safetensors'}").bind(open_run(writer.path))
    assert bound.chunk(0).tolist() == [0, 1, 2, 3, 4, 5]


def test_an_exported_row_is_the_row(run: Run, tmp_path: Path) -> None:
    shard = run.path / "weights/value/c/2/0"  # a shard is a safetensors file as it stands
    assert (coordinates(parse_reference(f"file:{shard}"), run) == WEIGHTS[2]).all()


Spoil = Callable[[dict[str, tuple[str, list[int], bytes]]], object]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda e: e.pop("t3"), "'t3' is missing"),
        (lambda e: e.update(t1=("F32", [1, 1], bytes(4))), r"'t1' has shape \[1, 1\].*run \[1\]"),
        (lambda e: e.update(t1=("I32", [1], bytes(4))), "'t1' has dtype I32"),
    ],
)
def test_a_file_of_another_model_is_refused_by_the_first_tensor(
    run: Run, tmp_path: Path, spoil: Spoil, words: str
) -> None:
    entries = {k: ("F32", [v.size], v.tobytes()) for k, v in tensors_of(WEIGHTS[0]).items()}
    spoil(entries)
    path = write_tensors(tmp_path / "w.safetensors", entries)
    with pytest.raises(MismatchError, match=words):
        parse_reference(f"file:{path}").bind(run)


def whole_file(path: Path) -> bytes:
    save_file(tensors_of(WEIGHTS[0]), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: b"", "its header does not fit"),
        (lambda data: data[:5], "its header does not fit"),
        (lambda data: b"\xff" * 200, "its header does not fit"),
        (lambda data: data[:40], "its header does not fit"),
        (lambda data: data[:8] + b"\xff" + data[9:], "its header is not JSON"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "its header lists no tensors"),
        (lambda data: data[:-1], "it is cut short"),
        (lambda data: data.replace(b'"F32"', b'"F64"'), "its header does not add up"),
        (lambda data: data.replace(b'"dtype"', b'"dtypo"'), "its entry 't0' cannot be read"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    run: Run, tmp_path: Path, spoil: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(spoil(whole_file(path)))
    with pytest.raises(DamagedError, match=f"{words}.*w.safetensors; check that") as caught:
        parse_reference(f"file:{path}").bind(run)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_under_our_hands_is_noticed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    data = whole_file(path)
    bound = parse_reference(f"file:{path}").bind(run)
    path.write_bytes(data[:-4])
    with pytest.raises(DamagedError, match="shrank"):
        bound.chunk(run.stream("weights").grid.num_chunks - 1)


def test_a_missing_file_or_a_folder_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file.*nowhere\.safetensors"):
        parse_reference(f"file:{tmp_path}/nowhere.safetensors").bind(run)
    with pytest.raises(StraightwayError, match="directory"):
        parse_reference(f"file:{tmp_path}").bind(run)
