"""Training: what is trained, what is stored, and what is told."""

from __future__ import annotations

import io
import math
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from capture.batches import BatchOrder, mix
from capture.config import TrainConfig
from capture.models import build_model
from capture.store import UsageError, WriteError, open_run
from capture.tasks import build_task
from capture.train import evaluate, train
from capture.training import deterministic, prepare
from tests.capture.noisy_training import (
    SETTINGS,
    TOTAL,
    assert_same_files,
    quick,
    settings,
    working_in,
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with working_in(tmp_path_factory.mktemp("train")) as folder:
        yield folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    train(settings(), folder / "uninterrupted.zarr")
    return folder / "uninterrupted.zarr"


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


def test_small_tasks_take_one_thread_unless_told(folder):
    now = torch.get_num_threads()
    train(quick(max_steps=2), folder / "one.zarr")
    train(quick(max_steps=2, threads=2), folder / "two.zarr")
    for name, threads in (("one", 1), ("two", 2)):
        attributes = open_run(folder / f"{name}.zarr").attributes
        assert (attributes["threads"], attributes["config"]["threads"]) == (threads, threads)
    assert torch.get_num_threads() == now


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
    with deterministic():
        torch.set_num_threads(threads + 1)
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
