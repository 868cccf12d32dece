"""Resume states: what goes in comes out; damage is noticed and the state before is taken."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture.rng import restore_rng_state, rng_state
from capture.state import load_newest, save
from capture.store import DamagedError, UsageError, WriteError

TREE = {
    "numbers": [1, -2.5, float("inf"), True, None, 2**70],
    "text": "ü",
    "tuple": (1, (2, "x"), []),
    3: {"3": "text key", 3: "int key", 1.5: 0},
    "counter": Counter({30: 1, 80: 2}),
    "bf16": torch.tensor([[1.5, -2]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "array": np.arange(4, dtype=np.uint32),
    "number": np.float32(0.1),
}


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert isinstance(found, Counter) == isinstance(expected, Counter)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 12, TREE)
    step, tree, notices = load_newest(tmp_path)
    assert (step, notices) == (12, [])
    assert_same(tree, TREE)


def test_no_state(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None


def test_tensors_that_share_memory_come_back_apart_and_equal(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save(tmp_path, 0, [whole, whole, whole[2:4]])
    _, (first, second, part), _ = load_newest(tmp_path)
    assert torch.equal(first, whole)
    assert torch.equal(second, whole)
    assert part.tolist() == [2, 3]


def test_a_real_optimizer_and_scheduler_go_on_as_before(tmp_path: Path) -> None:
    def make() -> tuple[nn.Linear, optim.Adam, optim.lr_scheduler.MultiStepLR]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = optim.Adam(model.parameters(), lr=0.1, amsgrad=True)
        return model, optimizer, optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])

    def advance(parts: tuple[Any, Any, Any]) -> None:
        model, optimizer, scheduler = parts
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            scheduler.step()

    parts = make()
    advance(parts)
    save(tmp_path, 3, [part.state_dict() for part in parts])
    advance(parts)
    again = make()
    _, states, _ = load_newest(tmp_path)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    advance(again)
    assert torch.equal(parts[0].weight, again[0].weight)
    assert parts[1].param_groups[0]["lr"] == again[1].param_groups[0]["lr"]


def test_random_numbers_go_on_as_before(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    save(tmp_path, 0, rng_state())
    expected = draw()
    _, state, _ = load_newest(tmp_path)
    restore_rng_state(state)
    assert draw() == expected


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, {"w": torch.full((3,), float(step))})
    assert (
        sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 2 + [".safetensors"] * 2
    )
    assert load_newest(tmp_path)[0] == 20
    # Going back to 15 and on from there gives the later path up.
    save(tmp_path, 17, {"w": torch.zeros(3)})
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "000000015.json",
        "000000017.json",
    ]
    # The same step again replaces it.
    save(tmp_path, 17, {"w": torch.ones(3)})
    assert load_newest(tmp_path)[1]["w"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 4


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def every_damage(state: Path, data: Path) -> dict[str, Any]:
    size = data.stat().st_size
    return {
        "a flipped bit in the tensors": lambda: flip(data, size - 1),
        "a flipped bit in the header": lambda: flip(data, 12),
        "truncated tensors": lambda: os.truncate(data, size - 3),
        "trailing bytes": lambda: data.write_bytes(data.read_bytes() + b"x"),
        "no tensors": data.unlink,
        "a link": lambda: (data.rename(data.with_suffix(".moved")), data.symlink_to("elsewhere")),
        "a flipped bit in the tree": lambda: flip(state, state.stat().st_size // 2),
        "a flipped bit in the checksum": lambda: flip(state, 12),
        "truncated tree": lambda: os.truncate(state, 40),
        "empty tree": lambda: os.truncate(state, 0),
    }


@pytest.mark.parametrize("damage", list(every_damage(Path(__file__), Path(__file__))))
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, damage: str) -> None:
    for step in (5, 10):
        save(tmp_path, step, {"w": torch.full((30,), float(step)), "n": list(range(30))})
    state = tmp_path / "000000010.json"
    (data,) = tmp_path.glob("000000010-*.safetensors")
    every_damage(state, data)[damage]()
    step, tree, notices = load_newest(tmp_path)
    assert (step, tree["w"][0].item()) == (5, 5.0)
    assert len(notices) == 1
    assert "000000010" in notices[0]
    assert notices[0].endswith("falling back to the state before")


def test_no_sound_state_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    save(tmp_path, 5, {"n": 1})
    flip(tmp_path / "000000005.json", 50)
    with pytest.raises(DamagedError, match=r"no resume state is sound.*000000005\.json"):
        load_newest(tmp_path)


def test_what_cannot_be_kept_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    unkept = {
        r"a function .*state\['extra'\]\[1\]": {"extra": [1, lambda: 0]},
        r"a tuple .*state, a key": {(1, 2): 3},
        r"a ndarray .*state\['a'\]": {"a": np.array(["text"])},
        r"a Tensor .*state\['c'\]": {"c": torch.ones(2, dtype=torch.complex128)},
    }
    for words, tree in unkept.items():
        with pytest.raises(UsageError, match=words):
            save(tmp_path, 0, tree)
    assert list(tmp_path.iterdir()) == []


def test_a_refusing_disk_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, {"w": torch.ones(3)})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="the disk is full"):
        save(tmp_path, 10, {"w": torch.zeros(3)})
    monkeypatch.undo()
    assert load_newest(tmp_path)[0] == 5
    assert not list(tmp_path.glob("*.tmp"))
