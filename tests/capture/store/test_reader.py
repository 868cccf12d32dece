"""Opening a run: rows, steps, scalars, names that are not there, and what is held open."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.store import (
    DamagedError,
    NotARunError,
    RunWriter,
    Tensor,
    TensorTable,
    UnfinishedError,
    UnknownNameError,
    open_run,
)

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=40)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=30),
    dtype=st.sampled_from(["F32", "F64", "BF16"]),
    rows=st.integers(0, 3),
    batches=st.none() | st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read(tmp_path_factory, shapes, dtype, rows, batches, seed):
    # One tensor is never empty: a model without a single trainable scalar is refused elsewhere.
    tensors = [Tensor(f"t{index}", shape, dtype, 0) for index, shape in enumerate([(1,), *shapes])]
    table = TensorTable(tuple(tensors), (Tensor("n", (), "I64"), Tensor("e", (0, 2), "F32")))
    path, rng = tmp_path_factory.mktemp("run") / "run.zarr", np.random.default_rng(seed)
    writer = RunWriter.create(path, table, streams={"some": batches})
    expected = {}
    for row in range(rows):
        for stream in ("weights", "some"):
            of_stream = batches if stream == "some" else None
            for batch in [None] if of_stream is None else range(of_stream):
                staging = writer.staging(stream)
                staging.parameters[:] = rng.standard_normal(table.num_parameters)
                expected[stream, row, batch] = staging.parameters.copy()
                writer.commit(stream, staging, step=3 * row, epoch=0.5 * row, batch=batch)
    writer.close()
    run = open_run(path)
    assert run.table == table
    assert run.stream("some").steps.tolist() == [3 * row for row in range(rows)]
    for (stream, row, batch), values in expected.items():
        np.testing.assert_array_equal(run.stream(stream).read(row, batch), values)


@pytest.mark.parametrize("numel", [2**20 - 1, 2**20, 2**20 + 1, 2 * 2**20, 2 * 2**20 + 16])
def test_rows_at_the_edges_of_chunks(sample, tmp_path, numel):
    table = sample.big_table(numel, buffers=False)
    sample.record(tmp_path / "run.zarr", 1, table, {})
    stream = open_run(tmp_path / "run.zarr").stream("weights")
    expected = sample.values(table, "weights", 1)
    np.testing.assert_array_equal(stream.read(1), expected)
    with stream.open(1) as shard:
        views = [shard.chunk(chunk).copy() for chunk in range(stream.grid.num_chunks)]
    np.testing.assert_array_equal(np.concatenate(views), expected)


def test_a_run_says_what_it_is(run_path, sample):
    run = open_run(run_path)
    assert (run.name, run.status, run.complete, run.final_step) == (
        "a run, ñ.zarr", "complete", True, 4,
    )  # fmt: skip
    assert list(run.streams) == ["weights", "fixed", "minibatch"]
    assert run.table == sample.TABLE
    weights = run.stream("weights")
    assert weights.steps.tolist() == [0, 1, 2, 3, 4]
    assert weights.epochs.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert (weights.batches, run.stream("fixed").batches) == (None, 2)
    assert (weights.row_of(3), run.final_row()) == (3, 4)


def test_scalars_are_filled_with_nan_where_nothing_was_known(run_path):
    run = open_run(run_path)
    assert run.scalar_names() == ["by_tensor", "clip_factor", "loss"]
    np.testing.assert_array_equal(run.scalar("clip_factor"), [np.nan, np.nan, 0.5, 0.5])
    np.testing.assert_array_equal(run.scalar("loss"), [1.0, 1 / 2, 1 / 3, 1 / 4])
    assert run.scalar("by_tensor").shape == (4, 3)


def test_a_mapped_chunk_is_a_view_that_cannot_be_written(run_path):
    with open_run(run_path).stream("weights").open(0) as shard:
        chunk = shard.chunk(0)
        assert not chunk.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            chunk[0] = 0
        del chunk


def test_a_view_outlives_its_shard(run_path, sample):
    with open_run(run_path).stream("weights").open(0) as shard:
        chunk = shard.chunk(0)
    np.testing.assert_array_equal(chunk, sample.values(sample.TABLE, "weights", 0))


def test_reading_holds_no_file_open(run_path):
    run = open_run(run_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        for name, stream in open_run(run_path).streams.items():
            stream.read(0, 0 if name == "fixed" else None)
        run.scalar("loss")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda run: run.stream("held-out"), "no stream 'held-out': .*weights, fixed, minibatch"),
        (lambda run: run.scalar("accuracy"), "no scalar 'accuracy': .*by_tensor, clip_factor"),
        (lambda run: run.stream("weights").row_of(9), "step 9 is not recorded.*are 3 and 4"),
        (lambda run: run.stream("weights").row_of(-5), "are 0 and 1"),
    ],
)
def test_names_that_are_not_there(run_path, ask, words):
    with pytest.raises(UnknownNameError, match=words) as caught:
        ask(open_run(run_path))
    assert caught.value.exit_code == 3


def test_an_unfinished_run_has_no_final_iterate(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr")
    run = open_run(tmp_path / "run.zarr")
    with pytest.raises(UnfinishedError, match="--resume"):
        run.final_row()
    with pytest.raises(UnknownNameError, match="no step is recorded yet"):
        run.stream("weights").row_of(0)
    assert run.final_step is None
    assert run.scalar_names() == []
    writer.close()


@pytest.mark.parametrize("make", ["nothing", "empty folder", "file", "another zarr"])
def test_what_is_no_run(tmp_path, make):
    path = tmp_path / "x"
    if make == "file":
        path.touch()
    elif make != "nothing":
        path.mkdir()
    if make == "another zarr":
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(NotARunError, match="capture train --out") as caught:
        open_run(path)
    assert str(path) in str(caught.value)


def test_a_run_may_be_reached_through_a_link_and_lie_elsewhere(run_path, tmp_path):
    (tmp_path / "link").symlink_to(run_path)
    assert len(open_run(tmp_path / "link").stream("weights").read(0)) == 45
    shutil.copytree(run_path, tmp_path / "copy.zarr")
    assert open_run(tmp_path / "copy.zarr").stream("weights").steps.tolist() == [0, 1, 2, 3, 4]


def test_a_run_being_written_shows_what_is_committed(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr")
    sample.write_steps(writer, 0, 2)
    early = open_run(tmp_path / "run.zarr")
    assert early.stream("weights").steps.tolist() == [0, 1]
    sample.write_steps(writer, 2, 3)
    assert open_run(tmp_path / "run.zarr").stream("weights").steps.tolist() == [0, 1, 2]
    # The older view still reads what it listed, after the rows were dropped as well.
    np.testing.assert_array_equal(
        early.stream("weights").read(1), sample.values(sample.TABLE, "weights", 1)
    )
    writer.truncate(1)
    with pytest.raises(DamagedError, match="row 1 "):
        early.stream("weights").read(1)
    writer.close()
