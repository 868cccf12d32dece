"""Runs on an object store: the bytes of a local run, and nothing that is not complete.

The server is moto's, a process on this machine; see `bucket` in tests/capture/conftest.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import zarr
from obstore.store import from_url

from capture.store import (
    DamagedError,
    InputError,
    LockedError,
    NotARunError,
    RunWriter,
    UsageError,
    WriteError,
    export_state_dict,
    object_lock,
    object_store,
    objects,
    open_run,
    verify_run,
)
from capture.store import writer as writer_module
from capture.store.objects import ObjectPath

ROOT = Path(__file__).parents[3]
LOCK = "weights/value/.straightway/lock"
SHARD = "weights/value/c/1/0"


def files_of(folder):
    """Bytes of every file of a local run by its path, but for the lock, which no bucket keeps."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != LOCK}


@pytest.fixture
def local(tmp_path, sample):
    """The files of the sample run, recorded on a disk."""
    sample.record(tmp_path / "local.zarr")
    return files_of(tmp_path / "local.zarr")


@pytest.fixture
def quick(monkeypatch):
    """Few and short waits between requests that fail."""
    monkeypatch.setattr(object_store, "RETRIES", 4)
    monkeypatch.setattr(object_store, "FIRST_WAIT", timedelta(milliseconds=1))
    monkeypatch.setattr(object_store, "LONGEST_WAIT", timedelta(milliseconds=10))


