"""Every kind of damage: the right error, one line with file, row and remedy, never a number."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from capture.store import (
    DamagedError,
    InputError,
    NotARunError,
    export_state_dict,
    open_run,
    verify_run,
)
from capture.store.attributes import attributes_checksum

ROW, CHUNKS = 1, 2
VALUES = {"weights": "weights/value", "minibatch": "gradients/minibatch/value"}


@pytest.fixture(scope="session")
def sound(sample, tmp_path_factory):
    """A complete run of 2 updates with two inner chunks per shard; a test damages a copy of it."""
    path = tmp_path_factory.mktemp("sound") / "run.zarr"
    sample.record(path, 2, sample.big_table(1_050_000), {"minibatch": None})
    assert open_run(path).stream("weights").grid.num_chunks == CHUNKS
    return path


@pytest.fixture
def run(sound, tmp_path):
    """A copy to be damaged; files are shared with the original until `put` replaces them."""
    shutil.copytree(sound, tmp_path / "run.zarr", copy_function=os.link)
    return tmp_path / "run.zarr"


def put(path, data):
    """Replace a file, not its content: the original run has the same file."""
    path.unlink()
    path.write_bytes(data)


def flip(path, position):
    """Flip one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    put(path, data)


def beside(path):
    """A place outside the run that holds this file."""
    return next(folder for folder in path.parents if folder.name == "run.zarr").parent / "outside"


