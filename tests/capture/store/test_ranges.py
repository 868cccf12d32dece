"""Shards on an object store, read by range: which bytes are asked for, and what damage gives.

The server is moto's, a process on this machine; see `bucket` in tests/capture/conftest.py. Chunks
are made small, so that a small run has many of them.
"""

from __future__ import annotations

import time
import tracemalloc
import weakref
from datetime import timedelta
from threading import Lock

import numpy as np
import pytest
from crc32c import crc32c

from capture.store import (
    DamagedError,
    InputError,
    export_state_dict,
    fetch_ahead,
    fetched_shard,
    layout,
    object_store,
    open_run,
    verify_run,
)
from capture.store.shard import ShardLayout

CHUNK_BYTES, CHUNKS, PADDING = 4096, 10, 4 * 8
SIZE = (CHUNK_BYTES * CHUNKS - PADDING) // 4
ROW = 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few and short waits between requests that fail."""
    monkeypatch.setattr(object_store, "RETRIES", 4)
    monkeypatch.setattr(object_store, "FIRST_WAIT", timedelta(milliseconds=1))
    monkeypatch.setattr(object_store, "LONGEST_WAIT", timedelta(milliseconds=10))


@pytest.fixture
def table(sample):
    return sample.big_table(SIZE)


@pytest.fixture
def weights(bucket, sample, table):
    """The weights of a run whose shards have ten chunks each."""
    sample.record(bucket.address(), 2, table, {"minibatch": None})
    stream = open_run(bucket.address()).stream("weights")
    assert (stream.grid.num_chunks, stream.grid.chunk_bytes) == (CHUNKS, CHUNK_BYTES)
    return stream


def chunk_of(values, chunk):
    return values[chunk * CHUNK_BYTES // 4 : (chunk + 1) * CHUNK_BYTES // 4]


def settled(seen):
    """How many answers there are once no more come."""
    count = -1
    while count != len(seen):
        count = len(seen)
        time.sleep(0.2)
    return count


# Which bytes are asked for.


def test_a_chunk_costs_its_own_bytes(bucket, sample, table, weights):
    seen = bucket.fail(lambda method, path: None)
    expected = sample.values(table, "weights", ROW)
    with weights.open(ROW) as shard:
        assert seen == []
        np.testing.assert_array_equal(shard.chunk(3), chunk_of(expected, 3))
        np.testing.assert_array_equal(shard.chunk(9), chunk_of(expected, 9))
        shard.verify_chunk(3)
        shard.confirm(9, None)
    path = f"/{bucket.name}/run.zarr/weights/value/c/{ROW}/0"
    assert seen == [("GET", path, CHUNK_BYTES)] * 2


def test_parts_of_a_chunk_are_confirmed_together(bucket, sample, table, weights):
    seen = bucket.fail(lambda method, path: None)
    expected = chunk_of(sample.values(table, "weights", ROW), 9).tobytes()
    with weights.open(ROW) as shard:
        parts = [bytes(shard.read_part(9, *span)) for span in ((0, 100), (100, len(expected)))]
        assert b"".join(parts) == expected
        shard.confirm(9, crc32c(expected))
        with pytest.raises(DamagedError, match="inner chunk 9 does not match"):
            shard.confirm(9, crc32c(expected[:-1]))
    assert [size for _, _, size in seen] == [100, len(expected) - 100, PADDING, PADDING]


def test_the_rest_costs_its_own_bytes(bucket, weights, table):
    seen = bucket.fail(lambda method, path: None)
    shape = ShardLayout("weights", table)
    with weights.open(ROW) as shard:
        assert shard.data_start == shape.data_start
        shard.verify_rest()
        shard.verify_rest()
        assert [size for _, _, size in seen] == [shape.data_start, shape.size - shape.value_end]
        header, tail = shard.read_rest()
    assert header == shape.header(1)
    assert tail.endswith(shape.index)


def test_a_row_is_fetched_once_and_in_full(bucket, sample, table, weights):
    seen = bucket.fail(lambda method, path: None)
    found = weights.read(ROW)
    np.testing.assert_array_equal(found, sample.values(table, "weights", ROW))
    assert len(seen) == CHUNKS + 2
    assert sum(size for _, _, size in seen) == weights.commits[ROW].size


def test_a_small_shard_comes_with_one_request(bucket, sample):
    sample.record(bucket.address())
    run = open_run(bucket.address())
    seen = bucket.fail(lambda method, path: None)
    for name, batch in (("weights", None), ("fixed", 1)):
        found = run.stream(name).read(ROW, batch)
        np.testing.assert_array_equal(found, sample.values(sample.TABLE, name, ROW, batch))
    assert sum("/c/" in path for _, path, _ in seen) == 2


def test_what_is_asked_for_ahead_is_bounded_and_comes_once(bucket, sample, weights, monkeypatch):
    monkeypatch.setattr(fetched_shard, "AHEAD_BYTES", 4 * CHUNK_BYTES)
    seen = bucket.fail(lambda method, path: None)
    rows = [weights.open(row) for row in (2, 0)]
    fetch_ahead(rows, range(5, 8))
    assert settled(seen) == 4
    for chunk in range(5, 8):
        for row in rows:
            row.chunk(chunk)
    assert settled(seen) == 6
    assert {size for _, _, size in seen} == {CHUNK_BYTES}
    fetch_ahead(rows, range(10))
    for row in rows:
        row.close()
    assert settled(seen) <= 6 + 4 + 2 * 2  # chunk 0 brings the rest along


def test_requests_are_in_flight_together(bucket, weights):
    lock, now, most = Lock(), 0, 0

    def slow(method, path):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1

    bucket.fail(slow)
    weights.read(ROW)
    assert 4 < most <= fetched_shard.IN_FLIGHT


def test_a_shard_is_never_whole_in_memory(bucket, sample, monkeypatch):
    monkeypatch.setattr(layout, "TARGET_CHUNK_BYTES", 2**16)
    monkeypatch.setattr(fetched_shard, "AHEAD_BYTES", 4 * 2**16)
    sample.record(bucket.address(), 1, sample.big_table(2**20), {})
    weights = open_run(bucket.address()).stream("weights")
    tracemalloc.start()
    try:
        with weights.open(0) as shard:
            fetch_ahead([shard], range(weights.grid.num_chunks))
            for chunk in range(weights.grid.num_chunks):
                values = shard.chunk(chunk)
                shard.verify_chunk(chunk)
            given = weakref.ref(values.base)
            del values
            assert given() is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert weights.commits[0].size > 2**22
    assert peak < 2**20


# What is read there as elsewhere.


def test_verify_and_export_work_there(bucket, sample, table, weights, tmp_path):
    found = verify_run(bucket.address())
    assert (found.problems, found.shards) == ([], 5)
    sample.record(tmp_path / "run.zarr", 2, table, {"minibatch": None})
    export_state_dict(bucket.address(), 2, tmp_path / "remote.safetensors")
    export_state_dict(tmp_path / "run.zarr", 2, tmp_path / "local.safetensors")
    remote, near = (tmp_path / f"{name}.safetensors" for name in ("remote", "local"))
    assert remote.read_bytes() == near.read_bytes()


# What goes wrong on the way.


def the_first(count, fault):
    """A fault of the first so many requests for shards."""
    asked = []

    def pick(method, path):
        if "/c/" in path:
            asked.append(path)
            return fault if len(asked) <= count else None
        return None

    return pick


@pytest.mark.parametrize("fault", ["short", "flip", "cut", "close", "busy"])
def test_a_part_that_is_damaged_once_is_fetched_again(bucket, sample, table, weights, fault):
    seen = bucket.fail(the_first(1, fault))
    with weights.open(ROW) as shard:
        found = shard.chunk(4)
    np.testing.assert_array_equal(found, chunk_of(sample.values(table, "weights", ROW), 4))
    assert 1 <= len(seen) <= 2
    bucket.fail(the_first(1, fault))
    with weights.open(ROW) as shard:
        shard.verify_rest()


PARTS = {
    "inner chunk 4": lambda shard: shard.chunk(4),
    "inner chunk 9": lambda shard: shard.verify_chunk(9),
    "header, buffers (and|or) index": lambda shard: shard.verify_rest(),
}
WORDS = {
    "flip": "not match",
    "short": r"bytes arrived of \d+, twice.*network",
    "gone": "the file is missing",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", WORDS)
def test_a_part_that_stays_damaged_gives_nothing(bucket, weights, fault, part):
    seen = bucket.fail(the_first(99, fault))
    with weights.open(ROW) as shard, pytest.raises(DamagedError) as caught:
        PARTS[part](shard)
    message = str(caught.value)
    assert caught.match(WORDS[fault])
    assert caught.match(part)
    assert message.startswith("row 1 (step 1) of 'weights': ")
    assert f"s3://{bucket.name}/run.zarr/weights/value/c/1/0" in message
    assert "\n" not in message
    # What is gone is not asked for again; of the rest there are two parts.
    assert len(seen) <= (1 if fault == "gone" else 4)


@pytest.mark.parametrize("fault", ["busy", "close", "cut"])
def test_a_store_that_does_not_answer_is_no_damage(bucket, weights, fault):
    bucket.fail(the_first(99, fault))
    with weights.open(ROW) as shard, pytest.raises(InputError, match="does not give") as caught:
        shard.chunk(4)
    assert not isinstance(caught.value, DamagedError)
    assert "weights/value/c/1/0" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1000, 3 * CHUNK_BYTES, -1, "one more"])
def test_an_object_of_another_size_gives_nothing(bucket, weights, size):
    place = bucket.place(f"weights/value/c/{ROW}/0")
    data = place.read_bytes()
    place.write_bytes(data + b"\0" if size == "one more" else data[:size])
    for part in PARTS.values():
        with weights.open(ROW) as shard, pytest.raises(DamagedError, match="were committed"):
            part(shard)


def test_damage_that_comes_ahead_is_told_when_it_is_used(bucket, weights):
    place = bucket.place(f"weights/value/c/{ROW}/0")
    data = bytearray(place.read_bytes())
    with weights.open(ROW) as shard:
        data[shard.data_start + 2 * CHUNK_BYTES] ^= 1
        place.write_bytes(data)
        fetch_ahead([shard], range(CHUNKS))
        shard.chunk(0)
        shard.chunk(1)
        with pytest.raises(DamagedError, match="inner chunk 2 does not match"):
            shard.chunk(2)
        shard.chunk(3)


def test_a_log_that_is_cut_off_is_damaged(bucket, weights):
    place = bucket.place("weights/value/.straightway/commits.jsonl")
    place.write_bytes(place.read_bytes()[:-10])
    with pytest.raises(DamagedError, match="commit log is cut off"):
        open_run(bucket.address()).stream("weights")
