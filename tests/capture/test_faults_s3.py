"""A run on an object store, measured while requests go wrong: right numbers or a clear error.

`STRAIGHTWAY_FAULT_REQUESTS` sets how many requests are made, by default few, for the sake of time:
10,000 take some minutes (and pytest's `--timeout 1800`).
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from itertools import cycle
from random import Random

import numpy as np
import pytest

from analyze.compute import compute_moments
from analyze.references import parse_reference
from capture.store import (
    DamagedError,
    StraightwayError,
    fetched_shard,
    layout,
    object_store,
    open_run,
)
from tests.analyze.small_runs import random_streams, write_run

REQUESTS = int(os.environ.get("STRAIGHTWAY_FAULT_REQUESTS", "600"))
FAULTS = ("busy", "close", "short", "flip", "gone")
EACH = 0.02
SIZES, CHUNK_BYTES = (300, 1000, 700), 1024
STREAMS = ("minibatch", "fixed")


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(object_store, "RETRIES", 4)
    monkeypatch.setattr(object_store, "FIRST_WAIT", timedelta(milliseconds=1))
    monkeypatch.setattr(object_store, "LONGEST_WAIT", timedelta(milliseconds=10))


@pytest.fixture
def values():
    return random_streams(sum(SIZES), rows=4)


@pytest.fixture
def local(tmp_path, values):
    return write_run(tmp_path / "run.zarr", SIZES, values)


@pytest.fixture
def remote(bucket, values):
    write_run(bucket.address(), SIZES, values)
    return bucket.address()


def measured(run, reference="final", rows_per_block=2):
    """The moments of all rows as bytes; none of them may be NaN, none is in the data."""
    found = compute_moments(
        run, STREAMS, [parse_reference(reference)], rows_per_block=rows_per_block
    )
    arrays = [found.streams[name].array for name in STREAMS]
    assert all(np.isfinite(array).all() for array in arrays)
    return [array.tobytes() for array in arrays]


def read(run, stream, row):
    """One row as bytes."""
    found = open_run(run).stream(stream)
    values = [found.read(row, batch) for batch in ([None] if found.batches is None else [0, 1])]
    assert np.isfinite(values).all()
    return [array.tobytes() for array in values]


QUESTIONS = {
    "moments": measured,
    "moments against a mean": lambda run: measured(run, "mean:2", 1),
    "weights": lambda run: read(run, "weights", 2),
    "gradients": lambda run: read(run, "fixed", 1),
}


def ask_until(enough, remote, expected):
    """Ask in turn until `enough()`; count the answers that are right, wrong, and clear errors."""
    outcomes, errors = Counter(), []
    for question, ask in cycle(QUESTIONS.items()):
        if enough():
            break
        try:
            outcome = "right" if ask(remote) == expected[question] else "wrong"
        except StraightwayError as error:
            errors.append(error)
            outcome = type(error).__name__
        outcomes[outcome] += 1
    for error in errors:
        assert error.exit_code == 3
        assert "\n" not in str(error)
        assert remote in str(error)
    return outcomes


def test_numbers_are_right_or_there_is_an_error(bucket, remote, local):
    expected = {question: ask(local) for question, ask in QUESTIONS.items()}
    draw, faults = Random(0), Counter()

    def pick(method, path):
        kinds = [*FAULTS, None]
        fault = draw.choices(kinds, [EACH] * len(FAULTS) + [1 - EACH * len(FAULTS)])[0]
        faults[fault] += 1
        return fault

    bucket.fail(pick)
    outcomes = ask_until(lambda: faults.total() >= REQUESTS, remote, expected)
    print(f"answers {dict(outcomes)}, requests {dict(faults)}")
    assert outcomes.keys() <= {"right", "DamagedError", "InputError", "NotARunError"}
    assert outcomes["right"] >= REQUESTS / 300
    assert outcomes["DamagedError"] >= REQUESTS / 300
    assert all(faults[fault] > REQUESTS * EACH / 3 for fault in FAULTS)


def test_without_checksums_wrong_numbers_would_come_through(bucket, remote, local, monkeypatch):
    monkeypatch.setattr(fetched_shard.FetchedShard, "_chunk_flaw", lambda *_: None)
    expected = {question: ask(local) for question, ask in QUESTIONS.items()}
    draw, requests = Random(0), Counter()

    def pick(method, path):
        requests[method] += 1
        return "flip" if "/c/" in path and draw.random() < 0.05 else None

    bucket.fail(pick)
    outcomes = ask_until(lambda: requests.total() > 300, remote, expected)
    assert outcomes["wrong"] > 0


@pytest.mark.parametrize("reference", ["final", "step:10", "mean:3", "run:{}@20"])
def test_the_numbers_are_those_of_a_disk(bucket, remote, local, reference):
    for rows in (1, 3):
        theirs = measured(remote, reference.format(remote), rows)
        assert theirs == measured(local, reference.format(local), rows)


def test_a_measurement_fetches_each_part_once(bucket, remote):
    """Of the rows that are measured; w* is in row 3, which is none of them."""
    run = open_run(remote)
    used = [(run.stream("weights"), row, None) for row in (0, 1, 2, 0, 1, 2)]
    used += [(run.stream("minibatch"), row, None) for row in range(3)]
    used += [(run.stream("fixed"), row, batch) for row in range(3) for batch in range(2)]
    sizes = [stream.open(row, batch).commit.size for stream, row, batch in used]
    seen = bucket.fail(lambda method, path: None)
    measured(remote)
    shards = [(path, size) for _, path, size in seen if "/value/c/" in path]
    fetched = [size for path, size in shards if "weights/value/c/3/" not in path]
    assert sum(fetched) == sum(sizes)
    assert len(fetched) == len(used) * (run.stream("weights").grid.num_chunks + 2)


def test_damage_to_what_was_never_asked_for_is_not_seen(bucket, remote):
    """Row 1 is gone; the rest of the run can still be read."""
    bucket.place("weights/value/c/1/0").remove()
    read(remote, "weights", 2)
    with pytest.raises(DamagedError, match=r"row 1 .*missing"):
        measured(remote)
