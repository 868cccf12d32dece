"""A plan against the run that then happens."""

from __future__ import annotations

import os
import time

import pytest

from capture.config import read_config
from capture.plan import format_seconds, plan
from capture.progress import format_bytes
from capture.store import open_run
from capture.train import train


def disk_bytes(folder):
    return sum(
        os.path.getsize(os.path.join(where, name))
        for where, _, names in os.walk(folder)
        for name in names
    )


@pytest.mark.parametrize(
    "flags",
    [
        {"max_steps": 30},
        {"epochs": 2, "every": "log:9", "gradients": "updates"},
        {"model": "resnet", "max_steps": 25, "every": "epoch", "gradients": "none"},
        {"optimizer": "adam", "max_steps": 40, "every": "30", "gradients": "minibatch,updates@7"},
    ],
    ids=lambda flags: " ".join(f"{key}={value}" for key, value in flags.items()),
)
def test_a_plan_is_exact_in_rows_and_bytes(tmp_path, flags):
    config = read_config(flags={"task": "digits", **flags})
    predicted = plan(config, tmp_path / "run.zarr")
    assert list(tmp_path.iterdir()) == []
    train(config, tmp_path / "run.zarr")
    run = open_run(tmp_path / "run.zarr")
    assert predicted.total_steps == run.final_step
    assert predicted.n_parameters == run.table.num_parameters
    storage = predicted.storage
    assert storage.rows == {name: len(stream.steps) for name, stream in run.streams.items()}
    assert storage.total_shard_bytes == sum(
        os.path.getsize(file)
        for file in (tmp_path / "run.zarr").glob("**/c/*/0")
        if "value" in file.parts
    )
    # All else is an upper bound, with room for one more resume state.
    assert disk_bytes(tmp_path) <= predicted.storage.total_bytes


def test_the_times_are_those_of_a_clock(tmp_path):
    config = read_config(flags={"task": "digits", "epochs": 100})
    began = time.perf_counter()
    predicted = plan(config, tmp_path)
    elapsed = time.perf_counter() - began
    # It timed at least ten of its steps and one of its three writes at the median or above.
    assert 0 < 10 * predicted.step_seconds < elapsed
    assert predicted.storage.shard_bytes["weights"] / predicted.bytes_per_second < elapsed
    assert predicted.training_seconds == pytest.approx(2200 * predicted.step_seconds)
    assert predicted.seconds == max(predicted.training_seconds, predicted.writing_seconds)


def test_a_plan_as_json_and_as_text_says_the_same(tmp_path):
    predicted = plan(read_config(flags={"task": "digits", "max_steps": 30}), tmp_path)
    document, text = predicted.to_dict(), predicted.to_text()
    assert document["streams"]["weights"]["rows"] == 4
    assert document["shard_files"] == 7
    assert document["total_bytes"] == document["shard_bytes"] + document["other_bytes"]
    assert "30 steps of 85,002 parameters" in text
    assert "in 7 shards" in text
    assert format_bytes(document["total_bytes"]) in text


def test_a_run_far_too_long_is_planned_without_listing_its_steps(tmp_path):
    flags = {"task": "digits", "max_steps": 10**8, "every": "1+epoch", "gradients": "none"}
    predicted = plan(read_config(flags=flags), tmp_path)
    assert predicted.storage.rows == {"weights": 10**8 + 1}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (45_123_456, "45.1 MB")]
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (720, "12 min"), (27000, "7.5 h")])
def test_seconds_for_people(seconds, text):
    assert format_seconds(seconds) == text
