"""A training that was stopped and resumed is, file by file, the one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from capture.config import TrainConfig
from capture.interruption import Interrupted
from capture.store import MismatchError, open_run
from capture.train import train
from tests.capture.noisy_training import (
    SETTINGS,
    TOTAL,
    assert_same_files,
    files_of,
    quick,
    settings,
    working_in,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with working_in(tmp_path_factory.mktemp("train")) as folder:
        yield folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    train(settings(), folder / "uninterrupted.zarr")
    return folder / "uninterrupted.zarr"


def interrupt(run: Path, signum: int, *arguments: str) -> int:
    """Start the training of SETTINGS as a program, signal it in mid-run; return its exit code."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    program = "from capture.cli import main; main(prog_name='capture')"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "train", *flags, *arguments, f"--out={run}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    # Between the second resume state and the end.
    while not (run / "weights/value/c/20/0").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    if signum == signal.SIGINT:
        # As Ctrl-C in a terminal: the processes that load data get it too.
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    if signum != signal.SIGKILL:
        assert "error: interrupted after step" in errors
        assert "--resume" in errors
        assert "Traceback" not in errors
    return process.returncode


@pytest.mark.parametrize(
    ("signum", "code", "arguments"),
    [
        (signal.SIGINT, 130, ["--workers=2"]),
        (signal.SIGTERM, 143, []),
        (signal.SIGKILL, -signal.SIGKILL, []),
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_stopped_and_resumed_run_is_the_same_files(
    folder, uninterrupted, signum, code, arguments
):
    run = folder / f"stopped-{code}.zarr"
    assert interrupt(run, signum, *arguments) == code
    stopped = open_run(run)
    assert stopped.status == "recording"
    # No row was added for the signal.
    assert set(stopped.stream("weights").steps) < set(
        open_run(uninterrupted).stream("weights").steps
    )
    summary = train(settings(), run, resume=True)
    assert summary.steps == TOTAL
    assert_same_files(run, uninterrupted)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_training_after_the_step(folder, signum, code):
    import noisy_module

    watched = noisy_module.Watched
    config = quick(task="noisy_module:watched", max_steps=9)
    train(config, folder / f"whole-{code}.zarr")
    before = signal.getsignal(signum)
    watched.calls, watched.at, watched.action = 0, 4, lambda: os.kill(os.getpid(), signum)
    run = folder / f"signalled-{code}.zarr"
    with pytest.raises(Interrupted, match=r"after step 4 of 9.*--resume") as caught:
        train(config, run)
    assert caught.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert open_run(run).stream("weights").steps.tolist() == [0, 1, 2, 3]
    train(config, run, resume=True)
    assert_same_files(run, folder / f"whole-{code}.zarr")


def test_a_signal_in_the_last_step_changes_nothing(folder):
    import noisy_module

    watched = noisy_module.Watched
    watched.calls, watched.at = 0, 5
    watched.action = lambda: os.kill(os.getpid(), signal.SIGTERM)
    train(quick(task="noisy_module:watched"), folder / "last.zarr")
    assert open_run(folder / "last.zarr").complete


def test_resuming_a_complete_run_does_nothing(folder):
    train(quick(), folder / "complete.zarr")
    before = files_of(folder / "complete.zarr")
    assert train(quick(), folder / "complete.zarr", resume=True).already_complete
    assert files_of(folder / "complete.zarr") == before


def test_resuming_what_is_not_there_starts_it(folder):
    train(quick(), folder / "new.zarr", resume=True)
    assert open_run(folder / "new.zarr").complete


def test_resuming_with_another_configuration_is_refused(folder):
    run = folder / "config.zarr"
    train(quick(), run)
    with pytest.raises(MismatchError, match=r"lr was 0\.01 and is now 0\.5, every was '1' and"):
        train(quick(lr=0.5, every="2"), run, resume=True)


def test_resuming_with_a_changed_learning_rate_file_is_refused(folder):
    (folder / "lr.csv").write_text("step,lr\n0,0.1\n4,0.5\n")
    run = folder / "file.zarr"
    train(quick(lr_schedule="lr.csv"), run)
    assert open_run(run).scalar("lr").tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    (folder / "lr.csv").write_text("step,lr\n0,0.1\n4,0.6\n")
    with pytest.raises(MismatchError, match=r"the file lr\.csv was changed"):
        train(quick(lr_schedule="lr.csv"), run, resume=True)


def test_another_number_of_threads_is_told_when_resuming(folder, caplog, monkeypatch):
    import noisy_module

    watched = noisy_module.Watched
    watched.calls, watched.at = 0, 3
    watched.action = lambda: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(watched, "defaults", {"model": "mlp"})
    config = quick(task="noisy_module:watched")
    with pytest.raises(Interrupted):
        train(config, folder / "threads.zarr")
    now = torch.get_num_threads()
    try:
        torch.set_num_threads(now + 1)
        train(config, folder / "threads.zarr", resume=True)
    finally:
        torch.set_num_threads(now)
    assert f"began with {now} threads of torch and goes on with {now + 1}" in caplog.text


def test_runs_of_earlier_versions_do_not_tell_their_threads_and_go_on():
    earlier, now = TrainConfig("digits"), TrainConfig("digits", threads=1)
    assert earlier.difference(now) is None
    assert now.difference(TrainConfig("digits", threads=2)) == "threads was 1 and is now 2"
