"""A safetensors file as a reference: widened exactly, fitted to the run, refused where damaged."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from analyze.references import (
    parse_reference,
)
from capture.store import (
    DamagedError,
    InputError,
    MismatchError,
    Run,
    RunWriter,
    StraightwayError,
    Tensor,
    TensorTable,
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


def nested(depth: int) -> bytes:
    """A header deeper than a parser goes."""
    return depth.to_bytes(8, "little") + b"[" * depth


def whole_file(path: Path) -> bytes:
    save_file(tensors_of(WEIGHTS[0]), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: b"", "its header is cut off"),
        (lambda data: data[:5], "its header is cut off"),
        (lambda data: b"\xff" * 200, "its header is cut off"),
        (lambda data: data[:40], "its header is cut off"),
        (lambda data: data[:8] + b"\xff" + data[9:], "header cannot be read"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "header cannot be read"),
        (lambda data: nested(50_000), "header cannot be read"),
        (lambda data: data[:-1], "where the header promises"),
        (lambda data: data + b"\0", "where the header promises"),
        (lambda data: data.replace(b'"F32"', b'"F64"'), "do not fit its shape"),
        (lambda data: data.replace(b'"dtype"', b'"dtypo"'), "header cannot be read"),
        (lambda data: data.replace(b'"shape":[60]', b'"shape":"60"'), "header cannot be read"),
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


def test_a_pipe_is_refused_and_not_waited_for(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="no ordinary file"):
            parse_reference(f"file:{path}").bind(run)
    with pytest.raises(InputError, match="cannot be read"):
        parse_reference("file:a\0b").bind(run)


def test_a_file_is_closed_when_it_is_done_with_or_dropped(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    whole_file(path)

    def still_open() -> int:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link) == str(path.resolve()) for link in links)

    bound = parse_reference(f"file:{path}").bind(run)
    assert still_open() == 1
    bound.close()
    bound.close()
    assert still_open() == 0
    parse_reference(f"file:{path}").bind(run)
    assert still_open() == 0
