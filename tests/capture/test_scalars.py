"""Scalars that arrive late, with copies that arrive when a test says so: order, bound, flush."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture import Recorder, open_run
from capture.scalars import PendingScalars, on_device


class Slot:
    """A copy that takes until `there` is set, or until it is waited for."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.there = False
        self.waited = False
        self._numbers = torch.cat([t.reshape(-1).double() for t in tensors]).numpy().copy()

    def arrived(self) -> bool:
        return self.there

    def numbers(self) -> np.ndarray:
        self.waited = not self.there
        return self._numbers


class Bench:
    """A `PendingScalars` for which every tensor is late, its copies, and what it wrote."""

    def __init__(self, bound: int = 64) -> None:
        self.slots: list[Slot] = []
        self.written: list[tuple[int, dict[str, Any]]] = []
        self.pending = PendingScalars(
            lambda step, values: self.written.append((step, values)),
            is_late=lambda value: isinstance(value, torch.Tensor),
            fetch=self.fetch,
            bound=bound,
        )

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Slot:
        self.slots.append(Slot(tensors))
        return self.slots[-1]

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.written]


def test_what_is_on_the_host_passes_through_at_once() -> None:
    written = []
    pending = PendingScalars(lambda step, values: written.append((step, values)))
    norms, loss = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor(0.1)
    pending.add(7, {"norms": norms, "loss": loss, "lr": 0.5, "group_lr": [0.5, 0.25]})
    norms.zero_()  # the caller's memory is its own again
    ((step, values),) = written
    assert (step, len(pending)) == (7, 0)
    assert values["norms"].tolist() == [3.0, 4.0]
    # The float32 loss as float() gives it, and as a scalar.
    assert (values["loss"].shape, float(values["loss"])) == ((), float(loss))
    assert (values["lr"], values["group_lr"]) == (0.5, [0.5, 0.25])


def test_only_tensors_on_a_device_are_late() -> None:
    assert not any(map(on_device, (1.0, [1.0], np.zeros(2), torch.zeros(2), None)))


def test_values_keep_their_names_and_shapes() -> None:
    bench = Bench()
    late = {"a": torch.tensor(1.5), "b": torch.arange(3.0), "c": torch.tensor([7])}
    bench.pending.add(0, {"first": 0.25, **late})
    assert bench.written == []
    bench.pending.flush()
    ((_, values),) = bench.written
    assert {name: np.asarray(value).tolist() for name, value in values.items()} == {
        "first": 0.25,
        "a": 1.5,
        "b": [0.0, 1.0, 2.0],
        "c": [7.0],
    }


def test_steps_are_handed_on_in_order_as_they_arrive() -> None:
    bench = Bench()
    for step in range(4):
        bench.pending.add(step, {"loss": torch.tensor(float(step))})
    bench.slots[1].there = bench.slots[2].there = True
    bench.pending.add(4, {"loss": torch.tensor(4.0)})
    assert bench.steps == []  # the first is still under way
    bench.slots[0].there = True
    bench.pending.add(5, {"loss": torch.tensor(5.0)})
    assert bench.steps == [0, 1, 2]
    assert len(bench.pending) == 3
    assert not any(slot.waited for slot in bench.slots)


def test_a_step_without_late_values_waits_for_those_before_it() -> None:
    bench = Bench()
    bench.pending.add(0, {"loss": torch.tensor(0.0)})
    bench.pending.add(1, {"loss": 1.0})
    assert bench.steps == []
    bench.slots[0].there = True
    bench.pending.add(2, {"loss": torch.tensor(2.0)})
    assert bench.steps == [0, 1]


@pytest.mark.parametrize("bound", [0, 1, 5])
def test_no_more_than_the_bound_are_under_way(bound: int) -> None:
    bench = Bench(bound)
    for step in range(9):
        bench.pending.add(step, {"loss": torch.tensor(float(step))})
        assert len(bench.pending) == min(step + 1, bound)
    # The oldest were waited for, and no others.
    assert bench.steps == list(range(9 - bound))
    assert [slot.waited for slot in bench.slots] == [True] * (9 - bound) + [False] * bound


