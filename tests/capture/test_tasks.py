"""The digits against scikit-learn's own arrays, and the order of the batches."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from capture.batches import BatchOrder, load_batches
from capture.models import build_model
from capture.store.errors import UsageError
from capture.tasks import build_task


@pytest.fixture(scope="module")
def digits():
    return build_task("digits")


def test_digits_are_split_80_to_20_without_overlap(digits):
    """Each image of scikit-learn is found once, in the one part or the other, with its label."""
    train, train_labels = digits.train.tensors
    heldout, heldout_labels = digits.heldout.tensors
    assert train.shape == (1437, 1, 8, 8)
    assert heldout.shape == (360, 1, 8, 8)
    source = load_digits()
    # Standardised with one mean and deviation, so pixel values keep their order and ratios.
    ours = torch.cat([train, heldout]).flatten(1).double().numpy()
    pixels = (ours - ours.min()) / (ours.max() - ours.min()) * 16
    labels = torch.cat([train_labels, heldout_labels]).numpy()
    found = np.column_stack([pixels.round(), labels])
    expected = np.column_stack([source.data, source.target])
    assert np.array_equal(np.unique(found, axis=0), np.unique(expected, axis=0))
    assert train.mean().abs() < 1e-5  # float32 sum of 1e5 numbers of order 1
    assert abs(train.std() - 1) < 1e-5


def test_the_split_does_not_depend_on_the_seed(digits):
    torch.manual_seed(123)
    assert torch.equal(build_task("digits").train.tensors[1], digits.train.tensors[1])


def test_digits_loss_and_metrics_are_means(digits):
    model = build_model("mlp", digits.model_args)
    batch = [tensor[:50] for tensor in digits.heldout.tensors]
    logits = model(batch[0]).double().log_softmax(1)
    expected = -logits[torch.arange(50), batch[1]].mean()
    metrics = digits.metrics(model, batch)
    assert digits.loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)  # float32
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    right = sum(int(row.argmax()) == int(label) for row, label in zip(logits, batch[1]))  # noqa: B905
    assert metrics["accuracy"].item() == pytest.approx(right / 50)


def test_each_epoch_is_another_permutation_without_its_last_partial_batch():
    order = BatchOrder(103, 10, seed=5)
    assert order.steps_per_epoch == 10
    first, second = (list(chain(*order.epoch(epoch))) for epoch in (0, 1))
    assert len(set(first)) == len(set(second)) == 100
    assert set(first) <= set(range(103))
    assert first != second
    assert BatchOrder(103, 10, seed=6).epoch(0) != order.epoch(0)
    # Seed and epoch are mixed, not added.
    assert BatchOrder(103, 10, seed=6).epoch(0) != order.epoch(1)


def test_batches_can_be_taken_up_anywhere():
    whole = list(BatchOrder(103, 10, 5, stop=35))
    assert len(whole) == 35
    assert whole[:10] == BatchOrder(103, 10, 5).epoch(0)
    for start in (0, 1, 10, 27, 34, 35):
        assert list(BatchOrder(103, 10, 5, start=start, stop=35)) == whole[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_gives_the_named_samples_and_draws_no_random_numbers(digits, workers):
    order = BatchOrder(1437, 64, 0, start=21, stop=24)
    before = torch.get_rng_state()
    batches = list(load_batches(digits.train, order, workers=workers, device=torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), before)
    for (images, labels), indices in zip(batches, order, strict=True):
        assert torch.equal(images, digits.train.tensors[0][indices])
        assert torch.equal(labels, digits.train.tensors[1][indices])


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match="a batch of 64 does not fit into 63"):
        BatchOrder(63, 64, 0)


def test_a_task_from_any_module(tmp_path, monkeypatch):
    """Found in the working directory; its arguments are handed on; what it lacks is named."""
    (tmp_path / "mine_task.py").write_text(
        "from types import SimpleNamespace\n"
        "def make(data_root=None, size=1):\n"
        "    return SimpleNamespace(train=range(size), heldout=None, defaults={}, model_args={},\n"
        "        loss=None, metrics=None)\n"
        "def half(data_root=None):\n"
        "    return SimpleNamespace(train=[], heldout=None, defaults={}, model_args={})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert isinstance(build_task("mine_task:make", task_args={"size": 7}), SimpleNamespace)
    assert len(build_task("mine_task:make", task_args={"size": 7}).train) == 7
    with pytest.raises(UsageError, match="the task mine_task:half lacks loss, metrics"):
        build_task("mine_task:half")
    with pytest.raises(UsageError, match="it takes"):
        build_task("mine_task:make", task_args={"sise": 7})


def test_an_unknown_task_suggests_the_near_one():
    with pytest.raises(UsageError, match="unknown task 'digit'; did you mean 'digits'"):
        build_task("digit")
