"""Training into an object store, and all that reads a run there; see `bucket` in conftest.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from analyze.cli import main as analyze
from capture.cli import main as capture
from capture.config import read_config
from capture.store import UsageError, object_lock, open_run, verify_run
from capture.train import train

ROOT = Path(__file__).parents[2]
STATE = re.compile(r"/\d{9}(-[0-9a-f]{8}\.safetensors|\.json)$")
LOCK = "weights/value/.straightway/lock"
FLAGS = {
    "task": "digits",
    "optimizer": "adam",
    "max_steps": 120,
    "every": "5",
    "gradients": "minibatch,updates@13,fixed:2@60",
    "checkpoint_every": 25,
    "keep_state": "every:50",
}


def call(program, *arguments):
    done = CliRunner().invoke(program, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done


def files_of(folder):
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != LOCK}


def without_states(files):
    """All but the resume states: these hold the random numbers of Python, other in each process."""
    return {name: data for name, data in files.items() if not STATE.search(name)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The run of FLAGS on a disk."""
    run = tmp_path_factory.mktemp("local") / "run.zarr"
    train(read_config(flags=FLAGS), run)
    return run


@pytest.fixture
def remote(bucket):
    """The run of FLAGS on the object store."""
    train(read_config(flags=FLAGS), bucket.address())
    return bucket.address()


def test_a_training_leaves_the_same_bytes_resume_states_too(bucket, local, remote):
    assert_same(bucket.files(), files_of(local))


def test_what_reads_a_run_reads_it_there(tmp_path, local, remote):
    told = json.loads(call(capture, "info", remote, "--json").stdout)
    known = json.loads(call(capture, "info", local, "--json").stdout)
    assert told.pop("run") == remote
    known.pop("run")
    assert told == known
    assert call(capture, "verify", remote).stdout == call(capture, "verify", local).stdout
    call(capture, "export", remote, "--step", 60, tmp_path / "remote.safetensors")
    call(capture, "export", local, "--step", 60, tmp_path / "local.safetensors")
    exported = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("remote", "local")]
    assert exported[0] == exported[1]


def test_it_is_measured_as_a_local_run_is(tmp_path, local, remote):
    options = ["--reference", "final", "--by", "layer", "--out"]
    call(analyze, "compute", remote, "--reference", f"run:{remote}@60", *options, tmp_path / "r.pq")
    call(analyze, "compute", local, "--reference", f"run:{local}@60", *options, tmp_path / "l.pq")
    theirs, ours = (pq.read_table(tmp_path / name) for name in ("r.pq", "l.pq"))
    assert theirs.num_rows > 0
    for table, run in ((theirs, remote), (ours, local)):
        assert set(table.column("run").to_pylist()) == {str(run)}
        # In Adam's metric where a state was kept, which the object store gives too.
        of_model = table.filter(pc.is_finite(table["cosine_adam"]))
        assert set(of_model["step"].to_pylist()) == {50, 100}
    drop = ["run", "reference"]
    # pandas takes NaN for equal to NaN
    near = ours.drop_columns(drop).to_pandas()
    assert theirs.drop_columns(drop).to_pandas().equals(near)


def test_a_report_is_made_of_it(tmp_path, remote):
    call(analyze, "report", remote, "--out", tmp_path / "report.html")
    assert remote in (tmp_path / "report.html").read_text()


def test_a_probe_adds_the_same_objects(bucket, local, remote, tmp_path):
    probed = tmp_path / "probed.zarr"
    shutil.copytree(local, probed)
    for run in (remote, probed):
        call(capture, "probe", run, "--gradients", "heldout:2@60")
    assert verify_run(remote).sound
    assert_same(bucket.files(), files_of(probed))


def start(bucket):
    """Start the training as a program."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in FLAGS.items()]
    program = "from capture.cli import main; main(prog_name='capture')"
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", *flags, f"--out={bucket.address()}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_and_resumed_training_is_the_same_bytes(bucket, local, signum, monkeypatch):
    process = start(bucket)
    deadline = time.monotonic() + 120
    while not any(name.endswith("000000050.json") for name in bucket.names()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    if signum == signal.SIGKILL:
        assert LOCK in bucket.files()
        # As if the stated time had passed.
        monkeypatch.setattr(object_lock, "STALE_SECONDS", 0.5)
        time.sleep(0.6)
    else:
        assert process.returncode == 143
        assert "--resume" in errors
        assert LOCK not in bucket.files()
    assert open_run(bucket.address()).status == "recording"
    assert verify_run(bucket.address()).sound
    train(read_config(flags=FLAGS), bucket.address(), resume=True)
    assert_same(*map(without_states, (bucket.files(), files_of(local))))


def test_a_plan_for_an_object_store_is_refused():
    from capture.plan import plan

    with pytest.raises(UsageError, match="how much room an object store has"):
        plan(read_config(flags=FLAGS), "s3://bucket/run.zarr")
    arguments = ["plan", "--task", "digits", "--out", "s3://bucket/run.zarr"]
    done = CliRunner().invoke(capture, arguments)
    assert done.exit_code == 2
    assert "how much room an object store has" in done.output
