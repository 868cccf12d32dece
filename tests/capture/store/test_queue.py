"""The writer thread: bounded, in order, and its failures are heard."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from capture.store import SnapshotQueue, WriteError, open_run, verify_run

SOON = 5.0  # seconds after which a test gives up on what should happen at once


@pytest.fixture
def writer(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr", streams={"minibatch": None})
    yield writer
    writer.close()


@pytest.fixture
def slow(writer, monkeypatch):
    """Let every commit wait for a permit."""
    permits, real = threading.Semaphore(0), writer.commit

    def commit(*args, **options):
        permits.acquire()
        return real(*args, **options)

    monkeypatch.setattr(writer, "commit", commit)
    return permits


def in_a_thread(function):
    """Start a call that may block; return its thread and what it will have returned or raised."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def test_what_is_submitted_is_on_disk_in_order(sample, writer, tmp_path):
    queue = SnapshotQueue(writer)
    for step in range(6):
        for stream in ("weights", "minibatch"):
            staging = queue.acquire(stream)
            sample.fill(staging, step)
            queue.submit(stream, staging, step=step)
        queue.scalars(step, {"loss": float(step)})
    queue.drain()
    writer.flush()
    run = open_run(tmp_path / "run.zarr")
    assert run.stream("weights").steps.tolist() == list(range(6))
    np.testing.assert_array_equal(run.scalar("loss"), np.arange(6.0))
    assert queue.bytes_written == 6 * sum(writer.shard_bytes.values())
    queue.close()
    assert verify_run(tmp_path / "run.zarr").sound


def test_other_calls_keep_their_place_between_commits(sample, writer):
    queue, seen = SnapshotQueue(writer), []
    for step in range(3):
        staging = queue.acquire("weights")
        queue.submit("weights", staging, step=step)
        queue.call(lambda: seen.append(len(writer.committed_steps("weights"))))
    queue.drain()
    assert seen == [1, 2, 3]
    queue.close()


def test_a_stream_has_two_buffers_and_the_third_acquire_waits(writer, slow):
    queue = SnapshotQueue(writer)
    first, second = queue.acquire("weights"), queue.acquire("weights")
    assert first is not second
    queue.submit("weights", first, step=0)
    queue.submit("weights", second, step=1)
    thread, outcome = in_a_thread(lambda: queue.acquire("weights"))
    thread.join(0.2)
    assert thread.is_alive()
    assert queue.waited_seconds == 0.0
    # Another stream has buffers of its own.
    assert queue.acquire("minibatch").layout.stream == "minibatch"
    slow.release()
    thread.join(SOON)
    assert outcome == [first]
    # It waited at least as long as this test did, less what the clock's resolution may take.
    assert queue.waited_seconds >= 0.19
    slow.release()
    queue.close()


def test_a_failure_reaches_the_next_call_whatever_it_is(sample, writer, monkeypatch):
    def full(*_, **__):
        raise WriteError("cannot write, the disk is full")

    monkeypatch.setattr(writer, "commit", full)
    queue = SnapshotQueue(writer)
    staging, other = queue.acquire("weights"), queue.acquire("weights")
    queue.submit("weights", staging, step=0)
    with pytest.raises(WriteError, match="the disk is full"):
        queue.drain()
    for call in (
        queue.check,
        queue.drain,
        lambda: queue.acquire("weights"),
        lambda: queue.acquire("minibatch"),
        lambda: queue.submit("weights", other, step=1),
        lambda: queue.scalars(0, {}),
        lambda: queue.call(lambda: None),
    ):
        with pytest.raises(WriteError, match="the disk is full"):
            call()
    assert queue.bytes_written == 0
    thread, outcome = in_a_thread(queue.close)
    thread.join(SOON)
    assert outcome == [None]


