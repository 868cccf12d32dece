"""A recorded step as an ordinary checkpoint, read by safetensors.torch."""

from __future__ import annotations

import os

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from capture.store import (
    DamagedError,
    RunWriter,
    Tensor,
    TensorTable,
    UnknownNameError,
    UsageError,
    export_state_dict,
    verify_run,
)

NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


class Tied(nn.Module):
    """Encoder and decoder share a weight; an embedding is frozen; there is a BatchNorm."""

    def __init__(self, dtype):
        super().__init__()
        self.encoder = nn.Linear(4, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4, dtype=dtype)
        self.decoder = nn.Linear(4, 4, bias=False, dtype=dtype)
        self.decoder.weight = self.encoder.weight
        self.embedding = nn.Embedding(3, 2, dtype=torch.bfloat16)
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("mask", torch.tensor([True, False]))


def raw(tensor):
    """The raw bytes of a torch tensor, uint8 [nbytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def describe(model):
    """The tensor table of `Tied`, without the code of the recorder."""

    def tensor(name, value, aliases=()):
        return Tensor(name, tuple(value.shape), NAMES[value.dtype], 0, aliases)

    trained = [
        tensor(name, value, ("decoder.weight",) if name == "encoder.weight" else ())
        for name, value in model.named_parameters()
        if value.requires_grad
    ]
    buffers = [tensor(name, value) for name, value in model.named_buffers()]
    frozen = [tensor("embedding.weight", model.embedding.weight)]
    return TensorTable(tuple(trained), tuple(buffers), tuple(frozen))


def record(path, model):
    """Record the model's present state as step 0."""
    table = describe(model)
    frozen = {"embedding.weight": raw(model.embedding.weight)}
    writer = RunWriter.create(path, table, streams={}, frozen=frozen)
    staging = writer.staging("weights")
    parts = [value.reshape(-1) for value in model.parameters() if value.requires_grad]
    wide = torch.float64 if table.value_dtype.itemsize == 8 else torch.float32
    staging.parameters[:] = torch.cat([part.detach().to(wide) for part in parts]).numpy()
    for name, value in model.named_buffers():
        staging.buffers[name][:] = raw(value)
    writer.commit("weights", staging, step=0)
    writer.finish(0)
    writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    model = Tied(dtype)
    with torch.no_grad():
        # torch itself does not keep the payload of a NaN when it widens float16.
        first = 1.0 if dtype == torch.float16 else torch.nan
        model.encoder.bias[:] = torch.tensor([first, torch.inf, -torch.inf, -0.0])
        model.norm.running_mean.uniform_()
        model.norm.num_batches_tracked += 2**40
    record(tmp_path / "run.zarr", model)
    out = tmp_path / "model.safetensors"
    names = export_state_dict(tmp_path / "run.zarr", 0, out)

    loaded = safetensors.torch.load_file(out)
    state = model.state_dict()
    assert set(loaded) == set(names) == set(state) - {"decoder.weight"}
    for name, value in loaded.items():
        assert value.dtype == state[name].dtype
        assert value.shape == state[name].shape
        assert raw(value).tobytes() == raw(state[name]).tobytes(), name

    fresh = Tied(dtype)
    assert safetensors.torch.load_model(fresh, out, strict=True) == (set(), [])
    assert fresh.decoder.weight is fresh.encoder.weight
    for name, value in fresh.state_dict().items():
        assert raw(value).tobytes() == raw(state[name]).tobytes(), name


def test_the_file_names_the_tied_tensor_and_nothing_reserved(tmp_path):
    record(tmp_path / "run.zarr", Tied(torch.float32))
    export_state_dict(tmp_path / "run.zarr", 0, tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out", "np") as opened:
        assert opened.metadata() == {"format": "pt", "decoder.weight": "encoder.weight"}
        assert not any("__straightway__" in name for name in opened.keys())  # noqa: SIM118


def test_every_nan_of_bfloat16_and_float32_keeps_its_payload(tmp_path):
    table = TensorTable((Tensor("a", (3,), "BF16", 0), Tensor("b", (2,), "F32", 0)))
    patterns = np.array([0x7FC10000, 0xFF810000, 0x7F810000, 0x7FC12345, 0xFFFFFFFF], "<u4")
    writer = RunWriter.create(tmp_path / "run.zarr", table, streams={})
    staging = writer.staging("weights")
    staging.parameters[:] = patterns.view("<f4")
    writer.commit("weights", staging, step=0)
    writer.close()
    export_state_dict(tmp_path / "run.zarr", 0, tmp_path / "out")
    loaded = safetensors.torch.load_file(tmp_path / "out")
    assert raw(loaded["a"]).view("<u2").tolist() == [0x7FC1, 0xFF81, 0x7F81]
    assert raw(loaded["b"]).view("<u4").tolist() == [0x7FC12345, 0xFFFFFFFF]


def test_bfloat16_beside_float64_is_narrowed_from_float64(tmp_path):
    table = TensorTable((Tensor("a", (2,), "BF16", 0), Tensor("b", (1,), "F64", 0)))
    writer = RunWriter.create(tmp_path / "run.zarr", table, streams={})
    staging = writer.staging("weights")
    staging.parameters[:] = [1.5, np.nan, 1 / 3]
    writer.commit("weights", staging, step=0)
    writer.close()
    export_state_dict(tmp_path / "run.zarr", 0, tmp_path / "out")
    loaded = safetensors.torch.load_file(tmp_path / "out")
    assert loaded["a"][0] == 1.5
    assert loaded["a"][1].isnan()
    assert loaded["b"].item() == 1 / 3


def test_an_unknown_step_names_the_nearest_and_leaves_no_file(run_path, tmp_path):
    with pytest.raises(UnknownNameError, match="the nearest recorded are 3 and 4"):
        export_state_dict(run_path, 9, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["header", "data", "buffers", "frozen"])
def test_damage_gives_no_file(run_path, tmp_path, part):
    shard = run_path / "weights/value/c/1/0"
    if part == "frozen":
        shard = run_path / "weights/value/.straightway/frozen.safetensors"
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[{"header": 20, "data": start, "buffers": -25, "frozen": -1}[part]] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DamagedError):
        export_state_dict(run_path, 1, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [run_path.name]


def test_a_folder_is_no_place_for_a_file(run_path, tmp_path):
    places = {tmp_path: "a folder", tmp_path / "missing/out": "no such folder"}
    places[run_path / "zarr.json"] = "inside a run"
    places[run_path / "weights/value/.straightway/commits.jsonl"] = "inside a run"
    for out, words in places.items():
        with pytest.raises(UsageError, match=words):
            export_state_dict(run_path, 1, out)
    assert verify_run(run_path).sound
