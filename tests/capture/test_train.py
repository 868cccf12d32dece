"""Training: what is trained, what is stored, and that a stop and a resume leave no trace."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from capture.batches import BatchOrder, mix
from capture.config import TrainConfig, read_config
from capture.interruption import Interrupted
from capture.models import build_model
from capture.store import MismatchError, UsageError, WriteError, open_run
from capture.store.layout import ATTRIBUTES_CHECKSUM
from capture.tasks import build_task
from capture.train import evaluate, train
from capture.training import deterministic, prepare

ROOT = Path(__file__).parents[2]

# BatchNorm buffers and dropout: what a careless resume would get wrong. The loss of the task counts
# its calls, so that a test can do something in the midst of a step.
MODULE = """
from torch import nn
from capture.tasks.digits import Digits

def noisy(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(32, num_classes),
    )

class Watched(Digits):
    calls, at, action = 0, None, None

    def loss(self, model, batch):
        Watched.calls += 1
        if Watched.calls == Watched.at:
            Watched.action()
        return super().loss(model, batch)

def watched(data_root=None):
    return Watched()
"""

SETTINGS = {
    "task": "digits",
    "model": "noisy_module:noisy",
    "optimizer": "nesterov",
    "weight_decay": 1e-3,
    "lr_schedule": "warmup-cosine:1",
    "epochs": 10,
    "every": "7+epoch",
    "gradients": "minibatch,updates@13",
    "checkpoint_every": 25,
}
TOTAL = 10 * 22


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory with a module of the user's own."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "noisy_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend("")
        yield folder
    sys.modules.pop("noisy_module", None)


def settings(**changes) -> TrainConfig:
    return read_config(flags={**SETTINGS, **changes})


def quick(**changes) -> TrainConfig:
    return read_config(flags={"task": "digits", "max_steps": 5, "every": "1", **changes})


@pytest.fixture(scope="module")
def uninterrupted(folder):
    train(settings(), folder / "uninterrupted.zarr")
    return folder / "uninterrupted.zarr"


def files_of(run: Path) -> dict[str, bytes]:
    """Every file of a run but the lock and the resume states."""
    state = run / "weights/value/.straightway"
    found = {}
    for path in sorted(run.rglob("*")):
        is_state = path.parent == state and path.name != "commits.jsonl"
        if path.is_file() and not is_state:
            found[str(path.relative_to(run))] = path.read_bytes()
    # The number of loading processes is free to differ.
    root = json.loads(found["zarr.json"])
    entries = root["attributes"]["straightway"]
    entries["config"]["workers"] = None
    assert len(entries.pop(ATTRIBUTES_CHECKSUM)) == 8
    return {**found, "zarr.json": json.dumps(root).encode()}


def assert_same_files(one: Path, other: Path) -> None:
    ours, theirs = files_of(one), files_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_the_same_seeds_give_the_same_files(folder, uninterrupted):
    train(settings(), folder / "again.zarr")
    assert_same_files(folder / "again.zarr", uninterrupted)


def test_recording_leaves_the_training_as_a_plain_loop_would_do_it(uninterrupted):
    """The same training, written out with nothing but torch, ends at the same bits."""
    task, epochs, steps = build_task("digits"), 10, 22
    torch.manual_seed(0)
    model = build_model("noisy_module:noisy", task.model_args)
    torch.manual_seed(mix(0, 2**32))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    images, labels = task.train.tensors
    for epoch in range(epochs):
        for number, indices in enumerate(BatchOrder(1437, 64, 0).epoch(epoch)):
            t = epoch * steps + number
            after = (t - 22) / (TOTAL - 22)
            rate = (t + 1) / 23 if t < 22 else (1 + math.cos(math.pi * after)) / 2
            optimizer.param_groups[0]["lr"] = 0.01 * rate
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[indices]), labels[indices]).backward()
            optimizer.step()
    run = open_run(uninterrupted)
    rates = run.scalar("lr")
    assert rates[[0, 21, 22, TOTAL - 1]] == pytest.approx([0.01 / 23, 0.22 / 23, 0.01, rate * 0.01])
    ours = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    # The rates agree to a few units in the last place of float64, far below float32.
    np.testing.assert_array_equal(run.stream("weights").read(run.final_row()), ours)
    shard = load_file(uninterrupted / f"weights/value/c/{run.final_row()}/0")
    state = {name: shard[name] for name in model.state_dict()}
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_a_run_stores_of_itself(uninterrupted):
    run = open_run(uninterrupted)
    config = TrainConfig.from_dict(run.attributes["config"])
    assert config.to_dict().items() >= SETTINGS.items()
    assert (config.lr, config.momentum, config.batch_size) == (0.01, 0.9, 64)
    assert run.attributes["seeds"] == {"seed": 0, "data_seed": 0}
    assert run.attributes["git_commit"] is None  # the working directory is under no git
    assert run.attributes["versions"]["torch"] == torch.__version__
    assert run.attributes["threads"] == torch.get_num_threads()
    assert run.final_step == TOTAL
    multiples = {step for step in range(TOTAL) if step % 7 == 0 or step % 22 == 0}
    thirteens = set(range(0, TOTAL, 13))
    assert set(run.stream("minibatch").steps.tolist()) == multiples
    assert set(run.stream("updates").steps.tolist()) == thirteens
    assert set(run.stream("weights").steps.tolist()) == multiples | thirteens | {TOTAL}
    assert run.scalar("loss").shape == (TOTAL,)
    assert np.all(run.scalar("clip_factor") == 1.0)  # known: this loop does not clip
    np.testing.assert_allclose(run.scalar("epoch"), np.arange(TOTAL) / 22)


def test_git_commit_of_the_working_directory(folder, monkeypatch, tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.chdir(tmp_path)
    train(quick(max_steps=1), "run.zarr")
    assert open_run("run.zarr").attributes["git_commit"] == head.stdout.strip()


def test_the_seed_decides_the_weights_and_the_data_seed_the_order(folder):
    def weights(name, **changes):
        train(quick(**changes), folder / name)
        stream = open_run(folder / name).stream("weights")
        return stream.read(0), stream.read(len(stream.steps) - 1)

    first, last = weights("a.zarr", seed=1, data_seed=0)
    other_first, _ = weights("b.zarr", seed=2, data_seed=0)
    same_first, other_last = weights("c.zarr", seed=1, data_seed=5)
    assert not np.array_equal(first, other_first)
    np.testing.assert_array_equal(first, same_first)
    assert not np.array_equal(last, other_last)


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


def test_a_path_that_is_taken_is_refused(folder):
    train(quick(), folder / "taken.zarr")
    with pytest.raises(UsageError, match="a run is already recorded here"):
        train(quick(), folder / "taken.zarr")
    with pytest.raises(UsageError, match="neither empty nor a run"):
        train(quick(), folder)


def test_a_loss_that_is_nan_is_recorded_and_told_once(folder, capsys):
    train(quick(lr=1e30), folder / "nan.zarr")
    run = open_run(folder / "nan.zarr")
    assert run.complete
    assert np.isfinite(run.scalar("loss")[0])
    assert np.isnan(run.scalar("loss")[-1])
    assert capsys.readouterr().err.count("warning: the loss is") == 1


def test_another_number_of_threads_is_told_when_resuming(folder, caplog):
    import noisy_module

    watched = noisy_module.Watched
    watched.calls, watched.at = 0, 3
    watched.action = lambda: os.kill(os.getpid(), signal.SIGTERM)
    config = quick(task="noisy_module:watched", threads=None)
    with pytest.raises(Interrupted):
        train(config, folder / "threads.zarr")
    now = torch.get_num_threads()
    try:
        torch.set_num_threads(now + 1)
        train(config, folder / "threads.zarr", resume=True)
    finally:
        torch.set_num_threads(now)
    assert f"began with {now} threads of torch and goes on with {now + 1}" in caplog.text


def test_a_disk_that_is_too_small_is_refused_unless_forced(folder, monkeypatch):
    class Usage:
        free = 1_000_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(WriteError, match=r"needs .* MB and the disk has 1\.0 MB free.*--force"):
        train(quick(), folder / "small.zarr")
    assert not (folder / "small.zarr").exists()
    train(quick(max_steps=2), folder / "small.zarr", force=True)
    assert open_run(folder / "small.zarr").complete


def test_evaluation_is_the_mean_over_all_samples_and_changes_nothing():
    training = prepare(quick(model="resnet", batch_size=50))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    random = torch.get_rng_state()
    found = evaluate(training)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], v) for name, v in training.model.state_dict().items())
    assert training.model.training
    images, labels = training.task.heldout.tensors
    with torch.no_grad():
        logits = training.model.eval()(images).double()
    right = (logits.argmax(1) == labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    # 360 samples in batches of 50: the last one is smaller and must weigh less.
    assert found == pytest.approx({"loss": loss, "accuracy": right}, rel=1e-5)  # float32


def test_deterministic_puts_everything_back():
    threads = torch.get_num_threads()
    with deterministic(threads=threads + 1):
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="give --device cpu"):
        prepare(quick(device="cuda"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_on_a_terminal_and_silence_elsewhere(folder, monkeypatch, capsys):
    train(quick(max_steps=30), folder / "silent.zarr")
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stderr", terminal)
    train(quick(max_steps=30), folder / "bar.zarr")
    shown = terminal.getvalue()
    assert "30" in shown
    assert "loss" in shown
    assert "steps/s" in shown
    assert "written" in shown
