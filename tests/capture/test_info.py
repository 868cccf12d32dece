"""What `capture info` says of runs that are not complete, not ours, or odd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn, optim

from capture import Recorder
from capture.info import describe_run, format_description
from capture.store import DamagedError, RunWriter


def lines(path: Path) -> dict[str, str]:
    text = format_description(describe_run(path))
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def recorder_of(path: Path) -> tuple[Recorder, optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return Recorder(path, model, optimizer, every=2), optimizer


def test_a_run_of_a_recorder_from_beginning_to_end(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    recorder, optimizer = recorder_of(path)
    assert lines(path)["status"] == "being recorded"
    for rate in (0.5, 0.5, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError
    shown = lines(path)
    expected = "incomplete, weights up to step 2; go on with --resume (resume=True in a Recorder)"
    assert shown["status"] == expected
    assert shown["optimizer"] == "SGD, lr 0.25 to 0.5, momentum 0.9"
    assert describe_run(path)["settings"] == {"lr": [0.25, 0.5], "momentum": [0.9, 0.9]}


def test_looking_does_not_keep_a_writer_out(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    recorder, optimizer = recorder_of(path)
    optimizer.step()
    recorder.checkpoint()
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError
    assert describe_run(path)["being_recorded"] is False
    RunWriter.reopen(path).close()


@pytest.mark.parametrize(("name", "value"), [("config", 3), ("optimizer", []), ("seeds", "x")])
def test_odd_attributes_are_damage_and_no_traceback(
    tmp_path: Path, name: str, value: object
) -> None:
    path = tmp_path / "run.zarr"
    torch.manual_seed(0)
    recorder, optimizer = recorder_of(path)
    with recorder:
        optimizer.step()
    writer = RunWriter.reopen(path)
    writer.update_attributes(**{name: value})
    writer.close()
    with pytest.raises(DamagedError, match=f"attribute {name} is no table"):
        describe_run(path)


def test_a_probe_that_was_stopped_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    recorder, optimizer = recorder_of(path)
    with recorder:
        optimizer.step()
    writer = RunWriter.reopen(path)
    writer.add_stream("full", None)
    stopped = "; not finished, give the same `capture probe` again"
    assert lines(path)["full"] == f"nothing recorded yet{stopped}"
    writer.commit("full", writer.staging("full"), step=0)
    writer.close()
    assert lines(path)["full"].endswith(
        "at steps 0; not finished, give the same `capture probe` again"
    )
    assert "again" not in lines(path)["weights"]
    RunWriter.reopen(path).finish(1)
    assert "again" not in lines(path)["full"]