def test_nothing_is_written_after_a_failure(writer):
    queue, seen = SnapshotQueue(writer), []
    gate = threading.Event()

    def fail():
        gate.wait(SOON)
        raise WriteError("the disk is full")

    queue.call(fail)
    queue.call(lambda: seen.append("written"))
    gate.set()
    queue.close()
    assert seen == []
    with pytest.raises(WriteError):
        queue.check()


def test_an_acquire_that_waits_wakes_up_when_the_thread_fails(writer, monkeypatch):
    gate = threading.Event()

    def fail(*_, **__):
        gate.wait(SOON)
        raise WriteError("the disk is full")

    queue = SnapshotQueue(writer)
    # Both buffers of `minibatch` stay with the caller: only the failure can end the wait for them.
    held = [queue.acquire("minibatch"), queue.acquire("minibatch")]
    monkeypatch.setattr(writer, "commit", fail)
    queue.submit("weights", queue.acquire("weights"), step=0)
    thread, outcome = in_a_thread(lambda: queue.acquire("minibatch"))
    time.sleep(0.05)
    gate.set()
    thread.join(SOON)
    assert len(held) == 2
    assert [type(error) for error in outcome] == [WriteError]
    queue.close()


def test_closing_writes_what_is_queued_and_may_be_done_twice(writer):
    queue = SnapshotQueue(writer)
    queue.submit("weights", queue.acquire("weights"), step=0)
    queue.close()
    queue.close()
    assert writer.committed_steps("weights") == [0]


def test_what_was_committed_is_seen_while_the_training_pauses(sample, writer, tmp_path):
    queue = SnapshotQueue(writer)
    for step in range(3):
        staging = queue.acquire("weights")
        sample.fill(staging, step)
        queue.submit("weights", staging, step=step)
        queue.scalars(step, {"loss": 1.0})
    queue.drain()
    path, late = tmp_path / "run.zarr", time.monotonic() + SOON

    def seen():
        shape = json.loads((path / "weights/value/zarr.json").read_text())["shape"]
        known = "loss" in open_run(path).scalar_names()
        return shape[0], len(open_run(path).scalar("loss")) if known else 0

    while time.monotonic() < late and seen() != (3, 3):
        time.sleep(0.05)
    assert seen() == (3, 3)
    queue.close()


def test_a_drained_queue_leaves_the_writer_alone(writer, monkeypatch):
    """Else the thread's own flush and what the caller does meanwhile would meet in one file."""
    monkeypatch.setattr("capture.store.queue.FLUSH_SECONDS", 0.01)
    flushes = []
    flush = writer.flush
    monkeypatch.setattr(writer, "flush", lambda: (flushes.append(1), flush()))
    queue = SnapshotQueue(writer)
    time.sleep(0.1)
    assert flushes == []
    queue.scalars(0, {"loss": 1.0})
    queue.drain()
    found = len(flushes)
    assert found >= 1
    time.sleep(0.1)
    assert len(flushes) == found
    # With something to do again, what is committed is flushed in every pause.
    queue.scalars(1, {"loss": 1.0})
    late = time.monotonic() + SOON
    while time.monotonic() < late and len(flushes) == found:
        time.sleep(0.01)
    assert len(flushes) > found
    queue.close()


def test_a_run_that_is_being_recorded_verifies(sample, writer, tmp_path):
    """Again and again while rows are added: what was read of the log may be older than the rest."""
    queue = SnapshotQueue(writer)
    stop = threading.Event()

    def record():
        step = 0
        while not stop.is_set():
            for stream in ("weights", "minibatch"):
                staging = queue.acquire(stream)
                queue.submit(stream, staging, step=step)
            queue.scalars(step, {"loss": 1.0})
            queue.call(writer.flush)
            step += 1

    thread, _ = in_a_thread(record)
    try:
        for _ in range(20):
            assert [str(problem) for problem in verify_run(tmp_path / "run.zarr").problems] == []
    finally:
        stop.set()
        thread.join()
        queue.close()


def test_a_closed_queue_takes_nothing(writer):
    queue = SnapshotQueue(writer)
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.acquire("weights")
