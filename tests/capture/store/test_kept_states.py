"""Kept states read without torch: tensor by tensor, and nothing of one that is not sound."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from capture.state import save
from capture.store import DamagedError, WriteError
from capture.store.kept_states import KeptState, StateTensor, find_kept, list_kept, tree_of
from capture.store.objects import ObjectPath
from capture.store.place import Place

FOLDER = "weights/value/.straightway"
TREE = {
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "v": torch.arange(12.0).reshape(3, 4).t()}},
        "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1]}],
    },
    "half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "short": torch.tensor([0.5, 1.0], dtype=torch.float16),
    "wide": torch.tensor([1 / 3], dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "array": np.arange(3),
    "empty": torch.zeros(0),
}


def keep(run: Place, step: int = 12) -> Place:
    save(run / FOLDER, step, TREE, keep=True)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir(parents=True)
    keep(tmp_path)
    return tmp_path


def assert_as_kept(run: Place) -> None:
    with KeptState(run, 12) as state:
        moments = state.tree["optimizer"]["state"][0]
        assert state.tree["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert state.number(moments["step"]) == 3
        assert state.number(7) == 7
        assert state.shape(moments["v"]) == (4, 3)
        # Flattened as the turned tensor is, not as it lay in memory.
        flat = TREE["optimizer"]["state"][0]["v"].flatten().tolist()
        assert state.read(moments["v"], 0, 12).tolist() == flat
        assert state.read(moments["v"], 5, 8).tolist() == flat[5:8]
        for name in ("half", "short", "wide"):
            found = state.read(state.tree[name], 0, len(TREE[name]))
            assert found.tolist() == TREE[name].tolist()
        assert state.read(state.tree["array"], 1, 3).tolist() == [1, 2]
        assert state.read(state.tree["empty"], 0, 0).tolist() == []


def test_tensors_come_back_one_by_one(run: Path) -> None:
    assert_as_kept(run)


def test_what_is_kept_is_listed_by_step(run: Path) -> None:
    keep(run, 4)
    keep(run, 1_000_000_000)
    (run / FOLDER / "kept" / "notes.json").write_text("not ours")
    assert list_kept(run) == [4, 12, 1_000_000_000]
    assert list_kept(run / "elsewhere") == []


def test_the_tree_needs_no_tensors_and_its_digest_tells_states_apart(run: Path) -> None:
    first = find_kept(run, 12)
    (data,) = (run / FOLDER / "kept").glob("*.safetensors")
    data.unlink()
    assert tree_of(first)["half"] == StateTensor("state['half']")
    assert find_kept(run, 12).digest == first.digest
    save(run / FOLDER, 12, {**TREE, "wide": torch.zeros(1)}, keep=True)
    assert find_kept(run, 12).digest != first.digest


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda state, data: flip(data, -1), "does not match its checksum"),
        (lambda state, data: flip(data, 12), "does not match its checksum"),
        (lambda state, data: os.truncate(data, 40), "does not match its checksum"),
        (lambda state, data: os.truncate(data, 0), "does not match its checksum"),
        (lambda state, data: data.unlink(), "the file is missing"),
        (lambda state, data: (data.unlink(), data.symlink_to("/etc/hostname")), "a symbolic link"),
        (lambda state, data: flip(state, state.stat().st_size // 2), ""),
        (lambda state, data: os.truncate(state, 0), "cannot be read"),
        (lambda state, data: state.write_text("[" * 100_000), "cannot be read"),
        (lambda state, data: state.unlink(), "the file is missing"),
    ],
)
def test_a_damaged_state_gives_nothing(run: Path, harm, words: str) -> None:
    (state,) = (run / FOLDER / "kept").glob("*.json")
    (data,) = (run / FOLDER / "kept").glob("*.safetensors")
    harm(state, data)
    message = rf"the state kept after 12 updates is damaged, .*{words}.*remove kept/000000012\.json"
    with pytest.raises(DamagedError, match=message):
        KeptState(run, 12)


def test_what_is_no_tensor_of_numbers_is_refused(run: Path) -> None:
    with KeptState(run, 12) as state:
        with pytest.raises(DamagedError, match=r"state\['flags'\] has dtype BOOL"):
            state.read(state.tree["flags"], 0, 1)
        with pytest.raises(DamagedError, match="other is missing"):
            state.shape(StateTensor("other"))


def test_nothing_stays_open(run: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with KeptState(run, 12) as state:
        state.read(state.tree["wide"], 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before
    (data,) = (run / FOLDER / "kept").glob("*.safetensors")
    flip(data, -1)
    with pytest.raises(DamagedError):
        KeptState(run, 12)
    assert len(os.listdir("/proc/self/fd")) == before


def test_from_an_object_store_too(bucket) -> None:
    run = keep(bucket.place(""))
    assert list_kept(run) == [12]
    assert_as_kept(run)


@pytest.mark.parametrize("fault", ["flip", "short"])
@pytest.mark.parametrize("times", [1, 1000])
def test_a_faulty_connection_gives_right_numbers_or_an_error(bucket, fault, times) -> None:
    run = keep(bucket.place(""))
    wrong = []

    def spoil(method: str, path: str) -> str | None:
        if method == "GET" and path.endswith(".safetensors") and len(wrong) < times:
            wrong.append(path)
            return fault
        return None

    bucket.fail(spoil)
    if times == 1:
        assert_as_kept(run)
    else:
        with pytest.raises(DamagedError, match="the state kept after 12 updates is damaged"):
            KeptState(run, 12)
    assert len(wrong) >= min(times, 2)


def test_no_room_for_what_is_fetched_is_a_clear_error(monkeypatch, bucket) -> None:
    run = keep(bucket.place(""))

    def full(self: ObjectPath, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ObjectPath, "copy_into", full)
    with pytest.raises(WriteError, match="the disk is full"):
        KeptState(run, 12)
