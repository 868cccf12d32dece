"""zarr-python, zarrs, tensorstore, xarray and safetensors read the same bits from one file."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import tensorstore
import torch
import xarray
import zarr
import zarrs  # noqa: F401 (registers its pipeline)

from capture.store import TensorTable, open_run
from capture.store.layout import stream_folder

STEPS = 2


def by_zarr(run, path):
    return np.asarray(zarr.open_group(run, mode="r")[path][...])


def by_zarrs(run, path):
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return by_zarr(run, path)


def by_tensorstore(run, path):
    store = {"driver": "file", "path": f"{run / path}/"}
    spec = {"driver": "zarr3", "kvstore": store}
    return tensorstore.open(spec, read=True).result().read().result()


def by_xarray(run, path):
    group, name = path.rsplit("/", 1)
    with xarray.open_zarr(run, group=group, consolidated=False) as opened:
        return opened[name].values


ZARR_READERS = [by_zarr, by_zarrs, by_tensorstore, by_xarray]


def bits(array):
    """The bytes of an array, so that NaN equals NaN and -0 is not 0."""
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture(scope="module", params=["small F32", "three chunks F32", "three chunks F64"])
def recorded(request, sample, tmp_path_factory):
    """A run with `[step]` and `[step, batch]` streams, and its table."""
    table = sample.TABLE
    if request.param != "small F32":
        dtype = request.param[-3:]
        table = sample.big_table(2_200_000 if dtype == "F32" else 1_100_000, dtype)
    path = tmp_path_factory.mktemp("readers") / "run.zarr"
    sample.record(path, STEPS, table)
    chunks = open_run(path).stream("weights").grid.num_chunks
    assert chunks == (1 if request.param == "small F32" else 3)
    return path, table


@pytest.mark.parametrize("read", ZARR_READERS)
@pytest.mark.parametrize("stream", ["weights", "minibatch", "fixed"])
def test_every_zarr_reader_sees_the_recorded_bits(sample, recorded, read, stream):
    path, table = recorded
    seen = read(path, f"{stream_folder(stream)}/value")
    steps = range(STEPS + 1) if stream == "weights" else range(STEPS)
    batches = range(2) if stream == "fixed" else [None]
    expected = [sample.values(table, stream, step, batch) for step in steps for batch in batches]
    middle = (2,) if stream == "fixed" else ()
    assert seen.shape == (len(steps), *middle, table.num_parameters)
    assert seen.dtype == table.value_dtype
    assert bits(seen) == bits(np.array(expected))


@pytest.mark.parametrize("read", ZARR_READERS)
def test_coordinates_and_scalars(sample, recorded, read):
    path, _ = recorded
    assert read(path, "weights/step").tolist() == [0, 1, 2]
    assert read(path, "weights/epoch").tolist() == [0.0, 0.25, 0.5]
    assert read(path, "gradients/fixed/batch").tolist() == [0, 1]
    assert read(path, "scalars/loss").tolist() == [1.0, 0.5]
    assert read(path, "scalars/by_tensor").tolist() == [[0.0, 0.0, 0.5], [1.0, -1.0, 0.5]]


def test_xarray_knows_the_coordinates(recorded):
    path, _ = recorded
    with xarray.open_zarr(path, group="gradients/fixed", consolidated=False) as opened:
        assert opened["value"].dims == ("step", "batch", "coordinate")
        assert opened["value"].sel(step=1, batch=0).shape == opened["coordinate"].shape


def split(table, values):
    """Cut one row of coordinates into its tensors."""
    parts = np.split(values, table.offsets[1:-1])
    pairs = zip(table.parameters, parts, strict=True)
    return {tensor.name: part.reshape(tensor.shape) for tensor, part in pairs}


@pytest.mark.parametrize("stream", ["weights", "minibatch", "fixed"])
def test_safetensors_torch_reads_the_recorded_bits(sample, recorded, stream):
    path, table = recorded
    batch = 1 if stream == "fixed" else None
    key = "c/1/0" if batch is None else "c/1/1/0"
    loaded = safetensors.torch.load_file(path / stream_folder(stream) / "value" / key)
    for name, expected in split(table, sample.values(table, stream, 1, batch)).items():
        assert loaded[name].shape == expected.shape
        assert bits(loaded[name].numpy()) == bits(expected)
    reserved = {name for name in loaded if name.startswith("__straightway__.")}
    named = {tensor.name for tensor in table.buffers} if stream == "weights" else set()
    assert set(loaded) - reserved == named | set(table.names)
    if stream == "weights":
        raw = sample.buffer_bytes(table, 1)
        for name in named:
            assert bits(loaded[name].reshape(-1).view(torch.uint8).numpy()) == bits(raw[name])
        assert loaded["bn.num_batches_tracked"].dtype == torch.int64
        assert loaded["bn.num_batches_tracked"].shape == ()
        assert loaded["mask"].dtype == torch.bool
        assert loaded["ema"].dtype == torch.bfloat16


def test_safetensors_numpy_reads_the_recorded_bits(sample, tmp_path):
    # numpy has no bfloat16, so this run has no such buffer; its parameters are widened anyway.
    table = TensorTable(sample.TABLE.parameters, sample.TABLE.buffers[:3])
    sample.record(tmp_path / "run.zarr", 1, table)
    loaded = safetensors.numpy.load_file(tmp_path / "run.zarr/weights/value/c/0/0")
    for name, expected in split(table, sample.values(table, "weights", 0)).items():
        assert bits(loaded[name]) == bits(expected)
    raw = sample.buffer_bytes(table, 0)
    assert all(bits(loaded[name]) == bits(raw[name]) for name in raw)


def test_nan_infinity_and_minus_zero_are_values_like_any_other(sample, tmp_path):
    path = tmp_path / "run.zarr"
    writer = sample.create(path)
    staging = writer.staging("weights")
    staging.parameters[:4] = [np.nan, np.inf, -np.inf, -0.0]
    writer.commit("weights", staging, step=0)
    writer.finish(0)
    writer.close()
    expected = bits(staging.parameters)
    assert bits(open_run(path).stream("weights").read(0)) == expected
    for read in ZARR_READERS:
        assert bits(read(path, "weights/value")) == expected


def test_listing_and_opening_a_run_warns_about_nothing(recorded):
    # pytest turns every warning into an error.
    path, _ = recorded
    group = zarr.open_group(path, mode="r")
    assert sorted(group.group_keys()) == ["gradients", "scalars", "weights"]
    names = sorted(name for name, _ in group.members(max_depth=None))
    assert "weights/value" in names
    assert not any(".straightway" in name for name in names)
    assert "conv.weight" in str(group.attrs.asdict()) or "first" in str(group.attrs.asdict())
    assert group.tree() is not None
    for name in ("weights", "gradients/minibatch", "gradients/fixed", "scalars"):
        xarray.open_zarr(path, group=name, consolidated=False).close()


@pytest.mark.parametrize("read", ZARR_READERS)
def test_why_this_store_checks_readers_of_other_make_fill_in_silently(recorded, tmp_path, read):
    """A missing shard reads as NaN, and a flipped bit as a number: hence the commit log."""
    path, table = recorded
    whole = read(path, "gradients/minibatch/value")
    shard = path / "gradients/minibatch/value/c/0/0"
    data = shard.read_bytes()
    try:
        shard.unlink()
        assert np.isnan(read(path, "gradients/minibatch/value")[0]).all()
        flipped = bytearray(data)
        flipped[8 + int.from_bytes(data[:8], "little")] ^= 1
        shard.write_bytes(flipped)
        seen = read(path, "gradients/minibatch/value")
        assert seen[0, 0] != whole[0, 0]
        assert bits(seen[:, 1:]) == bits(whole[:, 1:])
    finally:
        shard.write_bytes(data)
    assert table.num_parameters == whole.shape[1]
