"""Creating, committing, crashing, going on: what is on disk after each."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from capture.store import (
    DamagedError,
    LockedError,
    MismatchError,
    NotARunError,
    RunWriter,
    Tensor,
    TensorTable,
    UsageError,
    WriteError,
    open_run,
    verify_run,
)
from capture.store.layout import shard_key, stream_folder

PRIVATE = "weights/value/.straightway"


def check_every_row(sample, path):
    """Every row that the logs list verifies and is the one that was recorded for its step."""
    report = verify_run(path)
    assert report.problems == []
    for name, stream in open_run(path).streams.items():
        for row, step in enumerate(stream.steps):
            for batch in [None] if stream.batches is None else range(stream.batches):
                expected = sample.values(sample.TABLE, name, int(step), batch)
                np.testing.assert_array_equal(stream.read(row, batch), expected)


# Equal runs, equal files.


def test_equal_runs_are_equal_files(sample, run_path, tmp_path):
    sample.record(tmp_path / "again.zarr")
    assert sample.differences(run_path, tmp_path / "again.zarr") == []
    # The comparison can fail.
    (tmp_path / "again.zarr/weights/value/c/0/0").write_bytes(b"")
    assert sample.differences(run_path, tmp_path / "again.zarr") == ["weights/value/c/0/0"]


def test_shards_have_the_size_that_was_promised(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr")
    sample.write_steps(writer, 0, 1)
    for name, size in writer.shard_bytes.items():
        batch = 1 if name == "fixed" else None
        shard = tmp_path / "run.zarr" / stream_folder(name) / "value" / shard_key(0, batch)
        assert shard.stat().st_size == size
    writer.close()


# Where a run may be created.


def test_a_run_is_created_in_an_empty_folder_and_below_missing_ones(sample, tmp_path):
    (tmp_path / "empty").mkdir()
    sample.create(tmp_path / "empty").close()
    sample.create(tmp_path / "missing/folders/run.zarr").close()
    assert open_run(tmp_path / "empty").status == "recording"
    assert open_run(tmp_path / "missing/folders/run.zarr").attributes["config"] == {"lr": 0.1}


def test_a_file_a_run_and_a_foreign_folder_are_refused(sample, run_path, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="a file is in the way"):
        sample.create(tmp_path / "file")
    with pytest.raises(UsageError, match=r"already recorded here.*; choose another"):
        sample.create(run_path)
    sample.create(tmp_path / "stopped.zarr").close()
    with pytest.raises(UsageError, match=r"already recorded here.*--resume \(resume=True"):
        sample.create(tmp_path / "stopped.zarr")
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(UsageError, match="neither empty nor a run"):
        sample.create(tmp_path / "zarr")
    assert (tmp_path / "file").read_text() == "mine"
    assert verify_run(run_path).sound


def half_created(sample, path):
    """Leave what a crash just before the root leaves."""
    sample.create(path).close()
    (path / "zarr.json").unlink()


def test_a_half_created_run_gives_way(sample, tmp_path):
    half_created(sample, tmp_path / "run.zarr")
    (tmp_path / "run.zarr" / PRIVATE / "zarr.json.77.tmp").touch()
    sample.record(tmp_path / "run.zarr")
    sample.record(tmp_path / "fresh.zarr")
    assert sample.differences(tmp_path / "run.zarr", tmp_path / "fresh.zarr") == []


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "thesis/chapter.tex",
        "weights/mine.npy",
        "weights/value/c/0/0",
        "gradients/minibatch/value/c/0/0",
        f"{PRIVATE}/state.safetensors",
        "scalars/loss/c/0",
    ],
)
def test_what_creation_did_not_write_is_never_removed(sample, tmp_path, foreign):
    path = tmp_path / "run.zarr"
    half_created(sample, path)
    (path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (path / foreign).write_text("mine")
    before = sorted(path.rglob("*"))
    with pytest.raises(UsageError, match="neither empty nor a run"):
        sample.create(path)
    assert sorted(path.rglob("*")) == before


def test_a_run_that_lost_its_root_is_not_taken_for_a_start(sample, run_path):
    (run_path / "zarr.json").unlink()
    before = sorted(run_path.rglob("*"))
    with pytest.raises(UsageError, match="neither empty nor a run"):
        sample.create(run_path)
    assert sorted(run_path.rglob("*")) == before


def test_a_link_inside_a_start_is_not_followed(sample, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/zarr.json").write_text("mine")
    half_created(sample, tmp_path / "run.zarr")
    (tmp_path / "run.zarr/updates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="neither empty nor a run"):
        sample.create(tmp_path / "run.zarr")
    assert (tmp_path / "elsewhere/zarr.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a b"])
def test_a_stream_cannot_lead_elsewhere(sample, tmp_path, name):
    with pytest.raises(UsageError, match="cannot be streams"):
        sample.create(tmp_path / "run.zarr", streams={name: None})
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_too_long(sample, tmp_path):
    with pytest.raises(WriteError, match="too long"):
        sample.create(tmp_path / ("x" * 300))
    with pytest.raises(NotARunError, match="File name too long"):
        open_run(tmp_path / ("x" * 300))


# What comes next.


def test_only_the_next_step_and_batch_are_taken(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr")
    weights, fixed = writer.staging("weights"), writer.staging("fixed")
    writer.commit("weights", weights, step=3)
    writer.commit("fixed", fixed, step=3, batch=0)
    for stream, staging, step, batch in [
        ("weights", weights, 3, None),
        ("weights", weights, 2, None),
        ("weights", weights, 4, 0),
        ("fixed", fixed, 3, 0),
        ("fixed", fixed, 4, 0),
        ("fixed", fixed, 4, 1),
        ("fixed", fixed, 3, None),
    ]:
        with pytest.raises(ValueError, match="is next"):
            writer.commit(stream, staging, step=step, batch=batch)
    writer.commit("fixed", fixed, step=3, batch=1)
    writer.close()
    assert open_run(tmp_path / "run.zarr").stream("fixed").steps.tolist() == [3]


def test_a_row_with_a_batch_to_come_is_no_row_yet(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr")
    sample.write_steps(writer, 0, 2)
    staging = writer.staging("fixed")
    writer.commit("fixed", staging, step=2, batch=0)
    writer.flush()
    assert open_run(tmp_path / "run.zarr").stream("fixed").steps.tolist() == [0, 1]
    writer.close()


# The lock.


def test_a_second_process_is_refused_until_the_first_is_gone(sample, program, tmp_path):
    command, environment = program
    path = tmp_path / "run.zarr"
    first = subprocess.Popen(
        [*command, str(path), "100000"], env=environment, stdout=subprocess.PIPE
    )
    try:
        while not (path / "zarr.json").exists():
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(LockedError, match=r"another process is writing this run.*; wait"):
            RunWriter.reopen(path, sample.TABLE)
    finally:
        first.kill()
        first.communicate()
    RunWriter.reopen(path, sample.TABLE).close()


def test_a_failed_creation_gives_the_lock_back(sample, tmp_path):
    with pytest.raises(KeyError):
        RunWriter.create(tmp_path / "run.zarr", sample.TABLE, streams={}, frozen={})
    sample.create(tmp_path / "run.zarr").close()


@pytest.mark.parametrize(
    "attributes",
    [{"lr": float("nan")}, {"model": object()}, {"format": 7}, {"streams": {}}, {"crc32c": "0"}],
)
def test_attributes_that_cannot_be_kept_are_refused_before_anything_is_made(
    sample, tmp_path, attributes
):
    with pytest.raises(UsageError, match=r"JSON cannot hold|writes this attribute itself"):
        RunWriter.create(
            tmp_path / "run.zarr", sample.TABLE, streams={}, attributes=attributes, frozen={}
        )
    assert not (tmp_path / "run.zarr").exists()
    with closing(sample.create(tmp_path / "run.zarr")) as writer, pytest.raises(UsageError):
        writer.update_attributes(**attributes)
    assert open_run(tmp_path / "run.zarr").status == "recording"


def test_the_log_is_synced_after_its_line_is_written(sample, tmp_path, monkeypatch):
    writer = sample.create(tmp_path / "run.zarr")
    log = tmp_path / "run.zarr/weights/value/.straightway/commits.jsonl"
    synced = []

    def fsync(descriptor):
        if os.fstat(descriptor).st_ino == log.stat().st_ino:
            synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    sample.write_steps(writer, 0, 1)
    writer.close()
    assert synced == [log.stat().st_size]


# Going on.


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_a_truncated_run_equals_one_that_never_went_further(sample, run_path, tmp_path, kept):
    writer = RunWriter.reopen(run_path, sample.TABLE)
    writer.truncate(kept)
    assert writer.committed_steps("weights") == list(range(kept))
    assert not open_run(run_path).complete
    check_every_row(sample, run_path)
    sample.write_steps(writer, kept, 4)
    sample.finish(writer, 4)
    sample.record(tmp_path / "straight.zarr")
    assert sample.differences(run_path, tmp_path / "straight.zarr") == []


def test_a_truncated_run_has_nothing_more_on_disk(sample, run_path, tmp_path):
    writer = RunWriter.reopen(run_path, sample.TABLE)
    writer.truncate(3)
    writer.close()
    short = sample.create(tmp_path / "short.zarr")
    sample.write_steps(short, 0, 3)
    short.flush()
    short.close()
    assert sample.differences(run_path, tmp_path / "short.zarr") == []


def test_reopening_changes_nothing_in_a_sound_run(sample, run_path, tmp_path):
    shutil.copytree(run_path, tmp_path / "before.zarr")
    RunWriter.reopen(run_path).close()
    assert sample.differences(run_path, tmp_path / "before.zarr") == []


def test_another_model_is_refused(sample, run_path):
    first, *others = sample.TABLE.parameters
    reshaped = TensorTable(
        (Tensor(first.name, (24,), "F32", 0), *others), sample.TABLE.buffers, sample.TABLE.frozen
    )
    with pytest.raises(MismatchError, match=r"'conv.weight' has shape \[3, 2, 2, 2\] here"):
        RunWriter.reopen(run_path, reshaped)
    with pytest.raises(MismatchError, match="buffers"):
        RunWriter.reopen(run_path, TensorTable(sample.TABLE.parameters, (), sample.TABLE.frozen))
    RunWriter.reopen(run_path, sample.TABLE).close()


@pytest.mark.parametrize("lines", [0, 2])
def test_shards_outlive_the_log_of_a_complete_run(sample, run_path, lines):
    log = run_path / "gradients/minibatch/value/.straightway/commits.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
    with pytest.raises(DamagedError, match="the finished run has 4"):
        RunWriter.reopen(run_path, sample.TABLE)
    log.write_bytes(whole)
    check_every_row(sample, run_path)


def stopped(sample, path):
    """A run that was stopped after 3 steps; everything flushed."""
    writer = sample.create(path)
    sample.write_steps(writer, 0, 3)
    writer.flush()
    writer.close()


LEFT_BY_A_CRASH = {
    "a temporary file": lambda run: (run / PRIVATE / "0.123.tmp").write_bytes(b"half a shard"),
    "a shard without its line": lambda run: shutil.copytree(
        run / "weights/value/c/2", run / "weights/value/c/3"
    ),
    "a batch without its line": lambda run: shutil.copytree(
        run / "gradients/fixed/value/c/2/0", run / "gradients/fixed/value/c/3/0"
    ),
    "an empty folder": lambda run: (run / "gradients/fixed/value/c/3/0").mkdir(parents=True),
    "half a line": lambda run: (run / PRIVATE / "commits.jsonl").write_bytes(
        (run / PRIVATE / "commits.jsonl").read_bytes() + b'{"crc32c":"0123'
    ),
    "a chunk without a shape": lambda run: shutil.copytree(
        run / "scalars/loss/c", run / "scalars/new/c"
    ),
    "a shape that lags behind": lambda run: (run / "weights/value/zarr.json").write_text(
        (run / "weights/value/zarr.json").read_text().replace("    3,\n", "    1,\n", 1)
    ),
}


@pytest.mark.parametrize("leave", LEFT_BY_A_CRASH.values(), ids=LEFT_BY_A_CRASH.keys())
def test_what_a_crash_leaves_is_put_right(sample, tmp_path, leave):
    stopped(sample, tmp_path / "run.zarr")
    stopped(sample, tmp_path / "sound.zarr")
    leave(tmp_path / "run.zarr")
    assert sample.differences(tmp_path / "run.zarr", tmp_path / "sound.zarr") != []
    assert open_run(tmp_path / "run.zarr").stream("weights").steps.tolist() == [0, 1, 2]
    assert verify_run(tmp_path / "run.zarr").problems == []
    writer = RunWriter.reopen(tmp_path / "run.zarr", sample.TABLE)
    writer.close()
    assert sample.differences(tmp_path / "run.zarr", tmp_path / "sound.zarr") == []


def test_recovery_never_leaves_the_run(sample, tmp_path):
    stopped(sample, tmp_path / "run.zarr")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/0").write_text("mine")
    (tmp_path / "run.zarr/weights/value/c/9").symlink_to(tmp_path / "mine")
    RunWriter.reopen(tmp_path / "run.zarr", sample.TABLE).close()
    assert (tmp_path / "mine/0").read_text() == "mine"
    assert not (tmp_path / "run.zarr/weights/value/c/9").is_symlink()


@pytest.fixture
def fast_folder(tmp_path):
    """A folder in memory where there is one: hundreds of syncs wait for a disk."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tmp_path)
    yield Path(folder)
    shutil.rmtree(folder)


