"""Gradients of other batches: what they are, that they leave no trace, and may come later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from analyze import measure_run
from capture import Recorder
from capture.config import read_config
from capture.gradients import Probe, undisturbed
from capture.models import build_model
from capture.probe import probe_run
from capture.store import (
    MismatchError,
    RunWriter,
    UnfinishedError,
    UnknownNameError,
    UsageError,
    open_run,
    verify_run,
)
from capture.stored_weights import load_weights
from capture.streams import parse_streams
from capture.tasks import build_task
from capture.train import train

ROOT = Path(__file__).parents[2]
STREAMS = "fixed:3,heldout:2,full@epoch,full:eval@epoch,shuffled-labels:2"
NAMES = ("fixed", "heldout", "full", "full-eval", "shuffled-labels")

# BatchNorm and dropout, which a probe could disturb; samples that are transformed at random.
MODULE = """
import torch
from torch import nn
from capture.tasks.digits import Digits

def noisy(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(16, num_classes),
    )

class Shifted(Digits):
    def augment(self, sample, generator):
        image, label = sample
        return torch.roll(image, int(generator.integers(-1, 2)), 2), label

def shifted(data_root=None):
    return Shifted()
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    (folder / "probed_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))  # also where worker processes start
        yield folder
    sys.modules.pop("probed_module", None)


def settings(**changes):
    flags = {"task": "probed_module:shifted", "model": "probed_module:noisy", "max_steps": 30}
    return read_config(flags={**flags, "every": "11", "threads": 1, **changes})


@pytest.fixture(scope="module")
def live(folder):
    """Recorded together with every probe."""
    train(settings(gradients=f"minibatch,{STREAMS}"), folder / "live.zarr")
    return folder / "live.zarr"


@pytest.fixture(scope="module")
def plain(folder):
    """The same training without them."""
    train(settings(), folder / "plain.zarr")
    return folder / "plain.zarr"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock" and ".straightway/0" not in str(path)
    }


def test_probes_change_no_bit_of_the_training(live, plain):
    assert files(live / "weights") == files(plain / "weights")
    assert files(live / "scalars") == files(plain / "scalars")
    assert files(live / "gradients/minibatch") == files(plain / "gradients/minibatch")


def test_a_later_probe_gives_the_same_files(live, plain):
    probe_run(plain, STREAMS)
    for name in NAMES:
        assert files(plain / "gradients" / name) == files(live / "gradients" / name)
    assert verify_run(plain).sound
    assert open_run(plain).stream("full").steps.tolist() == [0, 22, 30]
    assert open_run(plain).stream("fixed").steps.tolist() == [0, 11, 22, 30]


def test_a_fixed_batch_is_the_gradient_of_its_samples(live):
    """Against float64, with the samples and their transformation taken from what is stored."""
    run, task = open_run(live), build_task("probed_module:shifted")
    model = build_model("probed_module:noisy", task.model_args)
    load_weights(model, run, 11)
    model.train()
    facts = run.attributes["probes"]["heldout"]
    images, labels = (torch.stack(part) for part in zip(*_samples(task, facts), strict=True))
    wide = model.double()
    assert len(set(facts["samples"][0]) & set(facts["samples"][1])) == 0
    # Dropout draws float32 masks from the stored seed; the same draws serve float64.
    from capture.batches import mix

    torch.manual_seed(mix(facts["seed"], 1))
    loss = nn.functional.cross_entropy(wide(images.double()), labels)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, wide.parameters())])
    stream = run.stream("heldout")
    row = stream.row_of(11)
    found = stream.read(row, 1)
    # Float32 sums over 64 samples and 64 inputs.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert stream.losses is not None
    assert stream.losses[row, 1] == pytest.approx(loss.item(), rel=1e-5)


def test_the_table_has_the_loss_of_each_batch(live):
    rows = measure_run(str(live), ["final"])["model"].to_pandas()
    run = open_run(live)
    for name in NAMES:
        losses = run.stream(name).losses
        found = rows[rows.stream == name].sort_values(["step", "batch"]).loss.to_numpy()
        np.testing.assert_array_equal(found, losses.reshape(-1))
    minibatch = rows[rows.stream == "minibatch"]
    np.testing.assert_array_equal(minibatch.loss, run.scalar("loss")[minibatch.step])


def _samples(task, facts):
    return [task.heldout[index] for index in facts["samples"][1]]


def test_the_full_gradient_is_one_whatever_the_chunks_without_coupled_layers():
    task = build_task("digits")
    model = build_model("mlp", task.model_args)
    (request,) = parse_streams("full")
    found = [
        Probe(model, task, request, batch_size=size, data_seed=seed).measure(None)
        for size, seed in ((64, 0), (100, 0), (1437, 5))
    ]
    images, labels = task.train.tensors
    loss = nn.functional.cross_entropy(model.double()(images.double()), labels)
    dense = torch.autograd.grad(loss, list(model.parameters()))
    for measured in found:
        assert measured.loss == pytest.approx(loss.item(), rel=1e-6)
        for one, expected in zip(measured.gradient, dense, strict=True):
            # Each part is a float32 gradient.
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-7)


def test_the_full_gradient_counts_each_sample_once_and_evaluation_mode_is_another(live):
    run = open_run(live)
    assert run.attributes["probes"]["full"]["parts"] == 23  # 1,437 samples in 64s
    train_mode, eval_mode = (run.stream(name).read(0) for name in ("full", "full-eval"))
    assert not np.allclose(train_mode, eval_mode)


