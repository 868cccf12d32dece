"""A store that an earlier version wrote, in tests/golden: every later version must read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import zarr

from capture.store import RunWriter, export_state_dict, open_run, verify_run

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def golden():
    return open_run(GOLDEN / "format-1.zarr")


def test_every_checksum_of_the_old_store_holds(golden):
    report = verify_run(golden.path)
    assert report.problems == []
    assert (report.shards, report.scalars) == (3 + 2 + 4, 3)


def test_its_facts(golden):
    assert (golden.status, golden.final_step) == ("complete", 10)
    assert golden.attributes["format"] == 1
    assert golden.attributes["seeds"] == {"seed": 3}
    assert golden.table.names == ("layer.weight", "layer.bias", "scale")
    assert golden.table.aliases == {"tied.weight": "layer.weight"}
    assert [tensor.dtype for tensor in golden.table.parameters] == ["F32", "BF16", "F16"]
    assert golden.stream("weights").steps.tolist() == [0, 5, 10]
    assert golden.stream("weights").epochs.tolist() == [0.0, 2.5, 5.0]
    assert golden.stream("fixed").steps.tolist() == [0, 5]


def test_its_numbers(golden):
    weights = golden.stream("weights").read(2)
    assert weights.tolist() == [200, 201, 202, 203, 204, 205, 206, 207, 208]
    assert golden.stream("minibatch").read(0).tolist() == [-4, -3, -2, -1, 0, 1, 2, 3, 4]
    assert golden.stream("fixed").read(0, 1).tolist() == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert golden.scalar("loss")[:4].tolist() == [1.0, 0.5, 0.25, 0.125]
    assert golden.scalar("grad_norm_by_tensor")[9].tolist() == [9.0, 0.5, -0.5]
    clip = golden.scalar("clip_factor")
    assert clip[7] == 0.25
    assert np.isnan(np.delete(clip, 7)).all()


def test_other_readers_see_them_too(golden):
    value = zarr.open_group(golden.path, mode="r")["weights/value"]
    assert np.asarray(value)[1].tolist() == [100, 101, 102, 103, 104, 105, 106, 107, 108]
    tensors = safetensors.numpy.load_file(golden.path / "weights/value/c/1/0")
    assert tensors["layer.bias"].tolist() == [106, 107]
    assert tensors["norm.num_batches_tracked"].item() == 5
    assert tensors["mask"].tolist() == [True, False, True]


def test_it_can_be_exported(golden, tmp_path):
    names = export_state_dict(golden.path, 0, tmp_path / "out.safetensors")
    assert set(names) == {
        "layer.weight", "layer.bias", "scale", "norm.num_batches_tracked", "mask", "embedding",
    }  # fmt: skip
    data = (tmp_path / "out.safetensors").read_bytes()
    # The frozen embedding, 0.5 and -1.5, ends the file.
    assert data[-8:] == bytes.fromhex("0000003f 0000c0bf")


def test_it_can_be_continued(golden, tmp_path):
    shutil.copytree(golden.path, tmp_path / "run.zarr")
    writer = RunWriter.reopen(tmp_path / "run.zarr", golden.table)
    writer.truncate(5)
    assert writer.committed_steps("weights") == [0]
    writer.close()
    assert verify_run(tmp_path / "run.zarr").sound