@pytest.fixture
def short_lock(monkeypatch):
    """A lock that is renewed, and is stale, after fractions of a second."""
    monkeypatch.setattr(object_lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(object_lock, "STALE_SECONDS", 1.0)


def every(number, fault, method=None):
    """A fault for every so many requests, the first ones pass."""
    seen = count(1)

    def pick(asked, path):
        if method in (None, asked) and next(seen) % number == 0:
            return fault
        return None

    return pick


# What is written.


@pytest.mark.parametrize("name", ["run.zarr", "deep/er/a run, ñ.zarr"])
def test_the_objects_are_the_files_of_a_local_run(bucket, sample, local, name):
    sample.record(bucket.address(name))
    assert bucket.files(name) == local


def test_a_run_in_memory_needs_no_server(sample, local):
    sample.record("memory:///in-memory.zarr")
    root = ObjectPath("memory://in-memory.zarr")
    assert {place.key: place.read_bytes() for place, _ in root.below()} == local


def test_zarr_reads_it_through_obstore(bucket, sample):
    sample.record(bucket.address())
    options = {"client_options": {"allow_http": True}}
    store = zarr.storage.ObjectStore(from_url(bucket.address(), **options), read_only=True)
    group = zarr.open_group(store, mode="r")
    np.testing.assert_array_equal(
        group["weights/value"][3], sample.values(sample.TABLE, "weights", 3)
    )
    assert group["weights/step"][:].tolist() == [0, 1, 2, 3, 4]
    assert group["scalars/loss"][:].tolist() == [1.0, 1 / 2, 1 / 3, 1 / 4]


def test_a_shard_exists_when_its_line_is_there(bucket, sample, monkeypatch):
    monkeypatch.setattr(writer_module, "FLUSH_SECONDS", 1e9)
    writer = sample.create(bucket.address())
    sample.write_steps(writer, 0, 2)
    assert SHARD in bucket.files()
    assert len(open_run(bucket.address()).stream("weights")) == 0
    assert verify_run(bucket.address()).sound
    writer.flush()
    assert open_run(bucket.address()).stream("weights").steps.tolist() == [0, 1]
    sample.write_steps(writer, 2, 3)
    writer.close()
    assert open_run(bucket.address()).stream("weights").steps.tolist() == [0, 1, 2]
    assert verify_run(bucket.address()).sound


def test_the_log_is_put_at_most_once_a_second(bucket, sample, monkeypatch):
    puts = []
    bucket.fail(lambda method, path: puts.append(path) if method == "PUT" else None)
    writer = sample.create(bucket.address())
    del puts[:]
    began = time.monotonic()
    sample.write_steps(writer, 0, 10)
    seconds = time.monotonic() - began
    assert sum("commits.jsonl" in path for path in puts) <= 3 * (seconds + 1)
    assert sum("/c/" in path for path in puts) >= 40
    writer.close()


def test_a_cut_run_goes_on_to_the_same_objects(bucket, sample, local):
    writer = sample.create(bucket.address())
    sample.write_steps(writer, 0, 3)
    writer.close()
    sample.go_on(bucket.address(), 4)
    assert bucket.files() == local
    writer = RunWriter.reopen(bucket.address(), sample.TABLE)
    writer.truncate(2)
    writer.close()
    assert open_run(bucket.address()).stream("weights").steps.tolist() == [0, 1]
    assert "weights/value/c/3/0" not in bucket.files()
    sample.go_on(bucket.address(), 4)
    assert bucket.files() == local


def test_streams_are_added_and_removed(bucket, sample, local):
    sample.record(bucket.address())
    writer = RunWriter.reopen(bucket.address())
    writer.add_stream("extra", None)
    writer.remove_stream("extra")
    writer.finish(4)
    writer.close()
    assert bucket.files() == local


def test_a_killed_writer_is_followed_by_another(bucket, sample, program, tmp_path, short_lock):
    sample.record(tmp_path / "whole.zarr", 40)
    command, environment = program
    arguments = [*command, bucket.address(), "40"]
    process = subprocess.Popen(arguments, env={**environment, **os.environ}, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while "weights/value/c/5/0" not in bucket.names():
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert LOCK in bucket.files()
    assert verify_run(bucket.address()).sound
    time.sleep(1.1)
    sample.go_on(bucket.address(), 40)
    assert bucket.files() == files_of(tmp_path / "whole.zarr")


def test_a_large_object_goes_up_in_parts_and_is_whole(bucket, monkeypatch):
    monkeypatch.setattr(objects, "WHOLE_BYTES", 2**20)
    monkeypatch.setattr(objects, "PART_BYTES", 5 * 2**20)
    asked = []
    bucket.fail(lambda method, path: asked.append(method) or None)
    data = np.random.default_rng(0).bytes(11 * 2**20)
    bucket.place("large").write_bytes(data)
    assert asked.count("PUT") == 3
    assert bucket.place("large").read_bytes() == data


def test_a_run_that_ends_at_any_change_goes_on_to_the_same_objects(tmp_path, sample, monkeypatch):
    sample.record(tmp_path / "whole.zarr", 2)
    whole = files_of(tmp_path / "whole.zarr")
    monkeypatch.setattr(writer_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(object_lock, "STALE_SECONDS", 0.0)
    monkeypatch.setattr(object_lock, "FIRST_WAIT_SECONDS", 0.0)
    left = 0

    def deadly(change):
        def changed(place, *arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise WriteError("this is the end", where=place)
            return change(place, *arguments)

        return changed

    for changes in count():
        root, left = ObjectPath(f"memory://crash-{changes}.zarr"), changes
        with monkeypatch.context() as patch:
            for name in ("write_bytes", "remove"):
                patch.setattr(ObjectPath, name, deadly(getattr(ObjectPath, name)))
            try:
                sample.go_on(root, 2)
                break
            except WriteError:
                pass
        if (root / "zarr.json").exists():
            assert verify_run(root).problems == []
        sample.go_on(root, 2)
        assert {place.key: place.read_bytes() for place, _ in root.below()} == whole, changes
    assert changes > 60


# The lock.


def test_there_is_one_writer(bucket, sample):
    writer = sample.create(bucket.address())
    with pytest.raises(
        LockedError, match=r"writing this run \(.+, process \d+, \d+ s ago\)"
    ) as caught:
        RunWriter.reopen(bucket.address())
    assert "if it was killed, the lock is free in" in str(caught.value)
    assert "then --resume" in str(caught.value)
    writer.close()
    writer.close()
    assert LOCK not in bucket.files()
    RunWriter.reopen(bucket.address()).close()


def test_the_lock_is_renewed_while_it_is_held(bucket, sample, short_lock):
    writer = sample.create(bucket.address())
    time.sleep(1.5)
    assert object_lock.is_held(ObjectPath(bucket.address(), LOCK))
    with pytest.raises(LockedError):
        RunWriter.reopen(bucket.address())
    writer.flush()
    writer.close()


def test_a_stale_lock_is_taken_over_and_its_owner_writes_no_more(bucket, sample, monkeypatch):
    monkeypatch.setattr(object_lock, "RENEW_SECONDS", 0.3)
    first = sample.create(bucket.address())
    monkeypatch.setattr(object_lock, "STALE_SECONDS", 0.0)
    second = RunWriter.reopen(bucket.address())
    time.sleep(1.0)
    with pytest.raises(WriteError, match="another process has taken this run over"):
        first.flush()
    with pytest.raises(WriteError, match="another process has taken this run over"):
        sample.write_steps(first, 0, 1)
    first.close()
    assert LOCK in bucket.files()
    second.flush()
    second.close()
    assert LOCK not in bucket.files()


@pytest.mark.parametrize("fault", ["close", "lost"])
def test_a_lock_whose_answer_is_lost_is_ours_all_the_same(bucket, sample, monkeypatch, fault):
    monkeypatch.setattr(object_lock, "FIRST_WAIT_SECONDS", 0.01)
    asked = []

    def first(method, path):
        if method == "PUT" and path.endswith("/lock"):
            asked.append(path)
            return fault if len(asked) == 1 else None
        return None

    bucket.fail(first)
    writer = sample.create(bucket.address())
    writer.flush()
    writer.close()
    assert len(asked) > 1
    assert LOCK not in bucket.files()


def test_a_lock_that_says_nothing_is_refused(bucket, sample):
    sample.create(bucket.address()).close()
    bucket.place(LOCK).write_bytes(b"what?")
    with pytest.raises(LockedError, match=r"cannot be read.*remove this object"):
        RunWriter.reopen(bucket.address())


# What goes wrong on the way.


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["busy", "close"])
def test_requests_that_fail_now_and_then_are_sent_again(bucket, sample, local, fault):
    bucket.fail(every(4, fault))
    sample.record(bucket.address())
    assert verify_run(bucket.address()).sound
    bucket.heal()
    assert bucket.files() == local


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["busy", "close"])
def test_a_store_that_refuses_for_good_ends_the_run_and_loses_nothing(bucket, sample, local, fault):
    writer = sample.create(bucket.address())
    sample.write_steps(writer, 0, 2)
    writer.flush()
    bucket.fail(lambda method, path: fault if "/minibatch/" in path and method == "PUT" else None)
    with pytest.raises(WriteError, match=r"cannot write.*minibatch.*then try again") as caught:
        sample.write_steps(writer, 2, 4)
    assert "\n" not in str(caught.value)
    bucket.heal()
    writer.close()
    assert verify_run(bucket.address()).sound
    assert open_run(bucket.address()).stream("weights").steps.tolist()[:2] == [0, 1]
    sample.go_on(bucket.address(), 4)
    assert bucket.files() == local


@pytest.mark.usefixtures("quick")
def test_a_store_that_does_not_answer_cannot_be_read(bucket, sample):
    sample.record(bucket.address())
    bucket.fail(lambda method, path: "busy")
    with pytest.raises(InputError, match=r"does not give this.*try again") as caught:
        open_run(bucket.address())
    assert not isinstance(caught.value, DamagedError)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["cut", "short", "flip"])
def test_a_body_that_is_damaged_once_is_fetched_again(bucket, sample, fault):
    sample.record(bucket.address())
    asked = []

    def once(method, path):
        if method == "GET" and SHARD in path:
            asked.append(path)
            return fault if len(asked) == 1 else None
        return None

    bucket.fail(once)
    found = open_run(bucket.address()).stream("weights").read(1)
    np.testing.assert_array_equal(found, sample.values(sample.TABLE, "weights", 1))
    assert len(asked) == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["short", "flip"])
