"""Branches: the same seed repeats the parent bit for bit, another one does not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from capture.batches import BatchOrder
from capture.config import read_config
from capture.store import MismatchError, UnknownNameError, UsageError, open_run, verify_run
from capture.train import train
from capture.training import prepare

MODULE = """
from torch import nn

def noisy(input_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(16, num_classes),
    )
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branch")
    (folder / "branched_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("branched_module", None)


def run_training(out: str, **flags):
    config = read_config(flags={"every": "10", "threads": 1, **flags})
    train(config, out)
    return open_run(out)


@pytest.fixture(scope="module")
def parent(folder):
    return run_training(
        "parent.zarr",
        task="digits",
        model="branched_module:noisy",
        lr_schedule="warmup-cosine:1",
        max_steps=60,
        keep_state="every:20",
    )


def weights(run, step: int):
    stream = run.stream("weights")
    return stream.read(stream.row_of(step))


def test_a_branch_with_the_same_order_of_the_data_repeats_the_parent(parent):
    branch = run_training("same.zarr", branch="parent.zarr@20")
    assert branch.final_step == 40
    for step in (0, 10, 40):
        np.testing.assert_array_equal(weights(branch, step), weights(parent, 20 + step))
    np.testing.assert_array_equal(branch.scalar("lr"), parent.scalar("lr")[20:])
    np.testing.assert_array_equal(branch.scalar("epoch"), parent.scalar("epoch")[20:])
    assert branch.attributes["parent"]["run"] == "parent.zarr"
    assert branch.attributes["parent"]["step"] == 20
    assert branch.attributes["optimizer_had_state"]


def test_another_order_begins_alike_and_ends_elsewhere(parent):
    branch = run_training("other.zarr", branch="parent.zarr@20", data_seed=7)
    np.testing.assert_array_equal(weights(branch, 0), weights(parent, 20))
    assert not np.array_equal(weights(branch, 40), weights(parent, 60))
    assert branch.attributes["config"]["data_seed"] == 7
    assert branch.attributes["config"]["model"] == "branched_module:noisy"


def test_a_branch_of_a_branch_goes_on_where_that_was(parent):
    run_training("first.zarr", branch="parent.zarr@20", keep_state="every:20")
    second = run_training("second.zarr", branch="first.zarr@20")
    np.testing.assert_array_equal(weights(second, 20), weights(parent, 60))


def test_the_samples_of_a_batch_are_left_out(parent):
    config = read_config(flags={"branch": "parent.zarr@20", "exclude_batch": 23, "data_seed": 7})
    training = prepare(config)
    (excluded,) = BatchOrder(1437, 64, 0).between(23, 24)
    seen = {index for batch in training.order.between(20, 60) for index in batch}
    assert len(excluded) == 64
    assert not seen & set(excluded)
    branch = run_training(
        "without.zarr", branch="parent.zarr@20", exclude_batch=23, data_seed=7, max_steps=30
    )
    assert branch.attributes["parent"]["exclude_batch"] == 23
    assert verify_run("without.zarr").sound
    with pytest.raises(UsageError, match="the parent leaves out a batch itself"):
        run_training("x.zarr", branch="without.zarr@0", exclude_batch=1, max_steps=40)


def test_a_stopped_branch_is_resumed_as_if_it_never_stopped(parent, folder):
    whole = run_training("whole.zarr", branch="parent.zarr@40", data_seed=3)
    config = read_config(
        flags={"every": "10", "threads": 1, "branch": "parent.zarr@40", "data_seed": 3}
    )
    with pytest.MonkeyPatch.context() as patch:
        from capture.store import RunWriter

        def refuse(writer, stream, *rest, step, **more):
            if step == 20 and stream == "weights":
                raise KeyboardInterrupt
            return commit(writer, stream, *rest, step=step, **more)

        commit = RunWriter.commit
        patch.setattr(RunWriter, "commit", refuse)
        with pytest.raises(KeyboardInterrupt):
            train(config, Path("halted.zarr"))
    train(config, Path("halted.zarr"), resume=True)
    np.testing.assert_array_equal(weights(open_run("halted.zarr"), 20), weights(whole, 20))


def test_what_cannot_be_branched_is_refused(parent):
    with pytest.raises(MismatchError, match="no optimizer state is kept at step 30; kept are 20"):
        run_training("x.zarr", branch="parent.zarr@30")
    with pytest.raises(UnknownNameError, match="step 31 is not recorded"):
        run_training("x.zarr", branch="parent.zarr@31")
    with pytest.raises(UsageError, match=r"write RUN.zarr@STEP"):
        run_training("x.zarr", branch="parent.zarr")
    with pytest.raises(UsageError, match="only a branch leaves out a batch"):
        run_training("x.zarr", task="digits", exclude_batch=3)
    with pytest.raises(UsageError, match="the branch begins at 60"):
        run_training("x.zarr", branch="parent.zarr@60")
    with pytest.raises(UsageError, match="the parent has updates 0 to 59"):
        run_training("x.zarr", branch="parent.zarr@20", exclude_batch=60)
    with pytest.raises(MismatchError, match="the model is not that of the parent"):
        run_training("x.zarr", branch="parent.zarr@20", model="mlp")
    assert not Path("x.zarr").exists()


def test_weights_are_saved_where_states_are_kept(folder):
    run = run_training("kept.zarr", task="digits", max_steps=9, every="4", keep_state="3")
    assert run.stream("weights").steps.tolist() == [0, 3, 4, 6, 8, 9]
    assert run.stream("minibatch").steps.tolist() == [0, 4, 8]
    branch = run_training("of-kept.zarr", branch="kept.zarr@3")
    np.testing.assert_array_equal(weights(branch, 6), weights(run, 9))


def test_a_branch_is_known_by_its_parent_not_by_the_path(parent, folder, monkeypatch):
    run_training("known.zarr", branch="parent.zarr@40", data_seed=3)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    flags = {"every": "10", "threads": 1, "data_seed": 3}
    config = read_config(flags={**flags, "branch": "../parent.zarr@40"})
    assert train(config, "../known.zarr", resume=True).already_complete
    other = read_config(flags={**flags, "branch": "../parent.zarr@20"})
    with pytest.raises(
        MismatchError, match=r"branched from parent.zarr@40, this from parent.zarr@20"
    ):
        train(other, "../known.zarr", resume=True)


def test_another_optimizer_in_a_branch_takes_its_own_defaults(parent):
    config = read_config(flags={"branch": "parent.zarr@0", "optimizer": "sgd"})
    assert (config.momentum, config.lr) == (None, None)