def test_flush_waits_for_all_and_loses_none() -> None:
    bench = Bench()
    for step in range(5):
        bench.pending.add(step, {"loss": torch.tensor(step / 4)})
    bench.pending.flush()
    assert [(step, float(values["loss"])) for step, values in bench.written] == [
        (step, step / 4) for step in range(5)
    ]
    assert len(bench.pending) == 0
    bench.pending.flush()
    assert len(bench.written) == 5


def test_a_copy_that_fails_keeps_what_came_before_it() -> None:
    bench = Bench()
    for step in range(3):
        bench.pending.add(step, {"loss": torch.tensor(float(step))})

    def fail() -> np.ndarray:
        raise RuntimeError("the device is gone")

    bench.slots[1].numbers = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="gone"):
        bench.pending.flush()
    assert bench.steps == [0]
    assert len(bench.pending) == 2


# A recorder whose every tensor is late, on the CPU.


class Stopped(Exception):
    pass


def record(
    path: Path, *, late: bool = True, stop_after: int | None = None, resume: bool = False
) -> Recorder:
    """Train for 9 steps with a checkpoint after the 4th; `late` lets no copy arrive by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Linear(3, 2))
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    with Recorder(path, model, optimizer, every=3, resume=resume) as recorder:
        if late:
            assert recorder._snapshots is not None
            recorder._snapshots.scalars = PendingScalars(
                recorder._snapshots._write_scalars,
                is_late=lambda value: isinstance(value, torch.Tensor),
                fetch=Slot,
            )
        while recorder.step < 9:
            optimizer.zero_grad()
            loss = model(torch.randn(5, 4)).square().mean()
            loss.backward()
            recorder.log(loss=loss)
            recorder.clip_grad_norm_(0.1)
            optimizer.step()
            if recorder.step == 4:
                recorder.checkpoint()
            if recorder.step == stop_after:
                raise Stopped
    return recorder


def files_of(run: Path) -> dict[str, bytes]:
    """Every file of the data: not the lock, nor the resume states."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and (".straightway" not in path.parts or path.name == "commits.jsonl")
    }


def test_late_scalars_leave_the_same_files(tmp_path: Path) -> None:
    recorder = record(tmp_path / "late.zarr")
    record(tmp_path / "prompt.zarr", late=False)
    assert files_of(tmp_path / "late.zarr") == files_of(tmp_path / "prompt.zarr")
    # They were late to the end.
    assert recorder._snapshots is not None
    assert len(recorder._snapshots.scalars) == 0


def test_a_state_and_an_error_find_all_late_scalars_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(Stopped):
        record(path, stop_after=4)
    assert len(open_run(path).scalar("loss")) == 4
    with pytest.raises(Stopped):
        record(path, stop_after=7, resume=True)
    assert len(open_run(path).scalar("loss")) == 7
    record(path, resume=True)
    record(tmp_path / "whole.zarr", late=False)
    assert files_of(path) == files_of(tmp_path / "whole.zarr")


def test_a_device_that_fails_loses_its_scalars_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Dying(Slot):
        def numbers(self) -> np.ndarray:
            raise RuntimeError("the device is gone")

    model = nn.Linear(4, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer, every=1)
    assert recorder._snapshots is not None
    for step in range(5):
        if step == 3:
            recorder._snapshots.scalars = PendingScalars(
                recorder._snapshots._write_scalars,
                is_late=lambda value: isinstance(value, torch.Tensor),
                fetch=Dying,
            )
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    # The loop's own error is what is raised.
    with pytest.raises(Stopped), recorder:
        raise Stopped
    assert "scalars of the last 2 updates are lost: the device is gone" in caplog.text
    run = open_run(tmp_path / "run.zarr")
    assert run.stream("weights").steps.tolist() == [0, 1, 2, 3, 4]
    assert len(run.scalar("grad_norm")) == 3