def test_a_body_that_is_always_damaged_yields_no_number(bucket, sample, fault):
    sample.record(bucket.address())
    bucket.fail(lambda method, path: fault if method == "GET" and SHARD in path else None)
    with pytest.raises(DamagedError, match=r"row 1 \(step 1\) of 'weights'"):
        open_run(bucket.address()).stream("weights").read(1)


# What is read.


def test_damage_is_found_and_nothing_is_filled_in(bucket, sample):
    sample.record(bucket.address())
    bucket.place(SHARD).remove()
    with pytest.raises(DamagedError, match=r"row 1.*the file is missing"):
        open_run(bucket.address()).stream("weights").read(1)
    data = bytearray(bucket.files()["gradients/minibatch/value/c/2/0"])
    data[-100] ^= 1
    bucket.place("gradients/minibatch/value/c/2/0").write_bytes(data)
    problems = list(map(str, verify_run(bucket.address()).problems))
    assert len(problems) == 2
    assert any("row 1" in text and "missing" in text for text in problems)
    assert any("row 2" in text and "minibatch" in text for text in problems)


def test_a_step_is_exported_to_the_same_file(bucket, sample, tmp_path):
    sample.record(bucket.address())
    sample.record(tmp_path / "run.zarr")
    export_state_dict(bucket.address(), 2, tmp_path / "remote.safetensors")
    export_state_dict(tmp_path / "run.zarr", 2, tmp_path / "local.safetensors")
    remote, near = (tmp_path / f"{name}.safetensors" for name in ("remote", "local"))
    assert remote.read_bytes() == near.read_bytes()


# Addresses.


def test_what_is_there_is_not_overwritten(bucket, sample):
    bucket.place("notes.txt", "other").write_bytes(b"mine")
    with pytest.raises(UsageError, match="neither empty nor a run"):
        sample.create(bucket.address("other"))
    sample.record(bucket.address())
    with pytest.raises(UsageError, match="a run is already recorded here"):
        sample.create(bucket.address())
    assert bucket.files("other") == {"notes.txt": b"mine"}


def test_what_a_start_left_behind_gives_way(bucket, sample, local):
    bucket.place("scalars/zarr.json").write_bytes(b"{}")
    bucket.place("weights/value/.straightway/commits.jsonl").write_bytes(b"")
    sample.record(bucket.address())
    assert bucket.files() == local


def test_no_run_is_no_run(bucket):
    with pytest.raises(NotARunError, match="no such file or folder: s3://"):
        open_run(bucket.address())


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/run.zarr", "begins with ftp://"),
        ("s3://bucket", "no run is named"),
        ("s3://bucket/run#1.zarr", "no name with"),
    ],
)
def test_other_addresses_are_refused(address, words):
    with pytest.raises(UsageError, match=words):
        open_run(address)


def test_local_runs_do_without_obstore():
    program = (
        "import sys; sys.modules['obstore'] = None; "
        "from capture.store import open_run, verify_run, RunWriter, NotARunError\n"
        "try: open_run('nothing.zarr')\nexcept NotARunError: print('asked')"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "asked\n"


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    object_store.connect.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'straightway\[objects\]'"):
        open_run("s3://bucket/run.zarr")
