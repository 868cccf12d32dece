"""Resuming in a loop of one's own: the same files, bit for bit, as a run that was never stopped."""

from __future__ import annotations

import filecmp
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture import Recorder, open_run
from capture.store import LockedError, MismatchError, UsageError
from capture.store.attributes import attributes_checksum
from capture.store.verify import verify_run

TOTAL, EVERY = 13, 3


class Stopped(Exception):
    pass


def make(seed: int = 0, width: int = 6) -> tuple[nn.Module, optim.Optimizer, Any]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model = nn.Sequential(
        nn.Linear(5, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 2)
    )
    model.unused = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, optim.lr_scheduler.StepLR(optimizer, 5, 0.7)


def run_loop(
    path: Path,
    *,
    stop_after: int | None = None,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> Recorder:
    """A user's loop: dropout and data from three generators, a checkpoint every 4 steps."""
    model, optimizer, scheduler = make(seed)
    options = {"every": EVERY, "gradients": "minibatch,updates@epoch", **options}
    with Recorder(path, model, optimizer, resume=resume, **options) as recorder:
        if recorder.restored is not None:
            scheduler.load_state_dict(recorder.restored["scheduler"])
        while recorder.step < TOTAL:
            recorder.epoch = recorder.step // 4
            x = torch.randn(8, 5) + float(np.random.rand()) + random.random()
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()
            scheduler.step()
            if recorder.step % 4 == 0:
                recorder.checkpoint(scheduler=scheduler.state_dict())
            if recorder.step == stop_after:
                raise Stopped
    return recorder


def files(run: Path) -> list[str]:
    """Every file that belongs to the data: not the lock, nor the resume states and their like."""
    found = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    return sorted(
        str(path)
        for path in found
        if ".straightway" not in path.parts or path.name == "commits.jsonl"
    )


def assert_equal_runs(one: Path, other: Path) -> None:
    assert files(one) == files(other)
    _, different, errors = filecmp.cmpfiles(one, other, files(one), shallow=False)
    assert (different, errors) == ([], [])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run.zarr"
    run_loop(path)
    return path


@pytest.mark.parametrize("stops", [(4,), (6, 11)])
def test_resumed_runs_are_the_same_files(
    tmp_path: Path, uninterrupted: Path, stops: tuple[int, ...]
) -> None:
    path = tmp_path / "run.zarr"
    for number, stop in enumerate(stops):
        with pytest.raises(Stopped):
            # Another seed: all that matters must come from the resume state.
            run_loop(path, stop_after=stop, resume=number > 0, seed=number)
        assert open_run(path).status == "recording"
    recorder = run_loop(path, resume=True, seed=99)
    assert (recorder.step, recorder.complete) == (TOTAL, True)
    assert_equal_runs(path, uninterrupted)
    assert verify_run(path).sound


def test_comparison_of_runs_can_fail(tmp_path: Path, uninterrupted: Path) -> None:
    run_loop(tmp_path / "run.zarr", seed=1)
    with pytest.raises(AssertionError):
        assert_equal_runs(tmp_path / "run.zarr", uninterrupted)


def test_automatic_checkpoints(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    path = tmp_path / "run.zarr"
    recorder = Recorder(path, model, optimizer, checkpoint_every=2, gradients="none")
    for _ in range(5):
        optimizer.step()
    with pytest.raises(Stopped), recorder:
        raise Stopped
    again = Recorder(path, *make(seed=1)[:2], gradients="none", resume=True)
    assert (again.step, again.restored) == (4, {})
    again.close()
    assert open_run(path).scalar("lr").shape == (4,)


def test_a_damaged_newest_state_falls_back_and_says_so(
    tmp_path: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(Stopped):
        run_loop(path, stop_after=9)
    (newest,) = path.rglob("000000008-*.safetensors")
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    caplog.clear()
    run_loop(path, resume=True)
    assert "falling back to the state before" in caplog.text
    assert_equal_runs(path, uninterrupted)


def test_nothing_there_yet_starts_anew(tmp_path: Path, uninterrupted: Path) -> None:
    assert run_loop(tmp_path / "run.zarr", resume=True).restored is None
    assert_equal_runs(tmp_path / "run.zarr", uninterrupted)


def test_rows_without_a_state_start_over(tmp_path: Path, uninterrupted: Path) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(Stopped):
        run_loop(path, stop_after=3)
    assert open_run(path).stream("weights").steps.tolist() == [0]
    recorder = run_loop(path, resume=True)
    assert recorder.restored is None
    assert_equal_runs(path, uninterrupted)


def test_a_complete_run_is_left_alone(tmp_path: Path, uninterrupted: Path) -> None:
    before = {name: (uninterrupted / name).stat().st_mtime_ns for name in files(uninterrupted)}
    model, optimizer, _ = make()
    with Recorder(
        uninterrupted,
        model,
        optimizer,
        every=EVERY,
        gradients="minibatch,updates@epoch",
        resume=True,
    ) as recorder:
        assert recorder.complete
        assert recorder.step == TOTAL
        optimizer.step()
        recorder.checkpoint()
    assert recorder.step == TOTAL
    assert before == {name: (uninterrupted / name).stat().st_mtime_ns for name in before}


def test_another_model_optimizer_or_schedule_is_refused_with_the_difference(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(Stopped):
        run_loop(path, stop_after=5)
    model, optimizer, _ = make()
    wider, wider_optimizer, _ = make(width=7)
    nesterov = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    same = {"every": EVERY, "gradients": "minibatch,updates@epoch", "resume": True}
    with pytest.raises(MismatchError, match=r"'0.weight' has shape \[6, 5\] here and \[7, 5\]"):
        Recorder(path, wider, wider_optimizer, **same)
    with pytest.raises(MismatchError, match="'nesterov': True"):
        Recorder(path, model, nesterov, **same)
    with pytest.raises(MismatchError, match="'weights': '4'"):
        Recorder(path, model, optimizer, **{**same, "every": 4})
    with pytest.raises(UsageError, match="a run is already recorded here"):
        Recorder(path, model, optimizer, **{**same, "resume": False})
    # None of the refusals kept the lock or changed the run.
    assert run_loop(path, resume=True).complete


def test_another_order_in_the_optimizer_is_refused(tmp_path: Path) -> None:
    """Its state knows parameters by their place alone: momentum would go to other tensors."""
    path = tmp_path / "run.zarr"
    with pytest.raises(Stopped):
        run_loop(path, stop_after=5)
    model, _, _ = make()
    turned = optim.SGD([*model.parameters()][::-1], lr=0.1, momentum=0.9)
    words = "the run's optimizer has other parameters, group 0 has 'unused' where this one has"
    with pytest.raises(MismatchError, match=words):
        Recorder(
            path,
            model,
            turned,
            every=EVERY,
            gradients="minibatch,updates@epoch",
            resume=True,
        )
    assert run_loop(path, resume=True).complete


def test_a_run_recorded_before_that_order_was_kept_goes_on(
    tmp_path: Path, uninterrupted: Path
) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(Stopped):
        run_loop(path, stop_after=5)
    root = path / "zarr.json"
    document = json.loads(root.read_text())
    entries = document["attributes"]["straightway"]
    names = [["unused", "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]]
    assert entries.pop("optimizer_parameters") == names
    entries["crc32c"] = attributes_checksum(entries)
    root.write_text(json.dumps(document))
    assert run_loop(path, resume=True).complete
    run, whole = open_run(path), open_run(uninterrupted)
    assert "optimizer_parameters" not in run.attributes
    assert list(run.stream("weights").commits) == list(whole.stream("weights").commits)
    assert run_loop(path, resume=True).complete


def test_a_second_recorder_on_the_same_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    model, optimizer, _ = make()
    recorder = Recorder(path, model, optimizer)
    with pytest.raises(LockedError, match="another process is writing"):
        Recorder(path, model, optimizer, resume=True)
    optimizer.step()
    recorder.close()
    assert open_run(path).final_step == 1


@pytest.mark.parametrize("stops", [(6,), (5, 11)])
def test_schedulers_are_part_of_automatic_states(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Stopped by an exception and resumed, with no word of the scheduler in the loop."""

    def run(path: Path, stop_after: int | None, seed: int, resume: bool) -> None:
        model, optimizer, _ = make(seed)
        scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL)
        options: dict[str, Any] = {"every": EVERY, "checkpoint_every": 4, "resume": resume}
        state = {"scheduler": scheduler}
        with Recorder(path, model, optimizer, state=state, **options) as recorder:
            while recorder.step < TOTAL:
                x = torch.randn(8, 5) + float(np.random.rand()) + random.random()
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                scheduler.step()
                if recorder.step == stop_after:
                    raise Stopped

    run(tmp_path / "whole.zarr", None, 0, False)
    path = tmp_path / "run.zarr"
    for number, stop in enumerate(stops):
        with pytest.raises(Stopped):
            run(path, stop, number, number > 0)
    run(path, None, 99, True)
    assert_equal_runs(path, tmp_path / "whole.zarr")
    rates = 0.05 * (1 + np.cos(np.pi * np.arange(TOTAL) / TOTAL))
    # torch computes the cosine step by step, in float64.
    assert open_run(path).scalar("lr") == pytest.approx(rates, rel=1e-12)


def test_a_state_of_other_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    model, optimizer, scheduler = make()
    recorder = Recorder(path, model, optimizer, state={"scheduler": scheduler})
    optimizer.step()
    recorder.checkpoint()
    with pytest.raises(Stopped), recorder:
        raise Stopped
    with pytest.raises(MismatchError, match=r"holds the state of scheduler, .* no such objects"):
        Recorder(path, model, optimizer, resume=True)
    with Recorder(path, model, optimizer, state={"scheduler": scheduler}, resume=True) as again:
        assert again.step == 1


def test_unfinished_runs_tell_of_missing_gradients(tmp_path: Path) -> None:
    model, optimizer, _ = make()
    path = tmp_path / "run.zarr"
    recorder = Recorder(path, model, optimizer)
    for _ in range(3):
        model(torch.ones(8, 5)).sum().backward()
        optimizer.step()
        if recorder.step == 2:
            recorder.checkpoint()
            assert open_run(path).attributes["gradient_missing"] == {"unused": 2}
    with pytest.raises(Stopped), recorder:
        raise Stopped
    assert open_run(path).attributes["gradient_missing"] == {"unused": 3}


def test_another_length_of_a_log_schedule_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    model, optimizer, _ = make()
    recorder = Recorder(path, model, optimizer, every="log:5", total_steps=50)
    optimizer.step()
    with pytest.raises(Stopped), recorder:
        raise Stopped
    with pytest.raises(MismatchError, match="the run has total_steps 50, this recorder 60"):
        Recorder(path, model, optimizer, every="log:5", total_steps=60, resume=True)


def test_resuming_is_refused_to_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    model, optimizer, _ = make()
    with pytest.raises(UsageError, match=r"cannot resume a training of several ranks.*0 of 2"):
        Recorder(tmp_path / "run.zarr", model, optimizer, resume=True)
    assert not (tmp_path / "run.zarr").exists()
    with Recorder(tmp_path / "run.zarr", model, optimizer):
        optimizer.step()
    assert open_run(tmp_path / "run.zarr").complete


def test_a_grad_scaler_is_part_of_automatic_states(tmp_path: Path) -> None:
    """It grows after every second step, so that a scale taken one step too early would show."""

    def run(path: Path, stop_after: int | None, resume: bool) -> None:
        model, optimizer, _ = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        options: dict[str, Any] = {"every": EVERY, "checkpoint_every": 2, "resume": resume}
        with Recorder(path, model, optimizer, state={"scaler": scaler}, **options) as recorder:
            while recorder.step < 7:
                optimizer.zero_grad()
                scaler.scale(model(torch.randn(8, 5)).square().mean()).backward()
                recorder.log(scale=scaler.get_scale())
                scaler.step(optimizer)
                scaler.update()
                if recorder.step == stop_after:
                    raise Stopped

    run(tmp_path / "whole.zarr", None, False)
    with pytest.raises(Stopped):
        run(tmp_path / "run.zarr", 5, False)
    run(tmp_path / "run.zarr", None, True)
    assert_equal_runs(tmp_path / "run.zarr", tmp_path / "whole.zarr")
    scales = open_run(tmp_path / "run.zarr").scalar("scale").tolist()
    assert scales == [8, 8, 16, 16, 32, 32, 64]