def test_a_crash_at_any_call_to_the_system_loses_nothing_committed(program, fast_folder):
    command, environment = program
    done = subprocess.run(
        [*command, str(fast_folder), "--crash", "11"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A run of this size makes more than 300 calls; each eleventh one was tried.
    assert int(done.stdout) > 27


def test_a_writer_killed_again_and_again_comes_to_the_same_end(sample, program, fast_folder):
    command, environment = program
    path, draw = fast_folder / "run.zarr", random.Random(0)
    seen = -1
    for _ in range(6):
        child = subprocess.Popen(
            [*command, str(path), "2000"], env=environment, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.25))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if (path / "zarr.json").exists():
            check_every_row(sample, path)
            seen = max(seen, len(open_run(path).stream("weights")))
    assert seen > 2, "the writer was always killed before it had written anything"
    final = seen + 5
    sample.go_on(path, final)
    sample.record(fast_folder / "straight.zarr", final)
    assert sample.differences(path, fast_folder / "straight.zarr") == []


# A disk that refuses.


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
def test_wherever_the_disk_is_full_nothing_committed_is_lost(sample, tmp_path, monkeypatch, call):
    real, left = getattr(os, call), 10**9

    def full(*args, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    path = tmp_path / "run.zarr"
    writer = sample.create(path)
    sample.write_steps(writer, 0, 1)
    monkeypatch.setattr(os, call, full)
    for attempt in range(100):
        left = attempt
        staging, step = writer.staging("weights"), attempt + 1
        sample.fill(staging, step)
        before = len(open_run(path).stream("weights"))
        try:
            writer.commit("weights", staging, step=step)
        except WriteError as error:
            left, message = 10**9, str(error)
            assert message.startswith("cannot write, the disk is full: ")
            assert "\n" not in message
            assert len(open_run(path).stream("weights")) == before
        else:
            break
    left = 10**9
    assert attempt > 0, "no call was refused"
    writer.flush()
    writer.close()
    RunWriter.reopen(path, sample.TABLE).close()
    check_every_row(sample, path)


def test_a_limit_on_the_size_of_files(program, sample, tmp_path):
    command, environment = program
    path = tmp_path / "run.zarr"
    code = (
        "import resource, sys, runpy\n"
        "from capture.store import StraightwayError\n"
        "main = runpy.run_path(sys.argv[1])\n"
        "writer = main['create'](sys.argv[2])\n"
        "main['write_steps'](writer, 0, 2)\n"
        "writer.flush()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        "try:\n"
        "    main['write_steps'](writer, 2, 3)\n"
        "except StraightwayError as error:\n"
        "    print(f'error: {error}', file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [command[0], "-c", code, command[-1], str(path)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cannot write, the file would be larger than is allowed")
    check_every_row(sample, path)
    assert open_run(path).stream("weights").steps.tolist() == [0, 1]
    assert list((path / PRIVATE).glob("*.tmp")) == []
    sample.go_on(path, 4)
    sample.record(tmp_path / "straight.zarr")
    assert sample.differences(path, tmp_path / "straight.zarr") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    # Lazily: after a failure the writer may still hold files there.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(sample, small_disk, tmp_path):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    path = small_disk / "run.zarr"
    writer = sample.create(path)
    with pytest.raises(WriteError, match=r"the disk is full: .*; free space, then try again"):
        sample.write_steps(writer, 0, 1000)
    writer.close()
    check_every_row(sample, path)
    reached = len(open_run(path).stream("weights"))
    assert reached > 2
    ballast.unlink()
    sample.go_on(path, reached + 1)
    sample.record(tmp_path / "straight.zarr", reached + 1)
    assert sample.differences(path, tmp_path / "straight.zarr") == []


def test_a_disk_that_may_not_be_written(sample, small_disk):
    sample.record(small_disk / "run.zarr", 1)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(remount, capture_output=True).returncode:
        pytest.skip("this file system cannot be made read-only")
    with pytest.raises(WriteError, match="read-only"):
        sample.create(small_disk / "other.zarr")
    with pytest.raises(WriteError, match="read-only"):
        RunWriter.reopen(small_disk / "run.zarr")
    assert verify_run(small_disk / "run.zarr").sound


def test_attributes_are_merged_and_the_status_follows_the_run(sample, tmp_path):
    writer = sample.create(tmp_path / "run.zarr")
    writer.update_attributes(optimizer={"name": "SGD"})
    sample.write_steps(writer, 0, 1)
    sample.finish(writer, 1)
    attributes = json.loads((tmp_path / "run.zarr/zarr.json").read_text())["attributes"]
    assert attributes["straightway"]["optimizer"] == {"name": "SGD"}
    assert attributes["straightway"]["status"] == "complete"
    assert attributes["straightway"]["final_step"] == 1