def data_start(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def replace_by_folder(shard):
    shard.unlink()
    shard.mkdir()


def replace_by_fifo(shard):
    shard.unlink()
    os.mkfifo(shard)


def replace_by_link(shard):
    """A link to the very file, outside the run."""
    outside = beside(shard)
    shard.rename(outside)
    shard.symlink_to(outside)


def replace_row_by_link(shard):
    outside = beside(shard)
    shard.parent.rename(outside)
    shard.parent.symlink_to(outside)


def swap(shard):
    other = shard.parents[1] / "0/0"
    kept = shard.read_bytes()
    put(shard, other.read_bytes())
    put(other, kept)


CHUNK_BYTES = 4 * 525_008  # ceil(1,050,000 / 2), rounded up to 16
PADDING = 4 * (2 * 525_008 - 1_050_000)

SHARD_DAMAGE = {
    "missing": (lambda shard: shard.unlink(), "missing"),
    "empty": (lambda shard: put(shard, b""), "the file has 0 bytes"),
    "truncated": (lambda shard: put(shard, shard.read_bytes()[:-1]), "bytes, .* were committed"),
    "one byte more": (lambda shard: put(shard, shard.read_bytes() + b"\0"), "were committed"),
    "swapped": (swap, "committed"),
    "folder": (replace_by_folder, "not a regular file"),
    "fifo": (replace_by_fifo, "not a regular file"),
    "link": (replace_by_link, "symbolic link"),
    "linked row": (replace_row_by_link, "symbolic link"),
    "header length": (lambda shard: flip(shard, 0), "header, buffers or index"),
    "huge header": (lambda shard: flip(shard, 6), "header, buffers or index"),
    "header": (lambda shard: flip(shard, 30), "header, buffers or index"),
    "first chunk": (lambda shard: flip(shard, data_start(shard)), "inner chunk 0"),
    "last chunk": (lambda shard: flip(shard, data_start(shard) + CHUNK_BYTES), "inner chunk 1"),
    "padding": (
        lambda shard: flip(shard, data_start(shard) + 2 * CHUNK_BYTES - PADDING),
        "inner chunk 1",
    ),
    "after the chunks": (
        lambda shard: flip(shard, data_start(shard) + 2 * CHUNK_BYTES),
        "header, buffers or index",
    ),
    "index": (lambda shard: flip(shard, -10), "header, buffers or index"),
    "checksum of the index": (lambda shard: flip(shard, -1), "header, buffers or index"),
}


def one_line(error, *parts):
    message = str(error)
    assert "\n" not in message
    assert error.exit_code == 3
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("stream", ["weights", "minibatch"])
@pytest.mark.parametrize("kind", SHARD_DAMAGE)
def test_a_damaged_shard(sample, run, stream, kind):
    damage, words = SHARD_DAMAGE[kind]
    shard = run / VALUES[stream] / f"c/{ROW}/0"
    damage(shard)
    rows = open_run(run).stream(stream)
    with pytest.raises(DamagedError, match=words) as caught:
        rows.read(ROW)
    one_line(caught.value, shard, f"row {ROW} (step 1) of {stream!r}", "restore the file from")

    found = verify_run(run).problems
    assert len(found) == (2 if kind == "swapped" else 1)
    assert any(str(shard) in str(problem) for problem in found)
    if stream == "weights":
        out = run.parent / "out.safetensors"
        with pytest.raises(DamagedError):
            export_state_dict(run, 1, out)
        assert not out.exists()
    if kind != "swapped":
        expected = sample.values(rows.run.table, stream, 0)
        np.testing.assert_array_equal(rows.read(0), expected)


def edit_lines(change):
    """Damage that rewrites the lines of the log."""

    def damage(log):
        put(log, b"".join(change(log.read_bytes().splitlines(keepends=True))))

    return damage


LOG_DAMAGE = {
    "missing": (lambda log: log.unlink(), "missing"),
    "empty": (lambda log: put(log, b""), "lists 0 shards, the finished run has"),
    "a line less": (edit_lines(lambda lines: lines[:-1]), "shards, the finished run has"),
    "half a line": (lambda log: put(log, log.read_bytes()[:-9]), "the finished run has"),
    "only the newline": (lambda log: put(log, log.read_bytes()[:-1]), "the finished run has"),
    "a bit": (lambda log: flip(log, 60), "line 1 of the commit log is damaged"),
    "not text": (lambda log: put(log, b"\xff\xfe\n" * 3), "line 1 of the commit log is damaged"),
    "twice": (edit_lines(lambda lines: [lines[0], *lines]), "line 2 .* does not follow"),
    "order": (edit_lines(lambda lines: lines[::-1]), "line 1 .* does not follow"),
    "link": (
        lambda log: log.symlink_to(log.rename(beside(log))),
        "symbolic link",
    ),
}


@pytest.mark.parametrize("stream", ["weights", "minibatch"])
@pytest.mark.parametrize("kind", LOG_DAMAGE)
def test_a_damaged_log(run, stream, kind):
    damage, words = LOG_DAMAGE[kind]
    log = run / VALUES[stream] / ".straightway/commits.jsonl"
    damage(log)
    with pytest.raises(DamagedError, match=words) as caught:
        open_run(run).stream(stream)
    one_line(caught.value, log, "restore the file from")
    found = verify_run(run).problems
    assert str(log) in str(found[0])


def edit_json(*keys, value):
    """Damage that sets one entry of a JSON document."""

    def damage(path):
        document = json.loads(path.read_bytes())
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        put(path, json.dumps(document).encode())

    return damage


def edit_root(*keys, value, sealed=True):
    """Damage that sets one attribute; `sealed` makes their checksum agree, to reach what lies
    behind it, as a faulty writer would."""
    edit = edit_json("attributes", "straightway", *keys, value=value)

    def damage(path):
        edit(path)
        if sealed:
            document = json.loads(path.read_bytes())
            entries = document["attributes"]["straightway"]
            entries["crc32c"] = attributes_checksum(entries)
            put(path, json.dumps(document).encode())

    return damage


ROOT_DAMAGE = {
    "missing": (lambda root: root.unlink(), NotARunError, "no run store here"),
    "empty": (lambda root: put(root, b""), DamagedError, "no JSON"),
    "truncated": (lambda root: put(root, root.read_bytes()[:200]), DamagedError, "no JSON"),
    "not text": (lambda root: put(root, b"\xff\xfe\0"), DamagedError, "no JSON"),
    "nested": (lambda root: put(root, b"[" * 100_000), DamagedError, "no JSON"),
    "a list": (lambda root: put(root, b"[]"), DamagedError, "no JSON object"),
    "no attributes": (edit_json("attributes", value=3), NotARunError, "not that of a run"),
    "newer": (edit_root("format", value=2), NotARunError, "format 2, .* up to 1.*upgrade"),
    "format": (edit_root("format", value="1"), NotARunError, "not that of a run"),
    "status": (edit_root("status", value="done"), DamagedError, "status"),
    "final step": (edit_root("final_step", value="4"), DamagedError, "final_step"),
    "no final step": (edit_root("final_step", value=None), DamagedError, "final_step"),
    "tensors": (edit_root("tensors", value=[]), DamagedError, "tensors"),
    "no tensors": (edit_root("tensors", "parameters", value=[]), DamagedError, "offsets"),
    "offset": (edit_root("tensors", "parameters", 1, "offset", value=7), DamagedError, "offsets"),
    "shape": (edit_root("tensors", "parameters", 0, "shape", value=[3]), DamagedError, "offsets"),
    "dtype": (edit_root("tensors", "buffers", 0, "dtype", value=[]), DamagedError, "tensor table"),
    "stream": (edit_root("streams", "../x", value=None), DamagedError, "streams"),
    "batches": (edit_root("streams", "minibatch", value="2"), DamagedError, "streams"),
    "no streams": (edit_root("streams", value={}), DamagedError, "streams"),
    "digests": (edit_root("digests", value=[]), DamagedError, "digests"),
    "not a number": (edit_root("format", value=True), NotARunError, "not that of a run"),
    "unsealed": (edit_root("config", value={"lr": 1}, sealed=False), DamagedError, "checksum"),
    "NaN": (edit_root("config", value=float("nan"), sealed=False), DamagedError, "checksum"),
    "group": (
        edit_root("tensors", "parameters", 0, "group", value=1, sealed=False),
        DamagedError,
        "checksum",
    ),
    "name": (
        edit_root("tensors", "parameters", 0, "name", value="x", sealed=False),
        DamagedError,
        "checksum",
    ),
    "no checksum": (edit_root("crc32c", value=None, sealed=False), DamagedError, "checksum"),
    "link": (
        lambda root: root.symlink_to(root.rename(beside(root))),
        DamagedError,
        "symbolic link",
    ),
}


@pytest.mark.parametrize("kind", ROOT_DAMAGE)
def test_a_damaged_root(run, kind):
    damage, error, words = ROOT_DAMAGE[kind]
    damage(run / "zarr.json")
    for act in (open_run, verify_run):
        with pytest.raises(error, match=words) as caught:
            act(run)
        one_line(caught.value, run, ";")


# Damage to the root that only shows when a stream or a scalar is opened.
LATER = {
    "complete but shorter": edit_root("digests", "rows", "weights", value=4),
    "recording but batches": edit_root("streams", "minibatch", value=2),
    "unknown stream": edit_root("streams", "other", value=None),
    "scalar": edit_root("digests", "scalars", "loss", value="00000000"),
    "unknown scalar": edit_root("digests", "scalars", "other", value="00000000"),
    "scalar elsewhere": edit_root("digests", "scalars", "../weights/step", value="00000000"),
    "last weights": edit_root("final_step", value=9),
    "a tensor less": edit_root("tensors", "buffers", value=[]),
    "buffer": edit_root("tensors", "buffers", 0, "name", value="other"),
}


@pytest.mark.parametrize("kind", LATER)
def test_a_damaged_root_that_opens_is_found_by_verify(run, kind):
    LATER[kind](run / "zarr.json")
    found = verify_run(run).problems
    assert found
    for problem in found:
        one_line(problem, run)


ARRAY_DAMAGE = {
    "missing": lambda path: path.unlink(),
    "not JSON": lambda path: put(path, path.read_bytes()[:-5]),
    "a row more": edit_json("shape", value=[9, 1_050_000]),
    "a coordinate less": edit_json("shape", 1, value=1_049_999),
    "no shape": edit_json("shape", value=None),
    "shape of words": edit_json("shape", value="ab"),
    "dtype": edit_json("data_type", value="float64"),
    "chunks": edit_json("chunk_grid", "configuration", "chunk_shape", value=[1, 16]),
    "fill value": edit_json("fill_value", value=0.0),
    "codecs": edit_json("codecs", value=[{"name": "bytes"}]),
}


@pytest.mark.parametrize("stream", ["weights", "minibatch"])
@pytest.mark.parametrize("kind", ARRAY_DAMAGE)
def test_damaged_metadata_of_values(run, stream, kind):
    path = run / VALUES[stream] / "zarr.json"
    ARRAY_DAMAGE[kind](path)
    with pytest.raises(DamagedError) as caught:
        open_run(run).stream(stream)
    one_line(caught.value, path, "restore the file from")
    assert str(path) in str(verify_run(run).problems[0])


def swap_scalars(run):
    loss, other = run / "scalars/loss/c/0", run / "scalars/clip_factor/c/0"
    if not other.exists():
        other = run / "weights/epoch/c/0"
    kept = loss.read_bytes()
    put(loss, other.read_bytes())
    put(other, kept)


SMALL_DAMAGE = {
    "missing": lambda run: (run / "scalars/loss/c/0").unlink(),
    "empty": lambda run: put(run / "scalars/loss/c/0", b""),
    "a bit": lambda run: flip(run / "scalars/loss/c/0", 3),
    "swapped": swap_scalars,
    "shape": lambda run: edit_json("shape", value=[1])(run / "scalars/loss/zarr.json"),
    "dtype": lambda run: edit_json("data_type", value="x")(run / "scalars/loss/zarr.json"),
    "metadata": lambda run: (run / "scalars/loss/zarr.json").unlink(),
    "folder": lambda run: shutil.rmtree(run / "scalars/loss"),
    "all": lambda run: shutil.rmtree(run / "scalars"),
}


@pytest.mark.parametrize("kind", SMALL_DAMAGE)
def test_damaged_scalars(run, kind):
    SMALL_DAMAGE[kind](run)
    with pytest.raises(DamagedError) as caught:
        open_run(run).scalar("loss")
    one_line(caught.value, run / "scalars/loss", "restore the file from")
    found = [str(problem) for problem in verify_run(run).problems]
    assert any(str(run / "scalars/loss") in problem for problem in found)


@pytest.mark.parametrize("name", ["step", "epoch"])
@pytest.mark.parametrize("stream", ["weights", "minibatch"])
def test_damaged_coordinates_are_found_though_our_reader_needs_none(run, sound, stream, name):
    folder = (run / VALUES[stream]).parent / name
    (folder / "c/0").unlink()
    (problem,) = verify_run(run).problems
    one_line(problem, folder)
    np.testing.assert_array_equal(
        open_run(run).stream(stream).steps, open_run(sound).stream(stream).steps
    )


def test_a_damaged_group_is_found(run):
    put(run / "gradients/minibatch/zarr.json", b"{")
    found = verify_run(run).problems
    assert len(found) == 1
    one_line(found[0], run / "gradients/minibatch", "restore the file from")


def test_a_damaged_scalar_of_a_running_run(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr")
    sample.write_steps(writer, 0, 2)
    writer.flush()
    writer.close()
    shutil.rmtree(tmp_path / "run.zarr/scalars/loss/c")
    (problem,) = verify_run(tmp_path / "run.zarr").problems
    one_line(problem, "scalars/loss/c/0")
    shutil.rmtree(tmp_path / "run.zarr/scalars")
    assert verify_run(tmp_path / "run.zarr").problems == []  # nothing says that there were any


@pytest.mark.parametrize("kind", ["bit", "missing", "truncated"])
def test_damaged_frozen_tensors(run_path, kind):
    path = run_path / "weights/value/.straightway/frozen.safetensors"
    data = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(data[:-1] if kind == "truncated" else data[:-1] + b"\x7f")
    with pytest.raises(InputError) as caught:
        export_state_dict(run_path, 1, run_path.parent / "out")
    one_line(caught.value, path, "restore the file from")
    (problem,) = verify_run(run_path).problems
    assert str(path) in str(problem)