def test_shuffled_labels_give_another_gradient_of_the_same_images():
    task = build_task("digits")
    model = build_model("mlp", task.model_args)
    (request,) = parse_streams("shuffled-labels:1")
    probe = Probe(model, task, request, batch_size=64, data_seed=0)
    images, labels = probe._load(0)
    (indices,) = probe.describe()["samples"]
    assert torch.equal(images, task.train.tensors[0][indices])
    assert not torch.equal(labels, task.train.tensors[1][indices])
    assert torch.equal(labels.sort().values, task.train.tensors[1][indices].sort().values)


def test_undisturbed_restores_buffers_modes_and_random_numbers():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with undisturbed(model):
        model.train()
        model(torch.randn(5, 3))
        model[0]._buffers["num_batches_tracked"] = torch.tensor(99)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].training
    assert not model[1].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_interrupted_probe_goes_on_and_is_the_same(folder, live):
    train(settings(), folder / "killed.zarr")
    run = folder / "killed.zarr"
    code = (
        "import os, signal, sys; sys.path.insert(0, '')\n"
        "from capture.store import RunWriter\n"
        "commit, done = RunWriter.commit, []\n"
        "def dying(self, *a, **k):\n"
        "    done.append(1)\n"
        "    if len(done) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return commit(self, *a, **k)\n"
        "RunWriter.commit = dying\n"
        "from capture.probe import probe_run\n"
        f"probe_run({str(run)!r}, {STREAMS!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    # What there is can be measured and verified meanwhile.
    assert verify_run(run).sound
    assert not open_run(run).stream("fixed").finished
    assert sum(len(stream.commits) for stream in open_run(run).streams.values()) > 7
    probe_run(run, STREAMS)
    for name in NAMES:
        assert files(run / "gradients" / name) == files(live / "gradients" / name)
    assert probe_run(run, STREAMS).rows == dict.fromkeys(NAMES, 0)


def test_a_subset_of_steps_then_more_and_replacing(folder):
    train(settings(), folder / "subset.zarr")
    run = folder / "subset.zarr"
    probe_run(run, "fixed:2", steps=[11])
    assert open_run(run).stream("fixed").steps.tolist() == [11]
    probe_run(run, "fixed:2", steps=[11, 30])
    assert open_run(run).stream("fixed").steps.tolist() == [11, 30]
    with pytest.raises(UsageError, match="goes up to step 30, and step 0 is missing"):
        probe_run(run, "fixed:2")
    with pytest.raises(MismatchError, match="of other batches"):
        probe_run(run, "fixed:3")
    with pytest.raises(UnknownNameError, match="no weights are saved at step 12"):
        probe_run(run, "fixed:2", steps=[12])
    probe_run(run, "fixed:3", replace_streams=True)
    assert open_run(run).stream("fixed").steps.tolist() == [0, 11, 22, 30]
    assert verify_run(run).sound


def test_other_data_are_refused_and_steps_without_weights_are_told(folder, plain, caplog):
    text = (
        MODULE
        + """
def fewer(data_root=None):
    task = Shifted()
    task.train = torch.utils.data.TensorDataset(*task.train[:1400])
    return task
"""
    )
    (folder / "fewer_module.py").write_text(text)
    with pytest.raises(MismatchError, match=r"it had 1437 samples \(train\), here are 1400"):
        probe_run(plain, "fixed", changes={"task": "fewer_module:fewer"})
    probe_run(plain, "full@5", replace_streams=True)
    assert "full: no weights are saved at 5 of the steps that are due" in caplog.text


def test_what_cannot_be_probed_is_refused(folder, plain):
    with pytest.raises(UsageError, match="only gradients of other batches"):
        probe_run(plain, "minibatch")
    with pytest.raises(MismatchError, match="the model is not that of the run"):
        probe_run(plain, "fixed", changes={"model": "mlp"})
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder("own.zarr", model, optimizer):
        model(torch.ones(2)).sum().backward()
        optimizer.step()
    with pytest.raises(UsageError, match="recorded by a loop of your own"):
        probe_run("own.zarr", "fixed")
    writer = RunWriter.create("open.zarr", open_run("own.zarr").table, streams={})
    writer.close()
    with pytest.raises(UnfinishedError, match="has not finished"):
        probe_run("open.zarr", "fixed")
    with pytest.raises(UsageError, match="a loop's own step does not give this stream: fixed"):
        Recorder("x.zarr", model, torch.optim.SGD(model.parameters(), lr=0.1), gradients="fixed")


def test_a_stopped_training_with_probes_ends_as_the_uninterrupted_one(folder, live):
    """Stopped by a disk that refuses; then resumed, with worker processes."""
    config = settings(gradients=f"minibatch,{STREAMS}", checkpoint_every=9)

    def refuse(writer, stream, *rest, step, **more):
        if stream == "fixed" and step == 22:
            raise KeyboardInterrupt
        return commit(writer, stream, *rest, step=step, **more)

    commit = RunWriter.commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "commit", refuse)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder / "stopped.zarr")
    train(
        settings(gradients=f"minibatch,{STREAMS}", checkpoint_every=9, workers=2),
        folder / "stopped.zarr",
        resume=True,
    )
    for name in ("weights", *(f"gradients/{name}" for name in (*NAMES, "minibatch"))):
        assert files(folder / "stopped.zarr" / name) == files(live / name)
